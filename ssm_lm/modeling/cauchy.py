"""The Cauchy products of S4's kernel in plain PyTorch, without an (H, N, L) tensor.

Shapes: H channels, L nodes, N real states a channel (N/2 complex ones). Float32 or float64, as the inputs are. The
Triton kernel of the same products is triton_cauchy.py.
"""

import torch

from .first_order import first_order
from .kernel_launch import device_kind

# elements of (H, block of nodes, N/2): large enough for a matmul, and on a GPU for a launch; small enough to stay in a
# CPU's cache
CAUCHY_BLOCK_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 23}


class _Cauchy(torch.autograd.Function):
    """Sums over n of alpha D and beta D, D = 1 / ((i s - Lambda)(i s - conj Lambda)); see `cauchy`. Works through the
    nodes, (H, L), in blocks, in real arithmetic, and recomputes D in the backward.
    """

    @staticmethod
    def _blocks(nodes, Lambda_im):
        elements = CAUCHY_BLOCK_ELEMENTS.get(device_kind(nodes.device), CAUCHY_BLOCK_ELEMENTS["cuda"])
        size = max(1, elements // max(1, Lambda_im.numel()))
        return [slice(start, min(start + size, nodes.shape[1])) for start in range(0, nodes.shape[1], size)]

    @staticmethod
    def _resolvent(nodes, Lambda_re, Lambda_im):
        """Re D and Im D, (H, block, N/2). With Lambda = a + i b the denominator is (a^2 + b^2 - s^2) - 2 i a s;
        near a pole, s = b, its real part is the small a^2 + (b - s)(b + s), in which nothing cancels.
        """
        a, b, s = Lambda_re[:, None], Lambda_im[:, None], nodes[..., None]
        p = torch.addcmul(a * a, b - s, b + s)
        q = (-2 * a) * s
        norm = torch.addcmul(p * p, q, q)
        return p.div_(norm), q.div_(norm).neg_()

    @staticmethod
    def forward(ctx, weights, nodes, Lambda_re, Lambda_im):
        ctx.save_for_backward(weights, nodes, Lambda_re, Lambda_im)
        columns = weights.transpose(1, 2)  # (H, N/2, 2M)
        x = weights.new_empty(*nodes.shape, weights.shape[1])
        y = torch.empty_like(x)
        for block in _Cauchy._blocks(nodes, Lambda_im):
            D_re, D_im = _Cauchy._resolvent(nodes[:, block], Lambda_re, Lambda_im)
            x[:, block] = D_re @ columns
            y[:, block] = D_im @ columns
        return x, y

    @staticmethod
    @first_order
    def backward(ctx, grad_x, grad_y):
        weights, nodes, Lambda_re, Lambda_im = ctx.saved_tensors
        grad_weights = torch.zeros_like(weights)
        sum_p, sum_q = torch.zeros_like(Lambda_re), torch.zeros_like(Lambda_im)
        for block in _Cauchy._blocks(nodes, Lambda_im):
            s = nodes[:, block]
            D_re, D_im = _Cauchy._resolvent(s, Lambda_re, Lambda_im)
            gx, gy = grad_x[:, block], grad_y[:, block]
            grad_weights.baddbmm_(gx.transpose(1, 2), D_re).baddbmm_(gy.transpose(1, 2), D_im)
            # D = 1 / (p + i q), so dD = -D^2 (dp + i dq), with dp = d(a^2 + b^2) and dq = -2 s da
            g_re, g_im = gx @ weights, gy @ weights
            square_re = torch.addcmul(D_re * D_re, D_im, D_im, value=-1)
            square_im = D_re.mul_(D_im).mul_(2)
            sum_p -= torch.addcmul(g_re * square_re, g_im, square_im).sum(1)
            sum_q += (s[:, None] @ torch.addcmul(g_re.mul_(square_im), g_im, square_re, value=-1)).squeeze(1)
        grad_re = 2 * (Lambda_re * sum_p - sum_q)
        return grad_weights, None, grad_re, 2 * Lambda_im * sum_p


def cauchy(
    v_re: torch.Tensor, v_im: torch.Tensor, nodes: torch.Tensor, Lambda_re: torch.Tensor, Lambda_im: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The conjugate-symmetric Cauchy product at nodes on the imaginary axis, without an (H, N, L) tensor:

        out[h, m, l] = sum_n  v[h, m, n] / (i s_l - Lambda[h, n])  +  conj(v[h, m, n]) / (i s_l - conj(Lambda[h, n]))

    As one fraction, the numerator is 2 Re(v) i s - 2 Re(v conj Lambda): two real sums for each m share one resolvent.
    v_re, v_im: (H, M, N/2); nodes s: (L,) real; Lambda_re (< 0), Lambda_im: (H, N/2). No gradient for the nodes.
    Returns the real and the imaginary part, (H, M, L) each.
    """
    scale = cauchy_scale(Lambda_re.detach().abs().amin(1, keepdim=True))
    nodes, Lambda_re, Lambda_im = nodes / scale, Lambda_re / scale, Lambda_im / scale
    alpha = 2 * v_re
    beta = 2 * (v_re * Lambda_re[:, None] + v_im * Lambda_im[:, None])
    x, y = _Cauchy.apply(torch.cat([alpha, beta], 1), nodes, Lambda_re, Lambda_im)  # (H, L, 2M)
    x_alpha, x_beta = x.transpose(1, 2).chunk(2, 1)
    y_alpha, y_beta = y.transpose(1, 2).chunk(2, 1)
    nodes, scale = nodes[:, None], scale[:, None]
    return (-nodes * y_alpha - x_beta) / scale, (nodes * x_alpha - y_beta) / scale


def cauchy_scale(decay: torch.Tensor) -> torch.Tensor:
    """What to divide nodes and Lambda by, from a channel's smallest decay, so that the fourth powers of both fit in
    float32. A power of two: it rounds nothing. The product does not depend on it, so it needs no gradient.
    """
    return torch.exp2(torch.round(torch.log2(decay.clamp(min=1e-30)) / 3))


def cauchy_products(
    C: torch.Tensor,
    B: torch.Tensor,
    P: torch.Tensor,
    Lambda_re: torch.Tensor,
    Lambda_im: torch.Tensor,
    dt: torch.Tensor,
    nodes: torch.Tensor,
) -> torch.Tensor:
    """The Cauchy products of a diagonal plus low-rank system: rows [C; P^*] times columns [B, P], (1 + rank)^2 at once.

        r[h, i, j, l] = sum_n row_i[h, n] column_j[h, n] / (i s_l - dt_h Lambda[h, n])  +  the same of the conjugates

    C (H, N), B (n_ssm, N), P (rank, n_ssm, N) as [Re | Im]; Lambda_re (< 0), Lambda_im (n_ssm, N/2); dt (H,); nodes s
    (L,). Channel h takes set h mod n_ssm of B, P and Lambda. Returns complex (H, 1 + rank, 1 + rank, L).
    """
    H, n_ssm, rank = len(C), len(B), len(P)

    def per_channel(x):
        return x if n_ssm == H else x.repeat(*[1] * (x.dim() - 2), H // n_ssm, 1)

    B, P = per_channel(B), per_channel(P)
    left_re, left_im = torch.cat([C[None], P * P.new_tensor([1.0, -1.0]).repeat_interleave(P.shape[-1] // 2)]).chunk(
        2, -1
    )
    right_re, right_im = torch.cat([B[None], P]).chunk(2, -1)
    left_re, left_im = left_re[:, None], left_im[:, None]
    v_re = (left_re * right_re - left_im * right_im).flatten(0, 1).transpose(0, 1)  # (H, (1 + rank)^2, N/2)
    v_im = (left_re * right_im + left_im * right_re).flatten(0, 1).transpose(0, 1)
    dt = dt[:, None]
    r = torch.complex(*cauchy(v_re, v_im, nodes, dt * per_channel(Lambda_re), dt * per_channel(Lambda_im)))
    return r.unflatten(1, (1 + rank, 1 + rank))
