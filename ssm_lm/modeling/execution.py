"""How one forward of a state space runs, decided once.

The decision asks for a layer's kind and sizes and for what is known of the input, not for numbers: `ssm-lm estimate`
asks it as well, for a GPU that is not there.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from .activations import FUSED_ACTIVATIONS
from .kernels_s4 import use_kernel

MODES = ("auto", "chunk", "fft", "recurrent", "associative")

# Tokens on a cache that go through the layer one by one. That is exact to the bit with decoding, so that tokens that
# were drafted are judged as they would have been chosen; and for few tokens it takes less time than the scan, whose
# operators cost as much as hundreds of steps. In C (native_step.py) so it does for some hundred. Training and compiled
# graphs scan.
FEW_TOKENS = 32


class Execution(NamedTuple):
    """mode: "chunk", "fft", "recurrent" or "associative".

    kernel: whether the Triton kernel of the mode runs: the step's in mode recurrent, else the scan's (which finds the
    final state of the mode fft, too).
    chunk_size: tokens of a chunk of the chunk scan, unless the sequence is shorter.
    dtype: in which the layer takes the signal; the chunk scan may take it in bfloat16 beside float32 operators.
    activation: what the kernel applies on its way out, one of ACTIVATIONS; None: it is applied to the output.
    in_rows: the output is a view of the kernel's rows; see `gradient_in_rows`.
    """

    mode: str
    kernel: bool
    chunk_size: int
    dtype: torch.dtype
    activation: str | None
    in_rows: bool


class Problem(NamedTuple):
    """What an execution depends on beside the layer.

    mode: as in `StateSpace.forward`. length: of the sequence. dtype: of the input. architecture: see
    `kernel_launch.architecture`. from_state: there is an initial state. needs_state: the final one is wanted.
    documents: the sequence holds several. gradient: autograd records. activation: the module to be applied to the
    output, or None. cached: the state comes from a cache, or goes into one.
    """

    mode: str
    length: int
    dtype: torch.dtype
    architecture: str = "interpreter"
    from_state: bool = False
    needs_state: bool = False
    documents: bool = False
    gradient: bool = False
    activation: nn.Module | None = None
    cached: bool = False


def as_autocast(u: torch.Tensor) -> torch.Tensor:
    """u as an autocast region of bfloat16 gives it to a matrix product: rounded, where it is float32; else u itself.

    A norm returns float32 there, and what stands before a layer is often one: taken as it comes, a kernel's scan would
    keep 20 bytes a token and channel for the backward, not 8. Not in float16: a state leaves its range.
    """
    return u.to(as_autocast_dtype(u))


def as_autocast_dtype(u: torch.Tensor) -> torch.dtype:
    """That of `as_autocast(u)`."""
    device = u.device.type
    if u.dtype != torch.float32 or not torch.is_autocast_enabled(device):
        return u.dtype
    return torch.bfloat16 if torch.get_autocast_dtype(device) == torch.bfloat16 else u.dtype


# (operation, what its kernel cannot do of the problem or None, the problem's key) -> whether the kernel runs
Rule = Callable[[str, str | None, tuple], bool]


def decide(layer: nn.Module, problem: Problem, runs: Rule) -> Execution:
    """The execution of a forward of `layer`, a StateSpace: the first of these that fits.

    exported for sequences of any length     recurrent
    few tokens on a cache, or one token      recurrent
    the scan's kernel runs                   chunk
    what was asked for                       that
    auto                                     fft below `layer.fft_is_faster_below` where no state is needed and
                                             the chunk scan does not run in C, else chunk
    """
    mode, length = problem.mode, problem.length
    if is_any(length):
        return _by_steps(layer, problem, runs)
    few = 1 if problem.gradient or torch.compiler.is_compiling() else FEW_TOKENS
    if (problem.cached and length <= few) or (mode == "auto" and length == 1):
        mode = "recurrent"
    if mode == "recurrent":
        return _by_steps(layer, problem, runs)
    dtype, scan_dtype = layer.kernel_dtype(problem.dtype), layer.scan_dtype(problem.dtype)
    needs_state = problem.from_state or problem.needs_state
    # in mode fft the scan finds the final state alone, from the signal in the dtype of the parameters
    kernel = mode in ("auto", "chunk") and _scans_on_kernel(layer, problem, dtype, runs)
    if kernel:
        mode = "chunk"
    elif mode == "auto":
        is_faster = length < layer.fft_is_faster_below and not layer.scans_in_c(scan_dtype)
        mode = "fft" if is_faster and not needs_state else "chunk"
    if not kernel:
        dtype = scan_dtype if mode == "chunk" else layer.log_dt.dtype
        finds_state = mode == "fft" and needs_state and layer.has_chunk_kernel
        kernel = finds_state and _scans_on_kernel(layer, problem, dtype, runs)
    chunk_size = layer.chunk_on_kernel(problem.architecture, dtype) if kernel else layer.chunk_size
    in_chunk_kernel = kernel and mode == "chunk" and layer.has_chunk_kernel and _alone(layer, problem)
    fused = FUSED_ACTIVATIONS.get(type(problem.activation)) if in_chunk_kernel else None
    whole = not problem.from_state or length % min(chunk_size, length) == 0  # a rest is put behind, by a copy
    return Execution(mode, kernel, chunk_size, dtype, fused, in_chunk_kernel and whole)


def is_any(length: int) -> bool:
    """Whether a sequence that is being exported stands for those of every length."""
    return torch.compiler.is_exporting() and isinstance(length, torch.SymInt)


def _by_steps(layer, problem, runs) -> Execution:
    kernel = False
    if not layer.bidirectional and not problem.gradient:
        kernel = runs(layer.step_operation, layer.limit_of_step(problem.dtype), ())
    fused = FUSED_ACTIVATIONS.get(type(problem.activation)) if kernel else None
    return Execution("recurrent", kernel, layer.chunk_size, layer.log_dt.dtype, fused, False)


def _scans_on_kernel(layer, problem, dtype, runs) -> bool:
    operation, unsupported, key = layer.scan_kernel(problem.architecture, dtype)
    if layer.has_chunk_kernel and unsupported is None:
        # what its machine code depends on beside: the self-check is of the very signature that is about to run. A
        # forward of training may run without autograd first and with it in the backward, where no check can be made
        gradient = problem.gradient or layer.training
        fused = FUSED_ACTIVATIONS.get(type(problem.activation)) if _alone(layer, problem) else None
        chunk_size = layer.chunk_on_kernel(problem.architecture, dtype)
        key = (*key, chunk_size, gradient, problem.documents, problem.from_state, fused or "identity")
    return runs(operation, unsupported, key)


def _alone(layer, problem) -> bool:
    """Whether the chunk scan's output is the layer's."""
    return not problem.documents and not layer.bidirectional


def rule_of(layer: nn.Module, u: torch.Tensor, state: torch.Tensor | None = None) -> Rule:
    """The rule for tensors that are there: kernels_s4.py's, of the devices of what each operation reads."""

    def runs(operation, unsupported, key):
        read = [u] if operation == "chunk_scan" else [u, layer.log_dt]
        if operation == layer.step_operation and state is not None:
            read = [*read, state]
        return use_kernel(operation, *read, unsupported=unsupported, setting=layer.kernels, problem=key)

    return runs
