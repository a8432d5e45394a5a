"""The Cauchy products of S4's kernel on a GPU, forward and backward; the twin is cauchy.py.

With Lambda = a + i b, a < 0, and nodes on the imaginary axis a pair of conjugate poles is one fraction,

    v / (i s - Lambda) + conj(v) / (i s - conj Lambda) = 2 Re(v) W - 2 Im(v) V
    D = 1 / ((i s - Lambda)(i s - conj Lambda)),   W = (i s - a) D,   V = b D

so W and V, which are shared by all (1 + rank)^2 products, cost one division for each node and pole. Where P meets P^*
the symmetry saves the rest: |P_1|^2 is real and takes W alone, conj(P_1) P_2 and its conjugate take one sum of each.
The derivatives need no more: dW/da = dV/db = W^2 - V^2 and dV/da = -dW/db = 2 V W.

Forward: the nodes lie across the lanes, the poles are a loop, in which all that is loaded is the same for all lanes.
Backward: the poles lie across the lanes and the nodes are the loop; a program sums its share of the nodes, and the
shares are summed in a fixed order, without atomics. Neither holds an (H, N, L) tensor or a copy of A, B or P for each
channel: channel h reads set h mod n_ssm.
"""

import torch

from .cauchy import cauchy_products, cauchy_scale
from .kernel_launch import on_device, qualified
from .kernels_s4 import Case

try:
    import triton
    import triton.language as tl
except ImportError:  # raised again; standing in a `try`, it does not make Triton a requirement of a Hub repository
    raise

RANKS = (1, 2)
# rank -> nodes a program and warps of the forward; rows of nodes and warps of the backward. The same on every GPU
FORWARD = {1: (512, 4), 2: (256, 4)}
BACKWARD = {1: (8, 4), 2: (8, 4)}
BLOCK_N = 32  # poles across the lanes of the backward
PROGRAMS, STEPS = 1024, 4  # how many the backward splits the nodes for, where channels are few, and into what at least


@triton.jit
def resolvent(s, rate, Lambda_re, Lambda_im):
    """Re W, Im W, Re V, Im V of the pole rate Lambda = a + i b.

    Near it, at s = b, what is small is (b - s)(b + s); as b is a product, b - s is exact only before b is rounded.
    """
    a = rate * Lambda_re
    b = rate * Lambda_im
    near = tl.fma(rate, Lambda_im, -s) * (b + s)
    p = near + a * a
    q = -2 * a * s
    inverse = 1 / (p * p + q * q)
    W_re = -a * (a * a + b * b + s * s) * inverse
    W_im = s * (near - a * a) * inverse
    b = b * inverse
    return W_re, W_im, b * p, -b * q


@triton.jit
def accumulate(sum_re, sum_im, v_re, v_im, W_re, W_im, V_re, V_im):
    """Add Re(v) W - Im(v) V."""
    return sum_re + v_re * W_re - v_im * V_re, sum_im + v_re * W_im - v_im * V_im


@triton.jit
def store_complex(out, re, im, factor, L, BLOCK: tl.constexpr):
    """A block of complex numbers as pairs, at out[2 BLOCK program_id(0)]."""
    i = tl.program_id(0) * 2 * BLOCK + tl.arange(0, 2 * BLOCK)
    tl.store(out + i, tl.interleave(re * factor, im * factor), mask=i < 2 * L)


@triton.jit
def cauchy_forward_kernel(
    C,
    B,
    P,
    Lambda_re,
    Lambda_im,
    rate,
    inverse_scale,
    nodes,
    out,
    L,
    HALF,
    n_ssm,
    RANK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out (H, (1 + RANK)^2, L, 2). Lambda of channel h is rate[h] Lambda, its nodes are inverse_scale[h] nodes.

    Grid: (blocks of nodes, H).
    """
    h = tl.program_id(1).to(tl.int64)
    l = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    factor = tl.load(inverse_scale + h)
    s = tl.load(nodes + l, mask=l < L, other=0.0) * factor
    rate = tl.load(rate + h)
    set = h % n_ssm
    Lambda_re += set * HALF
    Lambda_im += set * HALF
    C += h * 2 * HALF
    B += set * 2 * HALF
    P += set * 2 * HALF
    next_P = n_ssm * 2 * HALF

    zero = tl.zeros((BLOCK,), tl.float32)
    cb_re = zero
    cb_im = zero
    cp_re = zero
    cp_im = zero
    pb_re = zero
    pb_im = zero
    pp_re = zero
    pp_im = zero
    # q is the second P
    cq_re = zero
    cq_im = zero
    qb_re = zero
    qb_im = zero
    qq_re = zero
    qq_im = zero
    # of conj(p) q: the part that it shares with its conjugate, and the other
    even_re = zero
    even_im = zero
    odd_re = zero
    odd_im = zero
    for n in range(HALF):
        c_re = tl.load(C + n)
        c_im = tl.load(C + HALF + n)
        b_re = tl.load(B + n)
        b_im = tl.load(B + HALF + n)
        p_re = tl.load(P + n)
        p_im = tl.load(P + HALF + n)
        W_re, W_im, V_re, V_im = resolvent(s, rate, tl.load(Lambda_re + n), tl.load(Lambda_im + n))

        v_re = c_re * b_re - c_im * b_im
        v_im = c_re * b_im + c_im * b_re
        cb_re, cb_im = accumulate(cb_re, cb_im, v_re, v_im, W_re, W_im, V_re, V_im)
        v_re = c_re * p_re - c_im * p_im
        v_im = c_re * p_im + c_im * p_re
        cp_re, cp_im = accumulate(cp_re, cp_im, v_re, v_im, W_re, W_im, V_re, V_im)
        v_re = p_re * b_re + p_im * b_im
        v_im = p_re * b_im - p_im * b_re
        pb_re, pb_im = accumulate(pb_re, pb_im, v_re, v_im, W_re, W_im, V_re, V_im)
        v_re = p_re * p_re + p_im * p_im
        pp_re += v_re * W_re
        pp_im += v_re * W_im
        if RANK == 2:
            q_re = tl.load(P + next_P + n)
            q_im = tl.load(P + next_P + HALF + n)
            v_re = c_re * q_re - c_im * q_im
            v_im = c_re * q_im + c_im * q_re
            cq_re, cq_im = accumulate(cq_re, cq_im, v_re, v_im, W_re, W_im, V_re, V_im)
            v_re = q_re * b_re + q_im * b_im
            v_im = q_re * b_im - q_im * b_re
            qb_re, qb_im = accumulate(qb_re, qb_im, v_re, v_im, W_re, W_im, V_re, V_im)
            v_re = q_re * q_re + q_im * q_im
            qq_re += v_re * W_re
            qq_im += v_re * W_im
            v_re = p_re * q_re + p_im * q_im
            v_im = p_re * q_im - p_im * q_re
            even_re += v_re * W_re
            even_im += v_re * W_im
            odd_re += v_im * V_re
            odd_im += v_im * V_im

    factor = 2 * factor
    row = 2 * L
    out += h * row * (1 + RANK) * (1 + RANK)
    store_complex(out, cb_re, cb_im, factor, L, BLOCK)
    store_complex(out + row, cp_re, cp_im, factor, L, BLOCK)
    if RANK == 1:
        store_complex(out + 2 * row, pb_re, pb_im, factor, L, BLOCK)
        store_complex(out + 3 * row, pp_re, pp_im, factor, L, BLOCK)
    else:
        store_complex(out + 2 * row, cq_re, cq_im, factor, L, BLOCK)
        store_complex(out + 3 * row, pb_re, pb_im, factor, L, BLOCK)
        store_complex(out + 4 * row, pp_re, pp_im, factor, L, BLOCK)
        store_complex(out + 5 * row, even_re - odd_re, even_im - odd_im, factor, L, BLOCK)
        store_complex(out + 6 * row, qb_re, qb_im, factor, L, BLOCK)
        store_complex(out + 7 * row, even_re + odd_re, even_im + odd_im, factor, L, BLOCK)
        store_complex(out + 8 * row, qq_re, qq_im, factor, L, BLOCK)


@triton.jit
def load_complex(ptr, mask):
    """A column of complex numbers: (rows, 1) twice."""
    return tl.load(ptr, mask=mask, other=0.0)[:, None], tl.load(ptr + 1, mask=mask, other=0.0)[:, None]


@triton.jit
def inner(g_re, g_im, x_re, x_im):
    """Re(conj(g) x), by which a real loss weighs the derivative x."""
    return g_re * x_re + g_im * x_im


@triton.jit(do_not_specialize=["splits"])  # 1 for wide layers: the same code as for others
def cauchy_backward_kernel(
    C,
    B,
    P,
    Lambda_re,
    Lambda_im,
    rate,
    inverse_scale,
    nodes,
    grad,
    sums,
    L,
    H,
    HALF,
    n_ssm,
    splits,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """sums (splits, H, K, HALF): the derivatives by the numbers v of the products, and by a and b.

    K = 9 of rank 1: Re and Im of cb, cp, pb; pp; a; b. K = 16 of rank 2: after pp Re and Im of cq, qb; qq; Re and Im of
    conj(p) q; then a, b. Every one lacks a factor 2, every Im another of -1. grad (H, (1 + RANK)^2, L, 2).
    Grid: (splits, H, blocks of poles).
    """
    split = tl.program_id(0)
    h = tl.program_id(1).to(tl.int64)
    n = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    exists = n < HALF
    set = h % n_ssm
    rate = tl.load(rate + h)
    factor = tl.load(inverse_scale + h)
    l_re = tl.load(Lambda_re + set * HALF + n, mask=exists, other=-1.0)[None, :]
    l_im = tl.load(Lambda_im + set * HALF + n, mask=exists, other=0.0)[None, :]
    C += h * 2 * HALF
    B += set * 2 * HALF
    P += set * 2 * HALF
    c_re = tl.load(C + n, mask=exists, other=0.0)[None, :]
    c_im = tl.load(C + HALF + n, mask=exists, other=0.0)[None, :]
    b_re = tl.load(B + n, mask=exists, other=0.0)[None, :]
    b_im = tl.load(B + HALF + n, mask=exists, other=0.0)[None, :]
    p_re = tl.load(P + n, mask=exists, other=0.0)[None, :]
    p_im = tl.load(P + HALF + n, mask=exists, other=0.0)[None, :]
    if RANK == 2:
        P += n_ssm * 2 * HALF
        q_re = tl.load(P + n, mask=exists, other=0.0)[None, :]
        q_im = tl.load(P + HALF + n, mask=exists, other=0.0)[None, :]
    row = 2 * L
    grad += h * row * (1 + RANK) * (1 + RANK)
    at_pb: tl.constexpr = 1 + RANK  # where row P_1^* begins
    at_qb: tl.constexpr = 6

    zero = tl.zeros((ROWS, BLOCK), tl.float32)
    cb_W = zero
    cb_V = zero
    cp_W = zero
    cp_V = zero
    pb_W = zero
    pb_V = zero
    pp_W = zero
    cq_W = zero
    cq_V = zero
    qb_W = zero
    qb_V = zero
    qq_W = zero
    even_W = zero
    odd_V = zero
    sum_a = zero
    sum_b = zero
    for start in range(split * ROWS, L, splits * ROWS):
        l = start + tl.arange(0, ROWS)
        inside = l < L
        s = (tl.load(nodes + l, mask=inside, other=0.0) * factor)[:, None]
        W_re, W_im, V_re, V_im = resolvent(s, rate, l_re, l_im)
        here = grad + 2 * l

        g_re, g_im = load_complex(here, inside)  # c b
        cb_W += inner(g_re, g_im, W_re, W_im)
        cb_V += inner(g_re, g_im, V_re, V_im)
        v_re = c_re * b_re - c_im * b_im
        v_im = c_re * b_im + c_im * b_re
        G_re, G_im, K_re, K_im = g_re * v_re, g_im * v_re, g_re * v_im, g_im * v_im  # sums of g Re(v) and g Im(v)

        g_re, g_im = load_complex(here + row, inside)  # c p
        cp_W += inner(g_re, g_im, W_re, W_im)
        cp_V += inner(g_re, g_im, V_re, V_im)
        v_re = c_re * p_re - c_im * p_im
        v_im = c_re * p_im + c_im * p_re
        G_re, G_im, K_re, K_im = G_re + g_re * v_re, G_im + g_im * v_re, K_re + g_re * v_im, K_im + g_im * v_im

        g_re, g_im = load_complex(here + at_pb * row, inside)  # p^* b
        pb_W += inner(g_re, g_im, W_re, W_im)
        pb_V += inner(g_re, g_im, V_re, V_im)
        v_re = p_re * b_re + p_im * b_im
        v_im = p_re * b_im - p_im * b_re
        G_re, G_im, K_re, K_im = G_re + g_re * v_re, G_im + g_im * v_re, K_re + g_re * v_im, K_im + g_im * v_im

        g_re, g_im = load_complex(here + (at_pb + 1) * row, inside)  # p^* p
        pp_W += inner(g_re, g_im, W_re, W_im)
        v_re = p_re * p_re + p_im * p_im
        G_re, G_im = G_re + g_re * v_re, G_im + g_im * v_re

        if RANK == 2:
            g_re, g_im = load_complex(here + 2 * row, inside)  # c q
            cq_W += inner(g_re, g_im, W_re, W_im)
            cq_V += inner(g_re, g_im, V_re, V_im)
            v_re = c_re * q_re - c_im * q_im
            v_im = c_re * q_im + c_im * q_re
            G_re, G_im, K_re, K_im = G_re + g_re * v_re, G_im + g_im * v_re, K_re + g_re * v_im, K_im + g_im * v_im

            g_re, g_im = load_complex(here + at_qb * row, inside)  # q^* b
            qb_W += inner(g_re, g_im, W_re, W_im)
            qb_V += inner(g_re, g_im, V_re, V_im)
            v_re = q_re * b_re + q_im * b_im
            v_im = q_re * b_im - q_im * b_re
            G_re, G_im, K_re, K_im = G_re + g_re * v_re, G_im + g_im * v_re, K_re + g_re * v_im, K_im + g_im * v_im

            g_re, g_im = load_complex(here + (at_qb + 2) * row, inside)  # q^* q
            qq_W += inner(g_re, g_im, W_re, W_im)
            v_re = q_re * q_re + q_im * q_im
            G_re, G_im = G_re + g_re * v_re, G_im + g_im * v_re

            g_re, g_im = load_complex(here + (at_pb + 2) * row, inside)  # p^* q
            f_re, f_im = load_complex(here + (at_qb + 1) * row, inside)  # q^* p, its conjugate
            even_W += inner(g_re + f_re, g_im + f_im, W_re, W_im)
            odd_V += inner(g_re - f_re, g_im - f_im, V_re, V_im)
            v_re = p_re * q_re + p_im * q_im
            v_im = p_re * q_im - p_im * q_re
            G_re, G_im = G_re + (g_re + f_re) * v_re, G_im + (g_im + f_im) * v_re
            K_re, K_im = K_re + (g_re - f_re) * v_im, K_im + (g_im - f_im) * v_im

        Y_re = (W_re * W_re - W_im * W_im) - (V_re * V_re - V_im * V_im)  # W^2 - V^2
        Y_im = 2 * (W_re * W_im - V_re * V_im)
        Z_re = 2 * (V_re * W_re - V_im * W_im)  # 2 V W
        Z_im = 2 * (V_re * W_im + V_im * W_re)
        sum_a += inner(G_re, G_im, Y_re, Y_im) - inner(K_re, K_im, Z_re, Z_im)
        sum_b -= inner(G_re, G_im, Z_re, Z_im) + inner(K_re, K_im, Y_re, Y_im)

    K: tl.constexpr = 9 if RANK == 1 else 16
    sums += (split.to(tl.int64) * H + h) * K * HALF + n
    tl.store(sums, tl.sum(cb_W, 0) * factor, mask=exists)
    tl.store(sums + HALF, tl.sum(cb_V, 0) * factor, mask=exists)
    tl.store(sums + 2 * HALF, tl.sum(cp_W, 0) * factor, mask=exists)
    tl.store(sums + 3 * HALF, tl.sum(cp_V, 0) * factor, mask=exists)
    tl.store(sums + 4 * HALF, tl.sum(pb_W, 0) * factor, mask=exists)
    tl.store(sums + 5 * HALF, tl.sum(pb_V, 0) * factor, mask=exists)
    tl.store(sums + 6 * HALF, tl.sum(pp_W, 0) * factor, mask=exists)
    if RANK == 2:
        tl.store(sums + 7 * HALF, tl.sum(cq_W, 0) * factor, mask=exists)
        tl.store(sums + 8 * HALF, tl.sum(cq_V, 0) * factor, mask=exists)
        tl.store(sums + 9 * HALF, tl.sum(qb_W, 0) * factor, mask=exists)
        tl.store(sums + 10 * HALF, tl.sum(qb_V, 0) * factor, mask=exists)
        tl.store(sums + 11 * HALF, tl.sum(qq_W, 0) * factor, mask=exists)
        tl.store(sums + 12 * HALF, tl.sum(even_W, 0) * factor, mask=exists)
        tl.store(sums + 13 * HALF, tl.sum(odd_V, 0) * factor, mask=exists)
    # a and b are scaled as the nodes are
    tl.store(sums + (K - 2) * HALF, tl.sum(sum_a, 0) * factor * factor, mask=exists)
    tl.store(sums + (K - 1) * HALF, tl.sum(sum_b, 0) * factor * factor, mask=exists)


# ---- the operator


def _scaled(Lambda_re, dt):
    """The two factors a channel: of Lambda, and of the nodes. (H,) each."""
    inverse_scale = 1 / cauchy_scale((dt.view(-1, len(Lambda_re)) * Lambda_re.abs().amin(1)).flatten())
    return dt * inverse_scale, inverse_scale


@torch.library.custom_op(qualified("cauchy_forward"), mutates_args=())
def _forward(
    C: torch.Tensor,
    B: torch.Tensor,
    P: torch.Tensor,
    Lambda_re: torch.Tensor,
    Lambda_im: torch.Tensor,
    dt: torch.Tensor,
    nodes: torch.Tensor,
) -> torch.Tensor:
    C, B, P, Lambda_re, Lambda_im, dt, nodes = (x.contiguous() for x in (C, B, P, Lambda_re, Lambda_im, dt, nodes))
    out = _fake_forward(C, B, P, Lambda_re, Lambda_im, dt, nodes)
    if out.numel():
        (H, L), rank = (len(C), len(nodes)), len(P)
        block, warps = FORWARD[rank]
        with on_device(C.device):
            cauchy_forward_kernel[(triton.cdiv(L, block), H)](
                C, B, P, Lambda_re, Lambda_im, *_scaled(Lambda_re, dt), nodes, out, L, *reversed(Lambda_re.shape),
                RANK=rank, BLOCK=block, num_warps=warps, num_stages=1,
            )  # fmt: skip
    return out


@_forward.register_fake
def _fake_forward(C, B, P, Lambda_re, Lambda_im, dt, nodes):
    return C.new_empty(len(C), (1 + len(P)) ** 2, len(nodes), 2)


@torch.library.custom_op(qualified("cauchy_backward"), mutates_args=())
def _backward(
    grad: torch.Tensor,
    C: torch.Tensor,
    B: torch.Tensor,
    P: torch.Tensor,
    Lambda_re: torch.Tensor,
    Lambda_im: torch.Tensor,
    dt: torch.Tensor,
    nodes: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of the first six inputs."""
    grad, C, B, P, Lambda_re, Lambda_im, dt, nodes = (
        x.contiguous() for x in (grad, C, B, P, Lambda_re, Lambda_im, dt, nodes)
    )
    H, L, rank, (n_ssm, half) = len(C), len(nodes), len(P), Lambda_re.shape
    rows, warps = BACKWARD[rank]
    blocks = triton.cdiv(half, BLOCK_N)
    splits = max(1, min(triton.cdiv(L, rows * STEPS), PROGRAMS // max(1, H * blocks)))
    sums = C.new_empty(splits, H, 9 if rank == 1 else 16, half)
    if sums.numel():
        with on_device(C.device):
            cauchy_backward_kernel[(splits, H, blocks)](
                C, B, P, Lambda_re, Lambda_im, *_scaled(Lambda_re, dt), nodes, grad, sums, L, H, half, n_ssm, splits,
                RANK=rank, ROWS=rows, BLOCK=BLOCK_N, num_warps=warps, num_stages=1,
            )  # fmt: skip
    return _chain(2 * sums.sum(0), C, B, P, Lambda_re, Lambda_im, dt)


def _chain(sums, C, B, P, Lambda_re, Lambda_im, dt):
    """From the derivatives by the numbers v and by dt Lambda, (H, K, N/2), to those by what they are products of.

    Of complex numbers that are conjugated at once: in a compiled graph torch calls an operator without the dispatch
    keys that would carry out a lazy conj(), and its result is wrong.
    """
    rank, n_ssm = len(P), len(B)
    sums = sums.view(-1, n_ssm, *sums.shape[1:])  # channel h has set h mod n_ssm

    def complex(x):
        return torch.complex(*x.chunk(2, -1))

    def real(x):
        return torch.cat([x.real, x.imag], -1)

    def by(k):
        return torch.complex(sums[:, :, k], -sums[:, :, k + 1])

    c, b, p = complex(C).view(-1, n_ssm, C.shape[1] // 2), complex(B), complex(P)
    by_cb, pairs = by(0), [(by(2), by(4), sums[:, :, 6])]
    if rank == 2:
        pairs.append((by(7), by(9), sums[:, :, 11]))
    grad_c, grad_b, grad_p = by_cb * b.conj_physical(), (by_cb * c.conj_physical()).sum(0), []
    for x, (by_cx, by_xb, by_xx) in zip(p, pairs, strict=True):
        grad_c = grad_c + by_cx * x.conj_physical()
        by_xb = by_xb.sum(0)
        grad_b = grad_b + by_xb * x
        grad_p.append((by_cx * c.conj_physical()).sum(0) + by_xb.conj_physical() * b + 2 * by_xx.sum(0) * x)
    if rank == 2:
        by_pq = by(12).sum(0)
        grad_p = [grad_p[0] + by_pq.conj_physical() * p[1], grad_p[1] + by_pq * p[0]]
    dt = dt.view(-1, n_ssm, 1)
    by_a, by_b = sums[:, :, -2], sums[:, :, -1]
    grad_dt = (by_a * Lambda_re + by_b * Lambda_im).sum(-1).flatten()
    return (
        real(grad_c).view(C.shape),
        real(grad_b),
        torch.stack([real(x) for x in grad_p]),
        (dt * by_a).sum(0),
        (dt * by_b).sum(0),
        grad_dt,
    )


@_backward.register_fake
def _fake_backward(grad, C, B, P, Lambda_re, Lambda_im, dt, nodes):
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (C, B, P, Lambda_re, Lambda_im, dt)
    )


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gradients(ctx, grad):
    return *_backward(grad, *ctx.saved_tensors), None


_forward.register_autograd(_gradients, setup_context=_save)


def cauchy_products_kernel(C, B, P, Lambda_re, Lambda_im, dt, nodes) -> torch.Tensor:
    """`cauchy_products` of cauchy.py in float32, for rank 1 and 2."""
    out = torch.view_as_complex(_forward(C, B, P, Lambda_re, Lambda_im, dt, nodes))
    return out.unflatten(1, (1 + len(P), 1 + len(P)))


# ---- what proves them


def example(H: int, n_ssm: int, N: int, rank: int, L: int, device="cpu", dtype=torch.float32) -> list[torch.Tensor]:
    """Inputs such as a layer has, from a fixed seed."""
    generator = torch.Generator().manual_seed(H + N + L)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    Lambda_re = -0.5 * torch.exp(0.2 * normal(n_ssm, N // 2))
    Lambda_im = torch.pi * torch.arange(N // 2, dtype=torch.float64) + 0.1 * normal(n_ssm, N // 2)
    dt = 10 ** (-3 + 2 * torch.rand(H, generator=generator, dtype=torch.float64))
    nodes = 2 * torch.tan(torch.pi * torch.arange(L, dtype=torch.float64) / (2 * max(L, 1)))
    inputs = normal(H, N), normal(n_ssm, N), normal(rank, n_ssm, N), Lambda_re, Lambda_im, dt, nodes
    return [x.to(device, dtype) for x in inputs]


def _with_gradients(function, inputs):
    """What a self-check compares: the products and the gradients of their sum of squares."""
    inputs = [x.detach().requires_grad_() for x in inputs[:-1]] + inputs[-1:]
    with torch.enable_grad():
        out = torch.view_as_real(function(*inputs))
        grads = torch.autograd.grad(out.square().mean(), inputs[:-1])
    return [out.detach(), *grads]


def self_check_cases(device: torch.device) -> list[Case]:
    """Small problems of both ranks, forward and backward."""
    cases = []
    for rank in RANKS:
        inputs = example(6, 3, 20, rank, 301, device)
        double = [x.double() for x in inputs]
        cases.append(
            Case(
                f"rank {rank}",
                lambda inputs=inputs: _with_gradients(cauchy_products_kernel, inputs),
                lambda double=double: _with_gradients(cauchy_products, double),
                1e-4,
            )
        )
    return cases
