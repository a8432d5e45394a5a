"""The operators of a chunk of S4 on a CPU, forward and backward, by the library of native_operators_source.py.

It stands for dplr_operators.py, its twin, whose squarings of dense matrices take ten times as long; it is used in
float32, with the switch of all kernels on "auto". In graphs that are compiled or exported, in other dtypes, for few
channels and where there is no compiler, the twin runs. A channel's numbers do not depend on how many threads there are,
or on the other channels.

Shapes: H channels, N order of the real system, T chunk length.
"""

import ctypes
from collections.abc import Sequence

import torch
from torch import nn

from .chunked import ChunkOperators, operator_shapes
from .discrete import DiscreteDPLR
from .first_order import first_order
from .kernels_s4 import in_force
from .native_library import floats, for_c, library, number_of_threads

MOST_RANK = 4  # of the source
# numbers of A_bar in all channels, 64 of 64 states, from which a run of a hundred steps gains what a compiler takes
SMALLEST = 1 << 18


def may_run(read: Sequence[torch.Tensor], setting: str) -> bool:
    """Whether C may take these tensors: on a CPU, in no graph or transform. setting: S4Config's key `kernels`."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or in_force(setting) != "auto":
        return False
    # torch.func and derivatives forward ask more of an operation than its gradient
    if torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0:
        return False
    # a subclass may be a tensor without numbers
    return all(type(x) in (torch.Tensor, nn.Parameter) and x.device.type == "cpu" for x in read)


def threads_for(channels: int) -> int:
    """How many share them: see `number_of_threads`."""
    return min(number_of_threads(), channels)


def side_by_side(x: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    """A matrix of each channel, whose numbers lie side by side in a row, and how far channels and rows are apart."""
    x = x if x.stride(2) == 1 else x.contiguous()
    return x, *x.stride()[:2]


def is_for_the_library(discrete: DiscreteDPLR, skip: torch.Tensor | None, setting: str) -> bool:
    """Whether `native_operators` is to run. setting: S4Config's key `kernels`."""
    H, N, rank = discrete.F.shape
    return rank <= MOST_RANK and takes(discrete if skip is None else (*discrete, skip), H, N, setting)


def takes(read: Sequence[torch.Tensor], H: int, N: int, setting: str, name: str = "operators") -> bool:
    """Whether the library `name` is there, and for these tensors, of so many channels of so many states."""
    if H * N * N < SMALLEST or any(x.dtype != torch.float32 for x in read) or not may_run(read, setting):
        return False
    return library(name) is not None


def native_operators(discrete: DiscreteDPLR, length: int, skip: torch.Tensor | None = None) -> ChunkOperators:
    """`krylov_operators` by the library."""
    return ChunkOperators(*_Operators.apply(length, skip, *discrete))


class _Operators(torch.autograd.Function):
    @staticmethod
    def forward(ctx, length: int, skip: torch.Tensor | None, *discrete):
        discrete = [x.contiguous() for x in discrete]
        H, N, rank = discrete[1].shape
        ctx.save_for_backward(*discrete)
        outputs = [floats(*shape) for shape in operator_shapes(H, length, N, dense=True)]
        _call("operators", (H, N, rank, length), *discrete, None if skip is None else skip.contiguous(), *outputs)
        return tuple(outputs)

    @staticmethod
    @first_order
    def backward(ctx, of_taps, of_emit, of_inject, of_carry):
        discrete = ctx.saved_tensors
        H, N, rank = discrete[1].shape
        found = [floats(*x.shape) for x in discrete]
        given = [of_taps.contiguous()]
        for x in (of_emit, of_inject, of_carry):
            given += side_by_side(x)
        _call("operators_backward", (H, N, rank, of_taps.shape[1]), *discrete, *given, *found)
        return None, of_taps[:, 0].clone() if ctx.needs_input_grad[1] else None, *found


def _call(name: str, sizes: tuple[int, int, int, int], *arguments) -> None:
    """A function of the library, with room and threads for it. The caller holds the tensors until it returns."""
    functions = library("operators")
    functions.operators_room.restype = ctypes.c_int64
    threads = threads_for(sizes[0])
    room = floats(threads, functions.operators_room(*map(for_c, sizes[1:])))
    getattr(functions, name)(*map(for_c, (*sizes, *arguments, room, threads)))
