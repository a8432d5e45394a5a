"""What an LTI state space layer is made of, in plain PyTorch: chunk scan, FFT convolution, Cauchy and Vandermonde.

Shapes: B batch, L length, H channels (hidden_size), N order of the real system (state_size), T chunk length.
A complex number of a state is kept as two real ones: a state vector (..., N) is [real parts | imaginary parts] of the
N/2 states whose conjugates are implied. Everything runs in the dtype of its inputs, float32 or float64.
"""

import torch

from .chunked import ChunkOperators, apply_diagonal, chunk_scan, toeplitz

__all__ = [
    "ChunkOperators",
    "apply_diagonal",
    "cauchy",
    "chunk_scan",
    "fft_convolution",
    "powers",
    "toeplitz",
    "vandermonde",
]


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
