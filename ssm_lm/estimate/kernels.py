"""What the Triton kernels of training allocate and move, as stand-ins that run on tensors without data.

A stand-in has its kernel's signature and its tensors, and touches each as often as the kernel does: `.sum()` is one
read, `zeros` one write, a copy both. The kernels themselves need Triton, and a GPU to be timed on; to be counted they
need neither. triton_chunk_scan.py, triton_s5_scan.py and
triton_ssd_scan.py say what is counted here.
"""

import torch

from ..modeling.activations import ACTIVATIONS
from ..modeling.chunked import ChunkOperators, Implementation, Saved, operator_gradients, to_rows
from ..modeling.kernel_limits import chunks_in_a_row, segments
from ..modeling.ssd_chunks import since_start_of_chunks


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


# ---- SSD's scan: v, b and the states in two launches, of three, there and back


class _SSDScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v, b, c, angle, decay, step, state, has_output):
        (B, L, H), (E, T), N = v.shape, step.shape[-2:], b.shape[-1]
        turns, of_tokens = (angle.cos().float(), angle.sin().float()), (decay.float(), step.float())
        starts = v.new_zeros(B, -(-L // T), E, H // E, N, dtype=torch.float32)
        _read(v, b, state, starts, starts, *turns, *turns, *of_tokens, *of_tokens)
        starts.zero_()  # in the place of what the chunks add
        if has_output:
            _read(v, b, c)
        ctx.save_for_backward(v, b, c, angle, decay, step, starts)
        ctx.has_state = state is not None
        return torch.zeros_like(v) if has_output else v.new_zeros(0), v.new_zeros(B, H, N, dtype=torch.float32)

    @staticmethod
    def backward(ctx, grad_y, grad_final):
        v, b, c, angle, decay, step, starts = ctx.saved_tensors
        turns = angle.cos().float(), angle.sin().float()
        asked = torch.zeros_like(starts)
        _read(grad_y, c, grad_final, asked, asked.zero_(), *turns, *turns)
        grad_initial = torch.zeros_like(grad_final)
        _read(grad_y, b, c, asked, *turns)  # for grad_v, then of c's gradient and of b's
        _read(grad_y, v, b, c, starts, *turns)
        _read(grad_y, v, b, c, starts, asked, *turns)
        of_heads = v.new_zeros(2, *v.shape[:2], step.shape[-2], b.shape[-1], dtype=torch.float32)
        grad_v, (grad_b, grad_c) = torch.zeros_like(v), (part.sum(2).to(b.dtype) for part in of_heads)
        parts = of_heads[0, ..., ::2] * of_heads[1, ..., ::2]
        gradients = parts.sum() + torch.zeros_like(angle), torch.zeros_like(decay), torch.zeros_like(step)
        return grad_v, grad_b, grad_c, *gradients, grad_initial if ctx.has_state else None, None


def _ssd_scan(v, b, c, dt, decay, omega, state, begins, T, has_output=True):
    angle, total, step = since_start_of_chunks(dt, decay, omega, v.shape[1], T)
    return _SSDScan.apply(v, b, c, angle, total, step, state, has_output)


# operation -> what stands in for its kernel; the others, of mode fft and of decoding, are counted in plain PyTorch
STAND_INS = {
    "chunk_scan": Implementation(_forward, _backward, to_rows),
    "s5_scan": _s5_scan,
    "ssd_scan": _ssd_scan,
}
