"""What the Triton kernels of training allocate and move, as stand-ins that run on tensors without data.

A stand-in has its kernel's signature and its tensors, and touches each as often as the kernel does: `.sum()` is one
read, `zeros` one write, a copy both. The kernels themselves need Triton, and a GPU to be timed on; to be counted they
need neither. triton_chunk_scan.py and triton_s5_scan.py say what is counted here.
"""

import torch

from ..modeling.activations import ACTIVATIONS
from ..modeling.chunked import ChunkOperators, Implementation, Saved, operator_gradients, to_rows
from ..modeling.kernel_limits import chunks_in_a_row, segments


def _read(*tensors: torch.Tensor | None) -> None:
    for tensor in tensors:
        if tensor is not None:
            tensor.sum()


# ---- the chunk scan


def _forward(u, operators: ChunkOperators, initial_state, wanted, save):
    (B, L, H), T, N, dense = u.shape, operators.taps.shape[-1], operators.inject.shape[1], operators.carry.dim() == 3
    chunks = chunks_in_a_row(B, L, T, N, dense, from_zero=initial_state is None)
    rows = _to_rows(u, chunks * T)
    _read(rows, *operators, initial_state)
    _read_by_segments(rows, chunks, N, dense)
    y = torch.zeros_like(rows) if wanted.has_output else None
    final = rows.new_zeros(B, H, N, dtype=torch.float32)
    starts = rows.new_zeros((H, B, chunks, N) if save else 0)
    keeps_before = save and wanted.has_output and wanted.activation != "identity"
    before = torch.zeros_like(rows) if keeps_before else rows.new_zeros(0)
    y = y[..., chunks * T - L :].permute(1, 2, 0) if wanted.has_output else None
    return y, final, Saved(rows, starts, before)


def _to_rows(sequence, size):
    rows, pad = to_rows(sequence), size - sequence.shape[1]
    return torch.zeros(*rows.shape[:2], size, dtype=rows.dtype) if pad else rows


def _read_by_segments(rows, chunks, N, dense):
    """The pass without output, and the states that are linked."""
    H, B, _ = rows.shape
    if (G := segments(B, chunks, N, dense)) > 1:
        ends, starts = (rows.new_zeros(B, G, H, N, dtype=torch.float32) for _ in range(2))
        _read(rows, ends, starts)


def _backward(saved: Saved, operators: ChunkOperators, wanted, grad_y, grad_final, length):
    rows, starts, before = saved
    (H, B, size), (T, N) = rows.shape, operators.emit.shape[1:]
    if grad_y is None:
        grad_y = torch.zeros_like(rows)
    else:
        grad_y = ACTIVATIONS[wanted.activation].backward(_to_rows(grad_y, size), before)
    # the scan in reverse, then the Gram product, which reads all four sequences
    _read(grad_y, grad_final, *operators)
    _read_by_segments(grad_y, starts.shape[2], N, operators.carry.dim() == 3)
    grad_rows, driven = torch.zeros_like(rows), torch.zeros_like(starts)
    grad_initial = rows.new_zeros(B, H, N, dtype=torch.float32)
    _read(grad_y, driven, rows, starts)
    gram = rows.new_zeros(H, T + N, T + N, dtype=torch.float32)
    gradients = operator_gradients(gram, operators.taps, operators.carry)
    return grad_rows[..., size - length :].permute(1, 2, 0).contiguous(), grad_initial, gradients


# ---- S5's scan: every launch over chunks reads what drives the states, one in two writes them


class _S5Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, log_re, log_im, initial_state):
        _read(u, u, initial_state)
        x, final = torch.zeros_like(u), u.new_zeros(len(u), u.shape[-1], dtype=torch.float32)
        ctx.save_for_backward(x, log_re, initial_state)
        return x, final

    @staticmethod
    def backward(ctx, grad_x, grad_final):
        x, log_re, initial_state = ctx.saved_tensors
        _read(grad_x, grad_x, grad_final, x)
        grad_initial = None if initial_state is None else torch.zeros_like(initial_state)
        return torch.zeros_like(x), torch.zeros_like(log_re), torch.zeros_like(log_re), grad_initial


def _s5_scan(u, log_re, log_im, initial_state=None, begins=None):
    return _S5Scan.apply(u, log_re, log_im, initial_state)


# operation -> what stands in for its kernel; the others, of mode fft and of decoding, are counted in plain PyTorch
STAND_INS = {"chunk_scan": Implementation(_forward, _backward, to_rows), "s5_scan": _s5_scan}
