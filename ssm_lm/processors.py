"""How many processors there are for this process."""

import os


def usable() -> int:
    """Those that it may run on, where the system tells (Linux does, macOS does not), else all of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
