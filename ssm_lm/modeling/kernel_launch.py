"""What the launchers of all Triton kernels share: the name of an operator, the architecture, and which of the shipped
configurations runs on this card.
"""

import contextlib
import functools
import json
import os
import re
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

# the names of custom operators are global in a process, and a model from the Hub brings its own copy of these files
NAMESPACE = "ssm_lm" if __name__.startswith("ssm_lm.") else re.sub(r"\W", "_", __name__.rpartition(".")[0] or __name__)


def qualified(name: str) -> str:
    """The full name of a custom operator."""
    return f"{NAMESPACE}::{name}"


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


# ---- a GPU that is not there


class Assumed(NamedTuple):
    """architecture: as of `architecture`. kernels: operation -> what stands in for its kernel."""

    architecture: str
    kernels: dict


_thread = threading.local()


@contextlib.contextmanager
def assume(architecture: str, kernels: dict):
    """Within, models choose as on a GPU of this architecture, and these run in the place of its kernels, on tensors
    without data: so `ssm-lm estimate` counts what a GPU would allocate and move.
    """
    _thread.assumed = Assumed(architecture, kernels)
    try:
        yield
    finally:
        _thread.assumed = None


def assumed() -> Assumed | None:
    """What `assume` has set in this thread."""
    return getattr(_thread, "assumed", None)


def device_kind(device: torch.device) -> str:
    """ "cpu" or "cuda" (HIP too), by which working sets are chosen."""
    return device.type if assumed() is None else "cuda"


# ---- which configuration of a kernel


def architecture(device: torch.device) -> str:
    """ "sm_90", "gfx942", or "interpreter" where there is no GPU."""
    if assumed() is not None:
        return assumed().architecture
    if device.type != "cuda" or not torch.cuda.is_available():
        return "interpreter"
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


architecture._dynamo_marked_constant = True


def family(architecture: str) -> str:
    """What a table of configurations is ordered by: "cuda", "blackwell", "hip" or "interpreter".

    Blackwell (compute capability 10 to 12) is apart for Triton's open miscompiles there: its configurations have one
    stage and small tiles, so that no tcgen05 instruction is used.
    """
    if architecture.startswith("gfx"):
        return "hip"
    if not architecture.startswith("sm_"):
        return "interpreter"
    return "blackwell" if int(re.match(r"sm_(\d+)", architecture)[1]) >= 100 else "cuda"


def on_device(device: torch.device):
    """A context in which a kernel is launched on the device of its tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


_numbered: int | None = None  # which configuration a self-check runs


@contextlib.contextmanager
def numbered_configuration(number: int):
    """`tuned` takes this one of the configurations, so that a self-check runs each of them. Not the thread's alone: a
    backward runs in others. What these launch meanwhile is shipped as well.
    """
    global _numbered
    _numbered = number
    try:
        yield
    finally:
        _numbered = None


def in_rows(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """x (B, L, C), or a copy whose tokens lie evenly apart, and how far: part of a wider tensor is read where it is."""
    B, L, C = x.shape
    row = x.stride(1 if L > 1 else 0)
    if x.stride(2) == 1 and row >= C and (min(B, L) <= 1 or x.stride(0) == L * row):
        return x, row
    return x.contiguous(), C


def tuned(op: str, problem: str, configurations: Sequence, run: Callable[[object], None], device: torch.device):
    """The configuration to run: the only one, or the fastest on this device by a measurement that is made once and
    kept in a file for all later processes.

    problem: what the choice depends on, as a string; run: launches the kernel in a configuration.
    The first configuration is the default: where SSM_LM_KERNEL_TUNING is 0, where nothing can be timed, and for the
    ranks of a node but its first, which read what an earlier process has written. The file is replaced as a whole, so
    writers at the same time can at most lose an entry, which the next process measures again.
    """
    if _numbered is not None:
        return configurations[_numbered % len(configurations)]
    default = configurations[0]
    if len(configurations) == 1 or device.type != "cuda" or os.environ.get("SSM_LM_KERNEL_TUNING", "1") == "0":
        return default
    file, key = _tuning_file(device), f"{op} {problem}"
    known = {repr(configuration): configuration for configuration in configurations}
    if file not in _tuned:
        _tuned[file] = _read(file)
    if _tuned[file].get(key) not in known:
        if os.environ.get("LOCAL_RANK", "0") != "0" or torch.cuda.is_current_stream_capturing():
            return default
        _tuned[file] = _read(file) | _tuned[file] | {key: repr(min(configurations, key=lambda one: _seconds(run, one)))}
        _write(file, _tuned[file])
    return known[_tuned[file][key]]


def _seconds(run: Callable[[object], None], configuration, repeats: int = 5) -> float:
    """The shortest of some launches, after one that compiles; infinite where it cannot be launched."""
    try:
        run(configuration)
    except Exception as error:  # it does not compile, or asks for more than the card has
        warnings.warn(f"{configuration} is passed over: {one_line(error)}", stacklevel=2)
        return float("inf")
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run(configuration)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return min(times)


_tuned: dict[Path, dict[str, str]] = {}


@functools.lru_cache(maxsize=64)  # it is asked for at every launch
def _tuning_file(device: torch.device) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    version = getattr(sys.modules.get("triton"), "__version__", "unknown")  # it is imported: a kernel is about to run
    name = f"{torch.cuda.get_device_name(device)} {architecture(device)} triton {version}"
    return cache / "ssm_lm" / "kernels" / (re.sub(r"[^\w.]+", "-", name) + ".json")


def _read(file: Path) -> dict[str, str]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none yet, or not one of ours
        return {}
    return found if isinstance(found, dict) else {}


def _write(file: Path, choices: dict[str, str]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=file.parent, delete=False) as partial:
            json.dump(choices, partial, indent=2, sort_keys=True)
        os.replace(partial.name, file)
    except OSError:
        pass  # a home that cannot be written: the choice lasts as long as the process
