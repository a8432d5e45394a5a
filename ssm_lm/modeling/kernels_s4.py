"""The rule: for every hot operation, whether its Triton kernel runs or its twin in plain PyTorch.

    CUDA or HIP tensors of a supported shape    the kernel, once it has passed its self-check of that problem there
    anything else                               the twin; on a GPU with one warning that names the cause

A kernel's file, `triton_<name>.py`, is imported when the kernel is first asked for: the package needs neither Triton
nor a driver. It offers `self_check_cases(device, *problem)`, a list of `Case`, for the problem that its caller names
(what other machine code depends on), or for those that models have.

The self-check compares kernel and twin on small problems and wants the kernel to repeat itself bit by bit: Triton has
had silent miscompiles (triton #10590, #10821) that neither an interpreter nor an offline compilation can see.

SSM_LM_KERNELS = auto | triton | torch, or the key `kernels` of S4Config, forces either; the variable wins. "triton" on
CPU tensors needs Triton's interpreter (TRITON_INTERPRET=1 before the first import) and is how the tests run models.
"""

import os
import threading
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch

from .kernel_launch import architecture, assumed, one_line
from .kernel_limits import limit_of_architecture

SETTINGS = ("auto", "triton", "torch")


class Case(NamedTuple):
    """One problem of a self-check: two functions that return the same tensors, and how far apart they may be, as the
    largest difference relative to the twin's largest value.
    """

    label: str
    kernel: Callable[[], Sequence[torch.Tensor]]
    twin: Callable[[], Sequence[torch.Tensor]]
    tolerance: float


def gradient_case(
    label: str, kernel: Callable, twin: Callable, leaves: Sequence, weights: Sequence, tolerance: float, trains=True
) -> Case:
    """What `kernel(*leaves)` returns, a tensor or several, and the gradients of the leaves for `weights`, one an
    output, beside those of the twin in float64. trains: without it, what is returned alone.
    """

    def run(function, cast):
        inputs = [cast(x.clone()).requires_grad_(trains) for x in leaves]
        with torch.set_grad_enabled(trains):
            outputs = function(*inputs)
        outputs = (outputs,) if torch.is_tensor(outputs) else tuple(outputs)
        of_outputs = [w.to(x.dtype) for w, x in zip(weights, outputs, strict=True)]
        gradients = torch.autograd.grad(outputs, inputs, of_outputs) if trains else ()
        return [x.detach() for x in (*outputs, *gradients)]

    return Case(label, partial(run, kernel, lambda x: x), partial(run, twin, torch.Tensor.double), tolerance)


class Operation:
    """A hot operation: its twin in plain PyTorch and its Triton kernel, one of which runs where it is called for.

    twin: what runs wherever the kernel does not. load: imports the kernel's file and returns (kernel, its
    `self_check_cases`). Both of the same signature. An operation is made once, in ops.py, which registers it here.
    """

    def __init__(self, name: str, twin, load: Callable[[], tuple]):
        self.name, self.twin, self.load = name, twin, load
        OPERATIONS[name] = self

    def either(self, run_kernel: bool):
        """The kernel or the twin; within `kernel_launch.assume` what stands in for the kernel."""
        if not run_kernel:
            return self.twin
        return self.load()[0] if assumed() is None else assumed().kernels[self.name]

    def runs_kernel(self, *tensors: torch.Tensor, **keys) -> bool:
        """See `use_kernel`."""
        return use_kernel(self.name, *tensors, **keys)


OPERATIONS: dict[str, Operation] = {}

# (operation, device, problem) -> why its kernel is not used there, None: it is
_causes: dict[tuple[str, str, tuple], str | None] = {}
_errors: dict[tuple[str, str, tuple], float] = {}  # -> the self-check's largest difference, in units of its tolerance
_warned: set[tuple[str, str]] = set()
_thread = threading.local()


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
    if assumed() is not None:
        too_old = limit_of_architecture(assumed().architecture)
        return setting != "torch" and op in assumed().kernels and not unsupported and not too_old
    setting = in_force(setting)
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


def in_force(setting: str) -> str:
    """The config's key `kernels`, or what the environment says in its place. Raises ValueError for an unknown one."""
    setting = os.environ["SSM_LM_KERNELS"] if _forced_by_environment() else setting
    if setting not in SETTINGS:
        raise ValueError(f"kernels (or SSM_LM_KERNELS) is one of {', '.join(SETTINGS)}, not {setting!r}")
    return setting


def _forced_by_environment() -> bool:
    return os.environ.get("SSM_LM_KERNELS", "auto") != "auto"


def _cause(op: str, device: str, problem: tuple = ()) -> str | None:
    """Why the kernel of `op` cannot run on the device, None where it can. Found once a device and problem."""
    key = op, device, problem
    if key not in _causes:  # threads that find this at the same time check twice, to the same end
        cause = _find_cause(*key)
        if cause in (_CAPTURING, _NO_MEMORY):
            return cause
        _causes[key] = cause
    return _causes[key]


# no verdicts: the next forward asks again
_NO_MEMORY = "its self-check found no memory left on the device, and is made again at the next forward"
_CAPTURING = "it has not passed its self-check, and a CUDA graph is being captured: run the model once before"


# of what is lost with the device's context no twin can run either
_LOST = "took down the device; start again with SSM_LM_KERNELS=torch"


def _find_cause(op: str, device: str, problem: tuple = ()) -> str | None:
    try:
        from triton import knobs

        cases = OPERATIONS[op].load()[1]
    except Exception as error:  # not installed, or installed without what it needs
        return f"Triton cannot be imported ({type(error).__name__}: {one_line(error)})"
    if knobs.runtime.interpret:
        return None if device == "cpu" else "TRITON_INTERPRET is set"
    if not device.startswith("cuda") or not torch.cuda.is_available():
        return "there is no GPU, and TRITON_INTERPRET is not set"
    if too_old := limit_of_architecture(architecture(torch.device(device))):
        return too_old
    if torch.cuda.is_current_stream_capturing():
        return _CAPTURING
    cause, _errors[op, device, problem] = self_check(lambda device: cases(device, *problem), torch.device(device))
    if cause is not None and _LOST in cause:
        raise RuntimeError(f"the kernel {op}: {cause}")
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
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # what a launch broke is heard of later
        except torch.OutOfMemoryError:
            found.append((_NO_MEMORY, float("inf")))
        except torch.AcceleratorError as error:  # an illegal address, for one
            found.append((f"its self-check {_LOST} ({one_line(error)})", float("inf")))
        except Exception as error:  # of the compiler, of the launch
            found.append((f"its self-check failed ({type(error).__name__}: {one_line(error)})", float("inf")))

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
        return {op: "PyTorch: SSM_LM_KERNELS=torch" for op in OPERATIONS}
    if not torch.cuda.is_available():
        return {op: f"PyTorch: {_cause(op, 'cpu') or 'CPU tensors, unless SSM_LM_KERNELS=triton'}" for op in OPERATIONS}
    report = {}
    device = f"cuda:{torch.cuda.current_device()}"
    for op in OPERATIONS:
        cause = _cause(op, device)
        passed = f"Triton on {device}: self-check passed, at {_errors.get((op, device, ()), 0):.0%} of its tolerance"
        report[op] = passed if cause is None else f"PyTorch: {cause}"
    return report
