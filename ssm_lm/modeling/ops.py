"""What an LTI state space layer is made of, in plain PyTorch: chunk scan, FFT convolution, Cauchy and Vandermonde.

Shapes: B batch, L length, H channels (hidden_size), N order of the real system (state_size), T chunk length.
A complex number of a state is kept as two real ones: a state vector (..., N) is [real parts | imaginary parts] of the
N/2 states whose conjugates are implied. Everything runs in the dtype of its inputs, float32 or float64.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F


class ChunkOperators(NamedTuple):
    """What a chunk of T tokens does to its input u and to the state h at its start:

        y_chunk = toeplitz(taps) u_chunk + emit h + (D u: not here)
        h_next  = inject u_chunk         + carry h

    taps (H, T); emit (H, T, N); inject (H, N, T); carry is A-bar^T: dense (H, N, N), or diagonal and complex (H, N)
    as [real | imaginary].
    """

    taps: torch.Tensor
    emit: torch.Tensor
    inject: torch.Tensor
    carry: torch.Tensor


def toeplitz(taps: torch.Tensor) -> torch.Tensor:
    """taps (H, T) -> (H, T, T) lower triangular, entry [i, j] = taps[i - j]: the causal convolution within a chunk."""
    length = taps.shape[-1]
    windows = F.pad(taps, (length - 1, 0)).unfold(-1, length, 1)  # [i, m] = taps[i + m - (T-1)]
    return windows.flip(-1)


def apply_diagonal(diagonal: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """Complex product of two vectors in real form: diagonal (..., N) times state (..., N)."""
    dr, di = diagonal.chunk(2, -1)
    sr, si = state.chunk(2, -1)
    return torch.cat([dr * sr - di * si, dr * si + di * sr], -1)


class _ChunkRecurrence(torch.autograd.Function):
    """h_{c+1} = carry h_c + x_c over the chunks c, with the backward written out.

    The gradient of a linear recurrence is the same recurrence, transposed and run in reverse:
        g_c = grad h_c + carry^T g_{c+1},   grad x_c = g_{c+1},   grad carry = sum_c g_{c+1} h_c^T
    Left to autograd, the loop's slices would each write a full-size zero gradient: quadratic in the length.
    """

    @staticmethod
    def forward(ctx, x, carry, initial_state):
        states = x.new_empty(x.shape[0] + 1, *x.shape[1:])  # (chunks + 1, H, B, N)
        states[0] = initial_state
        dense = carry.dim() == 3
        carry_t = carry.transpose(-1, -2) if dense else carry.unsqueeze(1)
        for c in range(x.shape[0]):
            if dense:
                torch.baddbmm(x[c], states[c], carry_t, out=states[c + 1])
            else:
                torch.add(apply_diagonal(carry_t, states[c]), x[c], out=states[c + 1])
        ctx.save_for_backward(states, carry)
        return states

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_states):
        states, carry = ctx.saved_tensors
        dense = carry.dim() == 3
        if not dense:
            cr, ci = carry.unsqueeze(1).chunk(2, -1)
            conjugate = torch.cat([cr, -ci], -1)
        grad_x = torch.empty_like(states[1:])
        g = grad_states[-1]
        for c in range(states.shape[0] - 2, -1, -1):
            grad_x[c] = g
            g = torch.baddbmm(grad_states[c], g, carry) if dense else grad_states[c] + apply_diagonal(conjugate, g)
        if dense:
            rows = grad_x.transpose(0, 1).flatten(1, 2)  # (H, chunks * B, N)
            grad_carry = rows.transpose(1, 2) @ states[:-1].transpose(0, 1).flatten(1, 2)
        else:
            gr, gi = grad_x.chunk(2, -1)
            sr, si = states[:-1].chunk(2, -1)
            grad_carry = torch.cat([(gr * sr + gi * si).sum((0, 2)), (gi * sr - gr * si).sum((0, 2))], -1)
        return grad_x, grad_carry, g


def chunk_states(u: torch.Tensor, operators: ChunkOperators, initial_state: torch.Tensor) -> torch.Tensor:
    """The states at the chunks' borders.

    u: (H, chunks, B, T), initial_state: (B, H, N) -> (chunks + 1, H, B, N), the first of them the initial state.
    """
    H, chunks, B, T = u.shape
    driven = u.reshape(H, chunks * B, T) @ operators.inject.transpose(1, 2)  # (H, chunks * B, N)
    driven = driven.view(H, chunks, B, driven.shape[-1]).transpose(0, 1).contiguous()
    return _ChunkRecurrence.apply(driven, operators.carry, initial_state.transpose(0, 1))


def to_chunks(u: torch.Tensor, chunk_size: int) -> torch.Tensor:
    """u (B, L, H), L a multiple of the chunk -> (H, chunks, B, T), contiguous."""
    B, L, H = u.shape
    return u.view(B, L // chunk_size, chunk_size, H).permute(3, 1, 0, 2).contiguous()


def chunk_scan(
    u: torch.Tensor, operators: ChunkOperators, initial_state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run an LTI state space over u in chunks: O(L), matmuls within a chunk and one small recurrence between them.

    u: (B, L, H) with L a multiple of the operators' T; initial_state: (B, H, N).
    Returns y (B, L, H), without D u, and the final state (B, H, N).
    """
    B, L, H = u.shape
    T = operators.taps.shape[-1]
    chunks = to_chunks(u, T)
    states = chunk_states(chunks, operators, initial_state)
    starts = states[:-1].transpose(0, 1).flatten(1, 2)  # (H, chunks * B, N)
    within = chunks.flatten(1, 2) @ toeplitz(operators.taps).transpose(1, 2)
    y = torch.baddbmm(within, starts, operators.emit.transpose(1, 2))
    y = y.view(H, L // T, B, T).permute(2, 1, 3, 0).reshape(B, L, H)
    return y, states[-1].transpose(0, 1)


def fft_convolution(u: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """Causal convolution y_t = sum_{s <= t} kernel_{t-s} u_s by FFT. u (B, L, H), kernel (H, L) -> (B, L, H)."""
    L = u.shape[1]
    size = 1 << (2 * L - 1).bit_length()  # zero-padded so that the circular convolution is a linear one
    spectrum = torch.fft.rfft(u.transpose(1, 2), n=size) * torch.fft.rfft(kernel, n=size)
    return torch.fft.irfft(spectrum, n=size)[..., :L].transpose(1, 2)


class _Cauchy(torch.autograd.Function):
    """See `cauchy`. Works through the nodes in blocks, in real arithmetic; recomputes the matrix in the backward."""

    # nodes a block: large enough for a matmul, small enough that (H, block, N) stays in tens of megabytes
    block_elements = 1 << 20

    @staticmethod
    def _blocks(nodes, Lambda_im):
        size = max(1, _Cauchy.block_elements // max(1, Lambda_im.numel()))
        return [slice(start, min(start + size, len(nodes))) for start in range(0, len(nodes), size)]

    @staticmethod
    def _resolvents(nodes, Lambda_re, Lambda_im):
        """1/(i s - Lambda) and 1/(i s - conj Lambda), as four real tensors (H, block, N/2).

        Two separate divisions: their sum as one fraction has |Lambda|^2 - s^2 in it, which cancels near a pole.
        """
        a = -Lambda_re[:, None]
        minus = nodes[:, None] - Lambda_im[:, None]
        plus = nodes[:, None] + Lambda_im[:, None]
        d1, d2 = 1 / (a * a + minus * minus), 1 / (a * a + plus * plus)
        return a * d1, -minus * d1, a * d2, -plus * d2

    @staticmethod
    def forward(ctx, v_re, v_im, nodes, Lambda_re, Lambda_im):
        ctx.save_for_backward(v_re, v_im, nodes, Lambda_re, Lambda_im)
        v = torch.cat([v_re, v_im], -1).transpose(1, 2)  # (H, N, M)
        out_re = v_re.new_empty(v_re.shape[0], len(nodes), v_re.shape[1])
        out_im = torch.empty_like(out_re)
        for block in _Cauchy._blocks(nodes, Lambda_im):
            r1, i1, r2, i2 = _Cauchy._resolvents(nodes[block], Lambda_re, Lambda_im)
            out_re[:, block] = torch.cat([r1 + r2, i2 - i1], -1) @ v
            out_im[:, block] = torch.cat([i1 + i2, r1 - r2], -1) @ v
        return out_re.transpose(1, 2), out_im.transpose(1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_re, grad_im):
        v_re, v_im, nodes, Lambda_re, Lambda_im = ctx.saved_tensors
        half = v_re.shape[-1]
        grad_v = v_re.new_zeros(v_re.shape[0], 2 * half, v_re.shape[1])
        grad_lambda_re, grad_lambda_im = torch.zeros_like(Lambda_re), torch.zeros_like(Lambda_im)
        for block in _Cauchy._blocks(nodes, Lambda_im):
            r1, i1, r2, i2 = _Cauchy._resolvents(nodes[block], Lambda_re, Lambda_im)
            gr, gi = grad_re[:, :, block], grad_im[:, :, block]  # (H, M, block)
            grad_v += torch.cat([r1 + r2, i2 - i1], -1).transpose(1, 2) @ gr.transpose(1, 2)
            grad_v += torch.cat([i1 + i2, r1 - r2], -1).transpose(1, 2) @ gi.transpose(1, 2)
            # d out / d Lambda = v / (i s - Lambda)^2 and its conjugate twin; q = sum over M of conj(grad) v
            gr, gi = gr.transpose(1, 2), gi.transpose(1, 2)
            rr, ii, ri, ir = gr @ v_re, gi @ v_im, gr @ v_im, gi @ v_re
            q1r, q1i, q2r, q2i = rr + ii, ri - ir, rr - ii, -ri - ir
            s1r, s1i, s2r, s2i = r1 * r1 - i1 * i1, 2 * r1 * i1, r2 * r2 - i2 * i2, 2 * r2 * i2
            grad_lambda_re += (q1r * s1r - q1i * s1i + q2r * s2r - q2i * s2i).sum(1)
            grad_lambda_im += (q2r * s2i + q2i * s2r - q1r * s1i - q1i * s1r).sum(1)
        grad_v = grad_v.transpose(1, 2)
        return grad_v[..., :half], grad_v[..., half:], None, grad_lambda_re, grad_lambda_im


def cauchy(
    v_re: torch.Tensor, v_im: torch.Tensor, nodes: torch.Tensor, Lambda_re: torch.Tensor, Lambda_im: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The conjugate-symmetric Cauchy product at nodes on the imaginary axis, without an (H, N, L) tensor:

        out[h, m, l] = sum_n  v[h, m, n] / (i s_l - Lambda[h, n])  +  conj(v[h, m, n]) / (i s_l - conj(Lambda[h, n]))

    v_re, v_im: (H, M, N/2); nodes s: (L,) real; Lambda_re (< 0), Lambda_im: (H, N/2). No gradient for the nodes.
    Returns the real and the imaginary part, (H, M, L) each.
    """
    return _Cauchy.apply(v_re, v_im, nodes, Lambda_re, Lambda_im)


def powers(log_re: torch.Tensor, log_im: torch.Tensor, exponents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """exp(exponent * (log_re + i log_im)) as its real and imaginary part, in float64.

    The phase log_im * exponent reaches thousands of radians; in float32 it would keep three digits of the angle.
    """
    exponents = exponents.to(torch.float64)
    magnitude, phase = torch.exp(log_re.double() * exponents), log_im.double() * exponents
    return magnitude * torch.cos(phase), magnitude * torch.sin(phase)


def vandermonde(
    v_re: torch.Tensor, v_im: torch.Tensor, log_re: torch.Tensor, log_im: torch.Tensor, length: int
) -> torch.Tensor:
    """out[h, l] = 2 Re sum_n v[h, n] exp(l (log_re + i log_im)[h, n]) for l < length. All (H, N/2) -> (H, length).

    l = q R + r splits the powers in two factors, so that R + length/R of them are computed and one matmul does the
    rest; no (H, N, L) tensor exists.
    """
    dtype = v_re.dtype
    R = 1 << max(0, (length - 1).bit_length() // 2)
    Q = -(-length // R)
    index = torch.arange(max(Q, R), device=v_re.device)
    coarse_re, coarse_im = powers(log_re[:, None], log_im[:, None], (index[:Q] * R)[:, None])  # (H, Q, N/2)
    fine_re, fine_im = powers(log_re[..., None], log_im[..., None], index[:R])  # (H, N/2, R)
    v_re, v_im = v_re[:, None], v_im[:, None]
    left_re = v_re * coarse_re - v_im * coarse_im
    left_im = v_re * coarse_im + v_im * coarse_re
    left = torch.cat([left_re, -left_im], -1).to(dtype)
    return 2 * (left @ torch.cat([fine_re, fine_im], 1).to(dtype)).flatten(1)[:, :length]
