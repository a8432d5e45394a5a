"""The kernel registry: for every hot operation, whether its Triton kernel runs or its twin in plain PyTorch.

An operation has a name, a twin, and a module `triton_<name>.py` which is imported when a kernel is first asked for:
the package needs neither Triton nor a driver. Such a module offers `self_check_cases(device, *problem)`, a list of
`Case`, for the problem that its caller names, by what other machine code depends on, or for those that models have.

    CUDA or HIP tensors of a supported shape    the kernel, once it has passed its self-check of that problem there
    anything else                               the twin; on a GPU with one warning that names the cause

The self-check compares kernel and twin on small problems and wants the kernel to repeat itself bit by bit: Triton has
had silent miscompiles (triton #10590, #10821) that neither an interpreter nor an offline compilation can see.

SSM_LM_KERNELS = auto | triton | torch, or the key `kernels` of S4Config, forces either; the variable wins. "triton" on
CPU tensors needs Triton's interpreter (TRITON_INTERPRET=1 before the first import) and is how the tests run models.
"""

import contextlib
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

SETTINGS = ("auto", "triton", "torch")
OLDEST_CAPABILITY = (8, 0)  # bfloat16 on tensor cores

# the names of custom operators are global in a process, and a model from the Hub brings its own copy of these files
NAMESPACE = "ssm_lm" if __name__.startswith("ssm_lm.") else re.sub(r"\W", "_", __name__.rpartition(".")[0] or __name__)


class Case(NamedTuple):
    """One problem of a self-check: two functions that return the same tensors, and how far apart they may be, as the
    largest difference relative to the twin's largest value.
    """

    label: str
    kernel: Callable[[], Sequence[torch.Tensor]]
    twin: Callable[[], Sequence[torch.Tensor]]
    tolerance: float


def _chunk_scan():
    from .triton_chunk_scan import self_check_cases

    return self_check_cases


def _cauchy():
    from .triton_cauchy import self_check_cases

    return self_check_cases


def _vandermonde():
    from .triton_vandermonde import self_check_cases

    return self_check_cases


def _s5_scan():
    from .triton_s5_scan import self_check_cases

    return self_check_cases


def _step():
    from .triton_step import self_check_cases

    return self_check_cases


# operation -> what imports its kernel and returns its self-check
KERNELS: dict[str, Callable[[], Callable[..., list[Case]]]] = {
    "chunk_scan": _chunk_scan,
    "cauchy": _cauchy,
    "vandermonde": _vandermonde,
    "s5_scan": _s5_scan,
    "step": _step,
}

# (operation, device, problem) -> why its kernel is not used there, None: it is
_causes: dict[tuple[str, str, tuple], str | None] = {}
_errors: dict[tuple[str, str, tuple], float] = {}  # -> the self-check's largest difference, in units of its tolerance
_warned: set[tuple[str, str]] = set()
_thread = threading.local()


def qualified(name: str) -> str:
    """The full name of a custom operator."""
    return f"{NAMESPACE}::{name}"


# ---- the choice


def use_kernel(
    op: str, *tensors: torch.Tensor, unsupported: str | None = None, setting: str = "auto", problem: tuple = ()
) -> bool:
    """Whether the Triton kernel of `op` is to run on these tensors.

    unsupported: what of the problem the kernel cannot do, in words, or None.
    problem: what the operation's `self_check_cases` takes after the device; each is checked when it is first met.
    setting: the config's key `kernels`; the environment variable SSM_LM_KERNELS goes before it.
    Raises ValueError for a setting that does not exist, and RuntimeError where "triton" is forced and cannot be.
    """
    devices = {(x.device.type, x.device.index) for x in tensors}
    if len(devices) > 1:
        unsupported = unsupported or f"tensors on several devices ({', '.join(sorted(map(_name, devices)))})"
    return _decide(op, _name(min(devices)), unsupported, setting, problem)


def _name(device: tuple[str, int | None]) -> str:
    return device[0] if device[1] is None else f"{device[0]}:{device[1]}"


def _decide(op: str, device: str, unsupported: str | None, setting: str, problem: tuple = ()) -> bool:
    setting = os.environ.get("SSM_LM_KERNELS", "auto") if _forced_by_environment() else setting
    if setting not in SETTINGS:
        raise ValueError(f"kernels (or SSM_LM_KERNELS) is one of {', '.join(SETTINGS)}, not {setting!r}")
    on_gpu = device.startswith("cuda")  # HIP devices too
    if getattr(_thread, "checks", False):
        return False  # within a self-check, whatever a twin is made of is one too
    if setting == "torch" or device == "meta" or (setting == "auto" and not on_gpu):
        return False
    cause = unsupported or _cause(op, device, problem)
    if cause is None:
        return True
    if setting == "triton":
        raise RuntimeError(
            f"kernels: triton is forced, but the kernel {op} cannot run on {device}: {cause}; "
            'kernels="auto" in from_pretrained, or SSM_LM_KERNELS=auto, lets PyTorch run instead'
        )
    if (op, cause) not in _warned:
        _warned.add((op, cause))
        warnings.warn(f"{op} runs in plain PyTorch on {device}, without its Triton kernel: {cause}", stacklevel=3)
    return False


# a compiled model keeps the choice that was made when it was traced. This is what the decorator
# torch.compiler.assume_constant_result does, which also imports all of the compiler, seconds for every command
_decide._dynamo_marked_constant = True


def _forced_by_environment() -> bool:
    return os.environ.get("SSM_LM_KERNELS", "auto") != "auto"


def _cause(op: str, device: str, problem: tuple = ()) -> str | None:
    """Why the kernel of `op` cannot run on the device, None where it can. Found once a device and problem."""
    key = op, device, problem
    if key not in _causes:  # threads that find this at the same time check twice, to the same end
        cause = _find_cause(*key)
        if cause is _CAPTURING:
            return cause
        _causes[key] = cause
    return _causes[key]


_CAPTURING = "it has not passed its self-check, and a CUDA graph is being captured: run the model once before"


def _find_cause(op: str, device: str, problem: tuple = ()) -> str | None:
    try:
        from triton import knobs

        cases = KERNELS[op]()
    except Exception as error:  # not installed, or installed without what it needs
        return f"Triton cannot be imported ({type(error).__name__}: {_one_line(error)})"
    if knobs.runtime.interpret:
        return None if device == "cpu" else "TRITON_INTERPRET is set"
    if not device.startswith("cuda") or not torch.cuda.is_available():
        return "there is no GPU, and TRITON_INTERPRET is not set"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < OLDEST_CAPABILITY:
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        return f"its compute capability is {capability}, and the kernels need {'.'.join(map(str, OLDEST_CAPABILITY))}"
    if torch.cuda.is_current_stream_capturing():
        return _CAPTURING
    cause, _errors[op, device, problem] = self_check(lambda device: cases(device, *problem), torch.device(device))
    return cause


# ---- the self-check


def self_check(cases: Callable[[torch.device], list[Case]], device: torch.device) -> tuple[str | None, float]:
    """Run the cases on the device: what is wrong, None for nothing, and the largest difference over its tolerance.

    It runs in a thread of its own, which has none of the caller's modes: no autocast, no inference mode, no fake
    tensors of a compiler at work.
    """
    found: list[tuple[str | None, float]] = []

    def run():
        _thread.checks = True
        try:
            found.append(_compare(cases(device)))
        except Exception as error:  # of the compiler, of the launch
            found.append((f"its self-check failed ({type(error).__name__}: {_one_line(error)})", float("inf")))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


def _compare(cases: list[Case]) -> tuple[str | None, float]:
    worst = 0.0
    for label, kernel, twin, tolerance in cases:
        first, second = ([x.clone() for x in kernel()] for _ in range(2))
        if not all(torch.equal(a, b) for a, b in zip(first, second, strict=True)):
            return f"its self-check failed: {label} is not the same when it is repeated", float("inf")
        difference = max(relative_difference(a, b) for a, b in zip(first, twin(), strict=True))
        if not difference < tolerance:  # a NaN is not
            return f"its self-check failed: {label} differs by {difference:.2g}, more than {tolerance:g}", float("inf")
        worst = max(worst, difference / tolerance)
    return None, worst


def relative_difference(ours: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest absolute difference over the largest expected value; 0 for empty tensors."""
    if expected.numel() == 0:
        return 0.0 if ours.shape == expected.shape else float("inf")
    ours, expected = ours.double(), expected.double()
    return ((ours - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()


def kernel_status() -> dict[str, str]:
    """Operation -> one line: what runs here, and why. On a GPU this runs the self-checks that have not run yet."""
    setting = os.environ.get("SSM_LM_KERNELS", "auto")
    if setting == "torch":
        return {op: "PyTorch: SSM_LM_KERNELS=torch" for op in KERNELS}
    if not torch.cuda.is_available():
        return {op: f"PyTorch: {_cause(op, 'cpu') or 'CPU tensors, unless SSM_LM_KERNELS=triton'}" for op in KERNELS}
    report = {}
    device = f"cuda:{torch.cuda.current_device()}"
    for op in KERNELS:
        cause = _cause(op, device)
        passed = f"Triton on {device}: self-check passed, at {_errors.get((op, device, ()), 0):.0%} of its tolerance"
        report[op] = passed if cause is None else f"PyTorch: {cause}"
    return report


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


# ---- which configuration of a kernel


def architecture(device: torch.device) -> str:
    """ "sm_90", "gfx942", or "interpreter" where there is no GPU."""
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
        warnings.warn(f"{configuration} is passed over: {_one_line(error)}", stacklevel=2)
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
