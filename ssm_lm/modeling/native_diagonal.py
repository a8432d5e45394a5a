"""The operators of a chunk of S4D on a CPU, forward and backward, by the library of native_diagonal_source.py.

It stands for diagonal_operators.py, its twin, as native_operators.py does for S4: of parameters in float32, and not in
graphs, for few channels, or where there is no compiler.

Shapes: H channels, N order of the real system, T chunk length.
"""

import ctypes

import torch

from .chunked import ChunkOperators, operator_shapes, with_skip
from .first_order import first_order
from .native_library import doubles, floats, for_c, library
from .native_operators import may_run, side_by_side, threads_for

SMALLEST = 1 << 11  # poles in all channels, 64 of 64 states, from which a run of a hundred steps gains a second


def is_for_the_library(parts: tuple[torch.Tensor, ...], setting: str) -> bool:
    """Whether `native_diagonal` is to run of log Lambda_bar and C B_bar. setting: S4Config's key `kernels`."""
    if parts[0].numel() < SMALLEST or not may_run(parts, setting):
        return False
    dtypes = [x.dtype for x in parts]
    return dtypes == [torch.float64] * 2 + [torch.float32] * 2 and library("diagonal") is not None


def native_diagonal(log_re, log_im, CB_re, CB_im, length: int, skip: torch.Tensor | None = None) -> ChunkOperators:
    """`power_operators` by the library."""
    taps, *others = _Operators.apply(length, log_re, log_im, CB_re, CB_im)
    return ChunkOperators(with_skip(taps, skip), *others)


class _Operators(torch.autograd.Function):
    @staticmethod
    def forward(ctx, length: int, *parts):
        parts = [x.contiguous() for x in parts]
        H, half = parts[0].shape
        ctx.save_for_backward(*parts)
        outputs = [floats(*shape) for shape in operator_shapes(H, length, 2 * half, dense=False)]
        _call("diagonal_operators", (H, half, length), *parts, *outputs)
        return tuple(outputs)

    @staticmethod
    @first_order
    def backward(ctx, of_taps, of_emit, of_inject, of_carry):
        parts = ctx.saved_tensors
        H, half = parts[0].shape
        found = [(doubles if x.dtype == torch.float64 else floats)(*x.shape) for x in parts]
        given = of_taps.contiguous(), *side_by_side(of_emit), *side_by_side(of_inject), of_carry.contiguous()
        _call("diagonal_operators_backward", (H, half, of_taps.shape[1]), *parts, *given, *found)
        return None, *found


def _call(name: str, sizes: tuple[int, int, int], *arguments) -> None:
    """A function of the library, with room and threads for it. The caller holds the tensors until it returns."""
    threads, (_, half, T) = threads_for(sizes[0]), sizes
    functions = library("diagonal")
    functions.diagonal_room.restype = ctypes.c_int64
    room = doubles(threads, functions.diagonal_room(*map(for_c, (half, T))))
    getattr(functions, name)(*map(for_c, (*sizes, *arguments, room, threads)))
