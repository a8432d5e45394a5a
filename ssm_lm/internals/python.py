"""What reaches into Python's own library."""

import atexit
import os
import sys

from . import Part


def leave(code: int, run_exit_functions: bool = False) -> None:
    """End the process at once, without taking the interpreter apart; what was printed is flushed before."""
    if run_exit_functions:
        atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


PARTS = (
    Part(
        "atexit._run_exitfuncs",
        "called before os._exit, which skips it",
        "libraries write and close files in exit functions, and a rank of several cannot wait for the interpreter",
        "collective backends let Python end while their threads run (gloo in torch 2.13 aborts the process)",
    ),
)
