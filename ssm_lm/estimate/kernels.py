"""What the Triton kernels of training allocate and move, as stand-ins that run on tensors without data.

A stand-in has its kernel's signature and its tensors, and touches each as often as the kernel does: `.sum()` is one
read, `zeros` one write, a copy both; `kernel_launches` says how many launches they are. The kernels themselves need
Triton, and a GPU to be timed on; to be counted they need neither. Each triton_NAME.py says what is counted here, and
the bytes are those of the report, bench/shipped/NAME.py.
"""

import torch

from ..modeling.activations import ACTIVATIONS
from ..modeling.chunked import ChunkOperators, Implementation, Saved, carry_gradient, operator_shapes, to_rows
from ..modeling.discrete import DiscreteDPLR
from ..modeling.kernel_launch import architecture, family
from ..modeling.kernel_limits import (
    VANDERMONDE_POLES,
    chunks_in_a_row,
    convolved_tokens,
    programs_of_a_norm,
    s5_chunk_length,
    segments,
)
from ..modeling.prefix_scans import gradient_of_logs
from ..modeling.ssd_chunks import heads_of, scan_by, sum_up_gradients, turns_of_chunks
from .trace import kernel_launches


def _read(*tensors: torch.Tensor | None) -> None:
    for tensor in tensors:
        if tensor is not None:
            tensor.sum()


# ---- the chunk scan


def _forward(u, operators: ChunkOperators, initial_state, wanted, save):
    (B, L, H), T, N, dense = u.shape, operators.taps.shape[-1], operators.inject.shape[1], operators.carry.dim() == 3
    kind = family(architecture(u.device))
    chunks = chunks_in_a_row(kind, B, L, T, N, dense, from_zero=initial_state is None)
    rows = _to_rows(u, chunks * T)
    with kernel_launches(1):
        _read(*_passes(rows, operators, chunks), *operators, initial_state)
        y = torch.zeros_like(rows) if wanted.has_output else None
        final = rows.new_zeros(B, H, N, dtype=torch.float32)
        starts = rows.new_zeros((H, B, chunks, N) if save else 0)
        keeps_before = save and wanted.has_output and wanted.activation != "identity"
        before = torch.zeros_like(rows) if keeps_before else rows.new_zeros(0)
    y = y[..., chunks * T - L :].permute(1, 2, 0) if wanted.has_output else None
    return y, final, Saved(rows, starts, before)


def _to_rows(sequence, size):
    """One launch, but for what lies in rows and is long enough."""
    B, L, H = sequence.shape
    if sequence.permute(2, 0, 1).is_contiguous():
        rows, pad = to_rows(sequence), size - L
        return torch.zeros(*rows.shape[:2], size, dtype=rows.dtype) if pad else rows
    with kernel_launches(1):
        _read(sequence)
        return sequence.new_zeros(H, B, size)


def _passes(rows, operators, chunks):
    """What is scanned, as often as it is read: twice where the states of segments are found first."""
    kind, N, dense = family(architecture(rows.device)), operators.inject.shape[1], operators.carry.dim() == 3
    return [rows] * (1 + (segments(kind, rows.shape[1], chunks, N, dense) > 1))


def _backward(saved: Saved, operators: ChunkOperators, wanted, grad_y, grad_final, length):
    rows, starts, before = saved
    (H, B, size), (T, N) = rows.shape, operators.emit.shape[1:]
    if grad_y is None:
        grad_y = torch.zeros_like(rows)
    else:
        grad_y = ACTIVATIONS[wanted.activation].backward(_to_rows(grad_y, size), before)
    # the scan in reverse, then the Gram product, which reads all four sequences
    with kernel_launches(2):
        _read(*_passes(grad_y, operators, starts.shape[2]), grad_final, *operators)
        grad_rows, driven = torch.zeros_like(rows), torch.zeros_like(starts)
        grad_initial = rows.new_zeros(B, H, N, dtype=torch.float32)
        _read(grad_y, driven, rows, starts)
        shapes = operator_shapes(H, T, N, dense=True)
        *of_operators, of_states = (rows.new_zeros(shape, dtype=torch.float32) for shape in shapes)
    grad_u = grad_rows[..., size - length :].permute(1, 2, 0)
    if not wanted.in_rows:
        with kernel_launches(1):
            grad_u = grad_u.contiguous()
    return grad_u, grad_initial, ChunkOperators(*of_operators, carry_gradient(of_states, operators.carry))


# ---- S5's scan: every launch over chunks reads what drives the states, one in two writes them; one makes the powers


class _S5Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, log_re, log_im, initial_state):
        with kernel_launches(4):
            _read(u, u, initial_state)
            _starts_of_s5(u, log_re)
            x, final = torch.zeros_like(u), u.new_zeros(len(u), u.shape[-1], dtype=torch.float32)
        ctx.save_for_backward(x, log_re, initial_state)
        return x, final

    @staticmethod
    def backward(ctx, grad_x, grad_final):
        x, log_re, initial_state = ctx.saved_tensors
        with kernel_launches(4):
            _read(grad_x, grad_x, grad_final, x)
            parts = _starts_of_s5(x, log_re).zero_()
            grad_u = torch.zeros_like(x)
            grad_initial = None if initial_state is None else torch.zeros_like(initial_state)
        return grad_u, *gradient_of_logs(parts, x.new_empty(x.shape[2], dtype=torch.float32)), grad_initial


def _starts_of_s5(u, log_re):
    """States where the chunks begin: written, then summed where they stand, then read."""
    B, L, P = u.shape
    _read(log_re, log_re, u.new_zeros(2, P, dtype=torch.float32))
    starts = u.new_zeros(B, -(-L // s5_chunk_length(L)), P, dtype=torch.float32)
    _read(starts, starts.zero_())
    return starts


def _s5_scan(u, log_re, log_im, initial_state=None, begins=None):
    return _S5Scan.apply(u, log_re, log_im, initial_state)


# ---- SSD's scan: v, b and the states in two launches, of three, there and back; and what makes the turns, b and c


def _turns(angle, decay, step, T):
    """Cosines and sines, decays and steps, of heads in one launch, or made of those of tokens."""
    if step.dim() > 1:
        *turns, decay, step = turns_of_chunks(angle, decay, step)
        return turns, (decay, step)
    (E, M), low = angle.shape, {"dtype": torch.float32}
    with kernel_launches(1):
        _read(angle, decay, step)
        return [angle.new_zeros(E, T, M, **low) for _ in range(2)], [angle.new_zeros(E, T, **low) for _ in range(2)]


class _SSDScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v, b, c, angle, decay, step, skip, state, begins, T, has_output, save):
        (B, L, H), E, N = v.shape, heads_of(step), b.shape[-1]
        turns, of_tokens = _turns(angle, decay, step, T)
        with kernel_launches(3 if has_output else 2):
            starts = v.new_zeros(B, -(-L // T), E, H // E, N)
            _read(v, b, state, starts, *turns, *turns, *of_tokens, *of_tokens)
            starts.zero_()  # in the place of what the chunks add
            if has_output:
                _read(v, b, c, skip, starts)
            y = torch.zeros_like(v) if has_output else v.new_zeros(0)
            final = v.new_zeros(B, H, N, dtype=torch.float32)
        ctx.save_for_backward(v, b, c, angle, decay, step, skip, starts)
        ctx.has_state, ctx.T = state is not None, T
        return y, final

    @staticmethod
    def backward(ctx, grad_y, grad_final):
        v, b, c, angle, decay, step, skip, starts = ctx.saved_tensors
        turns, _ = _turns(angle, decay, step, ctx.T)
        with kernel_launches(5):  # ends, carry, then those of v, c and b
            asked = torch.zeros_like(starts)
            _read(grad_y, c, grad_final, asked.zero_(), *turns, *turns)
            grad_initial = torch.zeros_like(grad_final)
            _read(grad_y, b, c, skip, asked, *turns)
            _read(grad_y, v, b, c, starts, *turns)
            _read(grad_y, v, b, c, starts, asked, *turns)
            B, K, E, P, N = starts.shape
            of_heads = v.new_zeros(2, *v.shape[:2], E, N)
            grad_v, T = torch.zeros_like(v), ctx.T
            sizes, low = ((P,), (T,), (T,), (N // 2,) if step.dim() == 1 else (T, N // 2)), {"dtype": torch.float32}
            grad_skip, grad_decay, grad_step, grad_angle = (v.new_zeros(B, K, E, *size, **low) for size in sizes)
            _read(grad_angle.zero_())
        is_shared = step.dim() == 1
        of_b, of_c, *of_system, of_skip = sum_up_gradients(
            of_heads, (grad_angle, grad_decay, grad_step), grad_skip, is_shared
        )
        if is_shared:
            with kernel_launches(1):
                _read(*of_system, angle, decay, step)
                of_system = angle.new_zeros(angle.shape), torch.zeros_like(decay), torch.zeros_like(step)
        gradients = of_b, of_c, *of_system, of_skip
        gradients = (x.to(like.dtype) for x, like in zip(gradients, (b, c, angle, decay, step, skip), strict=True))
        return grad_v, *gradients, grad_initial if ctx.has_state else None, None, None, None, None


def _ssd_scan(*scanned, **wanted):
    return scan_by(_SSDScan.apply, *scanned, makes_turns=True, **wanted)


class _SSDVectors(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *norms):
        ctx.save_for_backward(x, *norms)
        with kernel_launches(1):
            _read(x, *norms)
            b, c = (x.new_zeros(*x.shape[:-1], len(norms[0])) for _ in range(2))
        return b, c

    @staticmethod
    def backward(ctx, of_b, of_c):
        x, *norms = ctx.saved_tensors
        with kernel_launches(1):
            _read(of_b, of_c, x, norms[0], norms[2])
            N = len(norms[0])
            grad_x = x.new_zeros(x.shape)
            found = x.new_zeros(programs_of_a_norm(of_b.numel() // N, N), 4, N, dtype=torch.float32)
        return grad_x, *found.sum(0).to(norms[0].dtype)


def _ssd_vectors(x, *norms):
    return _SSDVectors.apply(x, *norms)


# ---- the short convolution


class _ShortConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, weight, bias, tail, begins, seq_idx, has_tail):
        (B, L, C), K = u.shape, weight.shape[1]
        ctx.save_for_backward(u, weight, bias, tail, begins, seq_idx)
        ctx.set_materialize_grads(False)
        with kernel_launches(1):
            _read(u, weight, bias, tail, begins, seq_idx)
            return u.new_zeros(B, L, C), u.new_zeros((B, K - 1, C) if has_tail else 0, dtype=torch.float32)

    @staticmethod
    def backward(ctx, grad_y, grad_tail):
        u, weight, bias, tail, begins, seq_idx = ctx.saved_tensors
        B, L, C = u.shape
        with kernel_launches(1):
            _read(grad_y, u, weight, bias, tail, begins, seq_idx)
            programs = B * convolved_tokens(B, L, C)[1]
            grad_u = u.new_zeros(B, L, C)
            of_weight, of_bias = (u.new_zeros(programs, *x.shape, dtype=torch.float32) for x in (weight, bias))
            grad_tail = None if tail is None else torch.zeros_like(tail)
        grad_weight, grad_bias = of_weight.sum(0).to(weight.dtype), of_bias.sum(0).to(bias.dtype)
        return grad_u, grad_weight, grad_bias, grad_tail, None, None, None


def _short_convolution(u, weight, bias, tail, begins, seq_idx, activation="identity", has_tail=True):
    y, new_tail = _ShortConvolution.apply(u, weight, bias, tail, begins, seq_idx, has_tail)
    return y, new_tail if has_tail else None


# ---- S4's system, and the operators of a chunk of it


class _DPLRDiscretization(torch.autograd.Function):
    @staticmethod
    def forward(ctx, log_dt, Lambda_log_re, Lambda_im, P, B, C):
        (H,), (rank, _, N) = log_dt.shape, P.shape
        ctx.save_for_backward(log_dt, Lambda_log_re, Lambda_im, P, B)
        with kernel_launches(1):
            _read(log_dt, Lambda_log_re, Lambda_im, P, B, C)
            shapes = (H, N), (H, N, rank), (H, N, rank), (H, N), (H, N)
            return tuple(log_dt.new_zeros(shape) for shape in shapes)

    @staticmethod
    def backward(ctx, *gradients):
        parameters = ctx.saved_tensors
        (H, N), (rank, S, _) = gradients[0].shape, parameters[3].shape
        with kernel_launches(1):
            _read(*parameters, *gradients)
            of_log_dt, of_C = torch.zeros_like(parameters[0]), torch.zeros_like(gradients[0])
            found = of_C.new_zeros(H, (2 + rank) * N)  # of what channels share
        if S == H:  # four tensors, each the parameter's own
            return of_log_dt, *map(torch.empty_like, parameters[1:]), of_C
        found = found.unflatten(0, (H // S, S)).sum(0)
        of_log_re, of_im, of_B, of_P = found.split([N // 2, N // 2, N, rank * N], 1)
        return of_log_dt, of_log_re, of_im, of_P.unflatten(1, (rank, N)).transpose(0, 1), of_B, of_C


def _dplr_discretization(*parameters):
    return DiscreteDPLR(*_DPLRDiscretization.apply(*parameters))


class _DPLROperators(torch.autograd.Function):
    @staticmethod
    def forward(ctx, E, F, G, B_bar, C_row, length, skip):
        H, N = E.shape
        with kernel_launches(1):
            _read(E, F, G, B_bar, C_row, skip)
            outputs = tuple(E.new_zeros(shape) for shape in operator_shapes(H, length, N, dense=True))
        ctx.save_for_backward(E, F, G, B_bar, C_row, outputs[1], outputs[2])
        return outputs

    @staticmethod
    def backward(ctx, of_taps, of_emit, of_inject, of_carry):
        E, F, G, B_bar, C_row, emit, inject = ctx.saved_tensors
        (H, T, N), rank = emit.shape, F.shape[2]
        with kernel_launches(2):  # of the carry, then the chains of products
            of_E, of_B, of_C = (torch.zeros_like(E) for _ in range(3))
            of_F, of_G = (torch.zeros_like(F, memory_format=torch.contiguous_format) for _ in range(2))
            rows, of_rows = (E.new_zeros(H, T, rank, N) for _ in range(2))
            _read(E, F, G, of_carry)
            _read(E, F, G, B_bar, C_row, emit, inject, rows, of_rows, of_taps, of_emit, of_inject, of_E, of_F)
            of_E.zero_(), of_F.zero_()  # added to
            of_skip = E.new_zeros(H)
        return of_E, of_F, of_G, of_B, of_C, None, of_skip if ctx.needs_input_grad[6] else None


def _dplr_operators(E, F, G, B_bar, C_row, length, skip):
    return ChunkOperators(*_DPLROperators.apply(E, F, G, B_bar, C_row, length, skip))


# ---- the RMS norm


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, gate, dtype, with_input):
        ctx.save_for_backward(x, weight, gate)
        with kernel_launches(1):
            _read(x, weight, gate)
            y = torch.zeros_like(x, dtype=dtype)
        return (y, x.view_as(x)) if with_input else y

    @staticmethod
    def backward(ctx, grad_y, grad_past=None):
        x, weight, gate = ctx.saved_tensors
        with kernel_launches(1):
            _read(grad_y, grad_past, x, weight, gate)
            grad_x = torch.zeros(x.shape, dtype=x.dtype)
            grad_gate = None if gate is None else torch.zeros(gate.shape, dtype=gate.dtype)
            programs = programs_of_a_norm(x.numel() // len(weight), len(weight))
            of_weight = x.new_zeros(programs, *weight.shape, dtype=torch.float32)
        return grad_x, of_weight.sum(0).to(weight.dtype), grad_gate, None, None


def _rms_norm(x, weight, eps, gate=None, dtype=None, with_input=False):
    return _RMSNorm.apply(x, weight, gate, dtype or x.dtype, with_input)


# ---- the loss of logits, whose gradient takes their place


def _logits_to_loss(z, targets, bias=None, gradient=True):
    with kernel_launches(1):
        _read(z, targets, bias, *[z] * gradient)
        nll = z.new_zeros(len(z), dtype=torch.float32)
        if gradient:
            z.zero_()
    return nll.sum(), z if gradient else None


# ---- S4D's system, and the operators of a chunk of it


class _DiagonalDiscretization(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *parameters):
        ctx.save_for_backward(*parameters)
        C = parameters[-1]
        with kernel_launches(1):
            _read(*parameters)
            dtypes = (torch.float64,) * 2 + (C.dtype,) * 2
            return tuple(C.new_zeros(len(C), C.shape[1] // 2, dtype=dtype) for dtype in dtypes)

    @staticmethod
    def backward(ctx, *gradients):
        log_dt, _, _, B, C = parameters = ctx.saved_tensors
        (H, N), S = C.shape, len(B)
        with kernel_launches(1):
            _read(*parameters, *gradients)
            of_log_dt, of_C = torch.zeros_like(log_dt), torch.zeros_like(C)
            found = C.new_zeros(H, 2 * N)  # of what channels share
        if S == H:  # three tensors, each the parameter's own
            return of_log_dt, *map(torch.empty_like, parameters[1:4]), of_C
        return of_log_dt, *found.unflatten(0, (H // S, S)).sum(0).split([N // 2, N // 2, N], 1), of_C


def _diagonal_discretization(*parameters_and_method):
    return _DiagonalDiscretization.apply(*parameters_and_method[:5])


class _DiagonalOperators(torch.autograd.Function):
    @staticmethod
    def forward(ctx, log_re, log_im, CB_re, CB_im, length, skip):
        ctx.save_for_backward(log_re, log_im, CB_re, CB_im)
        H, half = CB_re.shape
        with kernel_launches(1):
            _read(log_re, log_im, CB_re, CB_im, skip)
            return tuple(CB_re.new_zeros(shape) for shape in operator_shapes(H, length, 2 * half, dense=False))

    @staticmethod
    def backward(ctx, *gradients):
        with kernel_launches(1):
            _read(*ctx.saved_tensors, *gradients)
            found, of_skip = map(torch.zeros_like, ctx.saved_tensors), gradients[0].new_zeros(len(gradients[0]))
            return *found, None, of_skip if ctx.needs_input_grad[5] else None


def _diagonal_operators(log_re, log_im, CB_re, CB_im, length, skip):
    return ChunkOperators(*_DiagonalOperators.apply(log_re, log_im, CB_re, CB_im, length, skip))


# ---- of the mode fft: what makes a convolution's kernel, complex numbers at the nodes, or the taps


class _Cauchy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, C, B, P, Lambda_re, Lambda_im, dt, nodes):
        ctx.save_for_backward(C, B, P, Lambda_re, Lambda_im, dt)
        with kernel_launches(1):
            _read(C, B, P, Lambda_re, Lambda_im, dt, nodes)
            return C.new_zeros(len(C), (1 + len(P)) ** 2, len(nodes), 2)

    @staticmethod
    def backward(ctx, grad):
        C, _, P, *_ = ctx.saved_tensors
        with kernel_launches(1):
            _read(grad, *ctx.saved_tensors)
            sums = C.new_zeros(len(C), 9 if len(P) == 1 else 16, C.shape[-1] // 2)
        _read(sums)
        return *(torch.zeros_like(x) for x in ctx.saved_tensors), None


def _cauchy(C, B, P, Lambda_re, Lambda_im, dt, nodes):
    out = torch.view_as_complex(_Cauchy.apply(C, B, P, Lambda_re, Lambda_im, dt, nodes))
    return out.unflatten(1, (1 + len(P), 1 + len(P)))


class _Vandermonde(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v_re, v_im, log_re, log_im, length):
        ctx.save_for_backward(v_re, v_im, log_re, log_im)
        rates = log_re.float(), log_im.double()
        with kernel_launches(1):
            _read(v_re, v_im, *rates)
            return v_re.new_zeros(len(v_re), length)

    @staticmethod
    def backward(ctx, grad):
        v_re, _, log_re, log_im = ctx.saved_tensors
        rates = log_re.float(), log_im.double()
        with kernel_launches(1):
            _read(*[grad] * -(-v_re.shape[1] // VANDERMONDE_POLES), *rates)
            sums = v_re.new_zeros(len(v_re), 4, v_re.shape[1])
        _read(sums)
        return *(torch.zeros_like(x) for x in ctx.saved_tensors), None


def _vandermonde(v_re, v_im, log_re, log_im, length):
    return _Vandermonde.apply(v_re, v_im, log_re, log_im, length)


# ---- the layer norm, and dropout


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, dtype, turned):
        ctx.save_for_backward(x, weight)
        ctx.turned = turned
        with kernel_launches(1):
            _read(x, weight, bias)
            y = torch.zeros_like(x, dtype=dtype)
        return y.view(x.shape[-1], *x.shape[:-1]).movedim(0, -1) if turned else y, x.view_as(x)

    @staticmethod
    def backward(ctx, grad_y, grad_past):
        x, weight = ctx.saved_tensors
        if ctx.turned:
            grad_y = grad_y.movedim(-1, 0).contiguous()
        with kernel_launches(1):
            _read(grad_y, grad_past, x, weight)
            C = x.shape[-1]
            grad_x = torch.zeros_like(x)
            found = x.new_zeros(programs_of_a_norm(x.numel() // C, C, ctx.turned), 2, C, dtype=torch.float32)
        return grad_x, *found.sum(0).to(weight.dtype), None, None


def _layer_norm(x, weight, bias, eps, dtype, turned):
    return _LayerNorm.apply(x, weight, bias, dtype, turned)


class _Elementwise(torch.autograd.Function):
    """Of inputs of one shape, which are kept and read again in the backward."""

    @staticmethod
    def forward(ctx, *inputs):
        ctx.save_for_backward(*inputs)
        with kernel_launches(1):
            _read(*inputs)
            return torch.zeros_like(inputs[0])

    @staticmethod
    def backward(ctx, grad_y):
        with kernel_launches(1):
            _read(grad_y, *ctx.saved_tensors)
            return tuple(map(torch.zeros_like, ctx.saved_tensors))


def _drop_activated(x, activation, p):
    return _Elementwise.apply(x)


def _drop_swiglu(gate, up, p):
    return _Elementwise.apply(gate, up)


class _DropGated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, residual, x, bias):
        ctx.save_for_backward(x, bias)
        with kernel_launches(1):
            _read(residual, x, bias)
            return torch.zeros_like(residual)

    @staticmethod
    def backward(ctx, grad_y):
        x, bias = ctx.saved_tensors
        with kernel_launches(1):
            _read(grad_y, x, bias)
            C = grad_y.shape[-1]
            grad_x = torch.zeros_like(x)
            found = x.new_zeros(programs_of_a_norm(grad_y.numel() // C, C), 2 * C, dtype=torch.float32)
        return grad_y, grad_x, found.sum(0).to(bias.dtype)


def _drop_gated(residual, x, bias, p):
    return _DropGated.apply(residual, x, bias)


class _DropAdded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, residual, x):
        ctx.dtype = x.dtype
        with kernel_launches(1):
            _read(residual, x)
            return torch.zeros_like(residual)

    @staticmethod
    def backward(ctx, grad_y):
        with kernel_launches(1):
            _read(grad_y)
            return grad_y, torch.zeros_like(grad_y, dtype=ctx.dtype)


def _drop_added(residual, x, p):
    return _DropAdded.apply(residual, x)


# operation -> what stands in for its kernel; that of a step of decoding is not asked for in training
STAND_INS = {
    "chunk_scan": Implementation(_forward, _backward, to_rows),
    "s5_scan": _s5_scan,
    "ssd_scan": _ssd_scan,
    "ssd_system": _ssd_vectors,
    "short_convolution": _short_convolution,
    "diagonal_discretization": _diagonal_discretization,
    "diagonal_operators": _diagonal_operators,
    "dplr_discretization": _dplr_discretization,
    "dplr_operators": _dplr_operators,
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "dropout": (_drop_activated, _drop_gated, _drop_added, _drop_swiglu),
    "cross_entropy": _logits_to_loss,
    "cauchy": _cauchy,
    "vandermonde": _vandermonde,
}
