"""What an LTI state space layer is made of, in plain PyTorch: chunk scan, FFT convolution, Cauchy and Vandermonde.

Shapes: B batch, L length, H channels (hidden_size), N order of the real system (state_size), T chunk length.
A complex number of a state is kept as two real ones: a state vector (..., N) is [real parts | imaginary parts] of the
N/2 states whose conjugates are implied. Everything runs in the dtype of its inputs, float32 or float64.
"""

import torch
import torch.nn.functional as F

from .chunked import ChunkOperators, apply_diagonal, chunk_scan, toeplitz
from .kernels_s4 import kernel_status, use_kernel

__all__ = [
    "ChunkOperators",
    "apply_diagonal",
    "cauchy",
    "cauchy_products",
    "cauchy_products_twin",
    "cauchy_scale",
    "chunk_scan",
    "fft_convolution",
    "kernel_status",
    "powers",
    "toeplitz",
    "use_kernel",
    "vandermonde",
    "vandermonde_twin",
]


def fft_convolution(u: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """Causal convolution y_t = sum_{s <= t} kernel_{t-s} u_s by FFT. u (B, L, H), kernel (H, L) -> (B, L, H)."""
    L = u.shape[1]
    size = 1 << (2 * L - 1).bit_length()  # zero-padded so that the circular convolution is a linear one
    spectrum = torch.fft.rfft(u.transpose(1, 2), n=size) * torch.fft.rfft(kernel, n=size)
    return torch.fft.irfft(spectrum, n=size)[..., :L].transpose(1, 2)


# elements of (H, block of nodes, N/2): large enough for a matmul, and on a GPU for a launch; small enough to stay in a
# CPU's cache
CAUCHY_BLOCK_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 23}


class _Cauchy(torch.autograd.Function):
    """Sums over n of alpha D and beta D, D = 1 / ((i s - Lambda)(i s - conj Lambda)); see `cauchy`. Works through the
    nodes, (H, L), in blocks, in real arithmetic, and recomputes D in the backward.
    """

    @staticmethod
    def _blocks(nodes, Lambda_im):
        elements = CAUCHY_BLOCK_ELEMENTS.get(nodes.device.type, CAUCHY_BLOCK_ELEMENTS["cuda"])
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
    @torch.autograd.function.once_differentiable
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
    kernels: str = "auto",
) -> torch.Tensor:
    """The Cauchy products of a diagonal plus low-rank system: rows [C; P^*] times columns [B, P], (1 + rank)^2 at once.

        r[h, i, j, l] = sum_n row_i[h, n] column_j[h, n] / (i s_l - dt_h Lambda[h, n])  +  the same of the conjugates

    C (H, N), B (n_ssm, N), P (rank, n_ssm, N) as [Re | Im]; Lambda_re (< 0), Lambda_im (n_ssm, N/2); dt (H,); nodes s
    (L,). Channel h takes set h mod n_ssm of B, P and Lambda. Returns complex (H, 1 + rank, 1 + rank, L).
    kernels: as in S4Config, whether the Triton kernel runs.
    """
    unsupported = None
    if C.dtype != torch.float32 or len(P) not in (1, 2):
        unsupported = f"{C.dtype}, rank {len(P)}; it has float32 and rank 1 and 2"
    if use_kernel("cauchy", C, B, P, Lambda_re, dt, nodes, unsupported=unsupported, setting=kernels):
        from .triton_cauchy import cauchy_products_kernel

        return cauchy_products_kernel(C, B, P, Lambda_re, Lambda_im, dt, nodes)
    return cauchy_products_twin(C, B, P, Lambda_re, Lambda_im, dt, nodes)


def cauchy_products_twin(C, B, P, Lambda_re, Lambda_im, dt, nodes) -> torch.Tensor:
    """`cauchy_products` in plain PyTorch, float32 or float64."""
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


def powers(log_re: torch.Tensor, log_im: torch.Tensor, exponents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """exp(exponent * (log_re + i log_im)) as its real and imaginary part, in float64.

    The phase log_im * exponent reaches thousands of radians; in float32 it would keep three digits of the angle.
    """
    exponents = exponents.to(torch.float64)
    magnitude, phase = torch.exp(log_re.double() * exponents), log_im.double() * exponents
    return magnitude * torch.cos(phase), magnitude * torch.sin(phase)


def vandermonde(
    v_re: torch.Tensor,
    v_im: torch.Tensor,
    log_re: torch.Tensor,
    log_im: torch.Tensor,
    length: int,
    kernels: str = "auto",
) -> torch.Tensor:
    """out[h, l] = 2 Re sum_n v[h, n] exp(l (log_re + i log_im)[h, n]) for l < length. All (H, N/2) -> (H, length).

    The logarithms may be float64 where v is float32. kernels: as in S4Config, whether the Triton kernel runs.
    """
    unsupported = None if v_re.dtype == torch.float32 else f"{v_re.dtype}; it has float32"
    if use_kernel("vandermonde", v_re, v_im, log_re, log_im, unsupported=unsupported, setting=kernels):
        from .triton_vandermonde import vandermonde_kernel

        return vandermonde_kernel(v_re, v_im, log_re, log_im, length)
    return vandermonde_twin(v_re, v_im, log_re, log_im, length)


def vandermonde_twin(
    v_re: torch.Tensor, v_im: torch.Tensor, log_re: torch.Tensor, log_im: torch.Tensor, length: int
) -> torch.Tensor:
    """`vandermonde` in plain PyTorch.

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


def associative_scan(log_re: torch.Tensor, log_im: torch.Tensor, drive: torch.Tensor) -> torch.Tensor:
    """x_t = Lambda x_{t-1} + u_t from zero, as a parallel prefix in log2(L) passes over the sequence.

    Elements (a, b) combine as (a_1, b_1)(a_2, b_2) = (a_2 a_1, a_2 b_1 + b_2). Lambda is the same at every step, so
    after k passes every a is Lambda^(2^k), and only the b are a sequence. log_re, log_im: log Lambda, (P/2,);
    drive u: (B, L, P) as [real | imaginary] -> x, likewise.

    Source: Blelloch, "Prefix Sums and Their Applications" (1990); used for S5 by Smith et al. (2023).
    """
    x, reach = drive, 1
    while reach < drive.shape[1]:
        power = torch.cat(powers(log_re, log_im, torch.tensor(float(reach), device=drive.device)), -1).to(drive.dtype)
        x = x + F.pad(apply_diagonal(power, x[:, :-reach]), (0, 0, reach, 0))
        reach *= 2
    return x


def siso_step(
    u: torch.Tensor, state: torch.Tensor, coefficients: torch.Tensor, skip: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token of S4 or S4D: h_t = (R(E) - sum_r F_r G_r^T) h_{t-1} + B u,  y = C h_t + D u. See triton_step.py.

    u (B, H); state h (B, H, N); skip D (H,); coefficients (K, H, N): [E, C], where u drives the real parts, or
    [E, C, B, F_1, G_1, ...]. R(E): complex product in real form. Returns y (B, H), next state.
    """
    E, C, *others = coefficients
    after = apply_diagonal(E, state)
    if not others:
        half = state.shape[-1] // 2
        after = torch.cat([after[..., :half] + u[..., None], after[..., half:]], -1)
    else:
        B, *pairs = others
        after = after + B * u[..., None]
        for F_r, G_r in zip(pairs[::2], pairs[1::2], strict=True):
            after = after - F_r * (G_r * state).sum(-1, keepdim=True)
    return (C * after).sum(-1) + skip * u, after


def mimo_step(
    u: torch.Tensor,
    state: torch.Tensor,
    Lambda: torch.Tensor,
    weight_in: torch.Tensor,
    weight_out: torch.Tensor,
    skip: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token of S5: x_t = Lambda x_{t-1} + weight_in u,  y = weight_out x_t + D u. See triton_step.py.

    u (B, H); state x (B, 1, P) in real form; Lambda (P,); weight_in (P, H); weight_out (H, P). Returns y, next state.
    """
    after = apply_diagonal(Lambda, state) + (u @ weight_in.T)[:, None]
    return after[:, 0] @ weight_out.T + skip * u, after


def complex_scan(
    u: torch.Tensor,
    log_re: torch.Tensor,
    log_im: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    begins: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x_t = Lambda x_{t-1} + u_t, token by token: what triton_s5_scan.py does in parallel.

    u (B, L, P) as [real | imaginary]; log_re, log_im (P/2,): log Lambda; initial_state (B, P), None for zero; begins
    (B, L) bool, where the state before the token counts as zero. Returns x (B, L, P) and the last state (B, P).
    """
    Lambda = torch.cat(powers(log_re, log_im, torch.ones((), device=u.device)), -1).to(u.dtype)
    x = torch.zeros_like(u[:, 0]) if initial_state is None else initial_state
    states = []
    for t, driven in enumerate(u.unbind(1)):
        if begins is not None:
            x = torch.where(begins[:, t, None], 0, x)
        x = apply_diagonal(Lambda, x) + driven
        states.append(x)
    return torch.stack(states, 1), x
