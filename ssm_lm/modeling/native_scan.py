"""The chunk scan of S4 and S4D on a CPU, forward and backward, by the library of native_scan_source.py.

It stands for chunked.py, its twin, in float32, for real signals, where the operators come from C too: a channel's
chunks stay in cache through all products, and no matrix passes by once a chunk. A channel's numbers do not depend on
how many threads there are.
"""

import ctypes

import torch

from .activations import ACTIVATIONS
from .chunked import PLAIN, ChunkOperators, Implementation, Saved, Wanted, operator_gradients
from .native_library import floats, for_c, library
from .native_operators import threads_for


def forward(u, operators: ChunkOperators, initial_state, wanted: Wanted, save: bool):
    """See `chunked.Implementation`; what is saved lies as the twin's does."""
    (B, L, H), (N, T) = u.shape, operators.inject.shape[1:]
    u, final = u.contiguous(), floats(B, H, N)
    y = floats(B, L, H) if wanted.has_output else None
    starts = floats(H, L // T, B, N) if save else None
    given = (*_contiguous(operators), _as_bytes(wanted.keep), _or_none(initial_state))
    _call("scan", (B, H, N, T, L // T), _is_diagonal(operators), u, *given, y, final, starts)
    saved = u.new_empty(0) if starts is None else starts
    if not wanted.has_output or wanted.activation == "identity":
        return y, final, Saved(u, saved, None)
    return ACTIVATIONS[wanted.activation].function(y), final, Saved(u, saved, y)


def backward(saved: Saved, operators: ChunkOperators, wanted: Wanted, grad_y, grad_final, length: int):
    """See `chunked.Implementation`."""
    if grad_y is None:
        return PLAIN.backward(saved, operators, wanted, grad_y, grad_final, length)
    u, starts, before = saved
    (B, L, H), (N, T) = u.shape, operators.inject.shape[1:]
    grad_y = ACTIVATIONS[wanted.activation].backward(grad_y, before).contiguous()
    found = grad_u, grad_state, of_taps, gram = floats(B, L, H), floats(B, H, N), floats(H, T), floats(H, T + N, T + N)
    given = (*_contiguous(operators), _as_bytes(wanted.keep), grad_y, _or_none(grad_final))
    _call("scan_backward", (B, H, N, T, L // T), _is_diagonal(operators), u, *given, *found, starts)
    return grad_u, grad_state, operator_gradients(gram, of_taps, operators.carry)


NATIVE = Implementation(forward, backward, PLAIN.to_rows)


def _is_diagonal(operators: ChunkOperators) -> int:
    return int(operators.carry.dim() == 2)


def _contiguous(tensors) -> list[torch.Tensor]:
    return [x.contiguous() for x in tensors]


def _or_none(state: torch.Tensor | None) -> torch.Tensor | None:
    return None if state is None else state.contiguous()


def _as_bytes(keep: torch.Tensor | None) -> torch.Tensor | None:
    return None if keep is None else keep.to(torch.uint8).contiguous()


def _call(name: str, sizes: tuple[int, int, int, int, int], *arguments) -> None:
    functions, (B, H, N, T, chunks) = library("operators"), sizes
    functions.scan_room.restype = ctypes.c_int64
    threads = threads_for(H)
    room = floats(threads, functions.scan_room(*map(for_c, (B, N, T, chunks))))
    getattr(functions, name)(*map(for_c, (*sizes, *arguments, room, threads)))
