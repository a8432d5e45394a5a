"""SSD's chunk scan on a CPU, forward and backward, by the library of native_ssd_source.py.

It stands for ssd_chunks.py, its twin, in float32: a head's chunk stays in cache through all products, and no matrix of
pairs of tokens passes by. A head's numbers do not depend on how many threads there are. It is used where S4's operators
come from C too; see native_operators.py.
"""

import ctypes

import torch

from .first_order import first_order
from .kernel_launch import in_rows
from .native_library import doubles, floats, for_c, library
from .native_operators import threads_for
from .ssd_chunks import numbers_of_documents, scan_by, sum_up_gradients, turns_of_chunks


def native_ssd_scan(*scanned, **wanted) -> tuple[torch.Tensor | None, torch.Tensor]:
    """`scan_vectors` by the library."""
    return scan_by(_Scan.apply, *scanned, **wanted)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v, b, c, angle, decay, step, skip, state, begins, T, has_output, save):
        (B, L, H), N, E = v.shape, b.shape[-1], step.shape[-2]
        system, numbers = turns_of_chunks(angle, decay, step), numbers_of_documents(begins, T)
        y, final = floats(B, L, H) if has_output else None, floats(B, H, N)
        starts = floats(B, E, -(-L // T) + 1, N, H // E) if save else None
        read = v, b.contiguous(), c.contiguous(), *system, skip.contiguous(), numbers, starts
        _call("ssd_scan", read, None if state is None else state.contiguous(), y, final)
        ctx.set_materialize_grads(False)
        ctx.has_state = state is not None
        ctx.save_for_backward(*read)
        return y, final

    @staticmethod
    @first_order
    def backward(ctx, grad_y, grad_final):
        v, b, _, _, _, _, step, *_ = read = ctx.saved_tensors
        (B, L, H), N, (E, T) = v.shape, b.shape[-1], step.shape[-2:]
        is_shared = step.dim() == 2
        chunks = 1 if is_shared else -(-L // T)
        grad_v, grad_state, of_heads = floats(B, L, H), floats(B, H, N), floats(2, B, L, E, N)
        of_operators = floats(B, chunks, E, T, N // 2), doubles(B, chunks, E, T), floats(B, chunks, E, T)
        of_skip = floats(B, 1, E, H // E)
        grad_y = torch.zeros_like(v) if grad_y is None else grad_y
        of_outputs = grad_y.contiguous(), None if grad_final is None else grad_final.contiguous()
        _call("ssd_scan_backward", read, *of_outputs, grad_v, grad_state, of_heads, *of_operators, of_skip)
        of_b, of_c, *rest, of_skip = sum_up_gradients(of_heads, of_operators, of_skip, is_shared)
        rest = (x.double() for x in rest)
        of_state = grad_state if ctx.has_state else None
        return grad_v, of_b, of_c, *rest, of_skip, of_state, None, None, None, None


def _call(name: str, read, *arguments) -> None:
    """A function of the library, with room and threads for it. The caller holds the tensors until it returns."""
    v, b, _, _, _, _, step, *_ = read
    (v, row), (B, L, H), N, (E, T) = in_rows(v), v.shape, b.shape[-1], step.shape[-2:]
    functions, sizes = library("ssd"), (B, L, E, H // E, N, T, -(-L // T), int(step.dim() == 2), row)
    room_of = getattr(functions, f"{name}_room")
    room_of.restype = ctypes.c_int64
    threads = threads_for(B * E)
    room = floats(threads, room_of(*map(for_c, (H // E, N, T))))
    getattr(functions, name)(*map(for_c, (*sizes, v, *read[1:], *arguments, room, threads)))
