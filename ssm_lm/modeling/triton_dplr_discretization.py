"""The bilinear transform of S4's systems on a GPU: one launch, and one back. The twin is dplr_discretization.py, with
the equations; a program is a channel, whose vectors of N are pairs of halves (re, im).

All sums are of float32 products, none of TF32, so that `tf32: true` loses no digit of A_bar.
"""

import torch

from .discrete import DiscreteDPLR
from .dplr_discretization import bilinear_dplr
from .kernel_launch import on_device, qualified
from .kernels_s4 import Case, gradient_case
from .triton_dplr_operators import read_factor, read_pair, write_column, write_pair

try:
    import triton
    import triton.language as tl
except ImportError:  # `kernels_s4` asks for this module in a `try` of its own, and reports the cause
    raise


@triton.jit
def exponential(x):
    """exp(x) = 2^k exp(r) with |r| < 0.35: the GPU's own loses a digit where x is large. x within -80 and 80."""
    k = tl.floor(x * 1.4426950408889634 + 0.5)
    r = (x - k * 0.693359375) + k * 2.12194440e-4  # log 2 in two parts, the first of few bits
    return tl.exp(r) * tl.exp2(k)


@triton.jit
def times(a_re, a_im, b_re, b_im):
    """The complex product."""
    return a_re * b_re - a_im * b_im, a_re * b_im + a_im * b_re


@triton.jit
def times_conjugate(a_re, a_im, b_re, b_im):
    """conj(a) b."""
    return a_re * b_re + a_im * b_im, a_re * b_im - a_im * b_re


@triton.jit
def dot(a_re, a_im, b_re, b_im):
    """The product of two real vectors."""
    return tl.sum(a_re * b_re + a_im * b_im, 0)


@triton.jit
def read_system(log_dt, Lambda_log_re, Lambda_im, P, h, s, S, n, half, RANK: tl.constexpr):
    """dt, rate = -Re Lambda, w (re, im), and P (re, im, re, im) of a channel; a second P of zeros where it has one."""
    dt = exponential(tl.load(log_dt + h))
    rate = exponential(tl.load(Lambda_log_re + s * half + n, mask=n < half, other=0.0))
    frequency = tl.load(Lambda_im + s * half + n, mask=n < half, other=0.0)
    x, y = 1.0 + 0.5 * dt * rate, 0.5 * dt * frequency
    scale = 1.0 / (x * x + y * y)
    p1_re, p1_im = read_pair(P + s * 2 * half, n, half)
    p2_re, p2_im = read_pair(P + ((RANK - 1) * S + s) * 2 * half, n, half if RANK == 2 else 0)
    return dt, rate, x * scale, y * scale, p1_re, p1_im, p2_re, p2_im


@triton.jit
def products(w_re, w_im, p1_re, p1_im, p2_re, p2_im):
    """u_s = w P_s (re, im, re, im), and k_rs = p_r u_s, row after row."""
    u1_re, u1_im = times(w_re, w_im, p1_re, p1_im)
    u2_re, u2_im = times(w_re, w_im, p2_re, p2_im)
    k11, k12 = dot(p1_re, p1_im, u1_re, u1_im), dot(p1_re, p1_im, u2_re, u2_im)
    k21, k22 = dot(p2_re, p2_im, u1_re, u1_im), dot(p2_re, p2_im, u2_re, u2_im)
    return u1_re, u1_im, u2_re, u2_im, k11, k12, k21, k22


@triton.jit
def inverse(k11, k12, k21, k22, dt):
    """(I + dt k)^-1 of a 2 x 2 matrix, which for rank 1 has zeros but for the first."""
    a, b, c, d = 1.0 + dt * k11, dt * k12, dt * k21, 1.0 + dt * k22
    scale = 1.0 / (a * d - b * c)
    return d * scale, -b * scale, -c * scale, a * scale


# nothing but N is a constant: another width compiles nothing new
@triton.jit(do_not_specialize=["S", "half"])
def bilinear_kernel(
    log_dt,
    Lambda_log_re,
    Lambda_im,
    P,
    B,
    C,
    E,
    F,
    G,
    B_bar,
    C_row,
    S,
    half,
    RANK: tl.constexpr,
    HALF: tl.constexpr,
):
    h, N, n = tl.program_id(0).to(tl.int64), 2 * half, tl.arange(0, HALF)
    s = h % S
    system = read_system(log_dt, Lambda_log_re, Lambda_im, P, h, s, S, n, half, RANK)
    dt, _, w_re, w_im, p1_re, p1_im, p2_re, p2_im = system
    b_re, b_im = read_pair(B + s * N, n, half)
    wb_re, wb_im = times(w_re, w_im, b_re, b_im)
    u1_re, u1_im, u2_re, u2_im, k11, k12, k21, k22 = products(w_re, w_im, p1_re, p1_im, p2_re, p2_im)
    m11, m12, m21, m22 = inverse(k11, k12, k21, k22, dt)
    # the columns of dt w P M
    f1_re, f1_im = dt * (u1_re * m11 + u2_re * m21), dt * (u1_im * m11 + u2_im * m21)
    f2_re, f2_im = dt * (u1_re * m12 + u2_re * m22), dt * (u1_im * m12 + u2_im * m22)
    q1, q2 = dot(p1_re, p1_im, wb_re, wb_im), dot(p2_re, p2_im, wb_re, wb_im)
    write_pair(E + h * N, 2.0 * w_re - 1.0, 2.0 * w_im, n, half)
    write_column(F + h * N * RANK, 0, 2.0 * f1_re, 2.0 * f1_im, n, half, RANK)
    g_re, g_im = times_conjugate(w_re, w_im, p1_re, p1_im)
    write_column(G + h * N * RANK, 0, g_re, g_im, n, half, RANK)
    if RANK == 2:
        write_column(F + h * N * RANK, 1, 2.0 * f2_re, 2.0 * f2_im, n, half, RANK)
        g_re, g_im = times_conjugate(w_re, w_im, p2_re, p2_im)
        write_column(G + h * N * RANK, 1, g_re, g_im, n, half, RANK)
    out_re, out_im = wb_re - f1_re * q1 - f2_re * q2, wb_im - f1_im * q1 - f2_im * q2
    write_pair(B_bar + h * N, dt * out_re, dt * out_im, n, half)
    c_re, c_im = read_pair(C + h * N, n, half)
    write_pair(C_row + h * N, 2.0 * c_re, -2.0 * c_im, n, half)


@triton.jit(do_not_specialize=["S", "half", "half_row", "row", "of_second"])
def bilinear_gradient_kernel(
    log_dt,
    Lambda_log_re,
    Lambda_im,
    P,
    B,
    of_E,
    of_F,
    of_G,
    of_B_bar,
    of_C_row,
    of_log_dt,
    of_log_re,
    of_im,
    of_P,
    of_B,
    of_C,
    S,
    half,
    half_row,
    row,
    of_second,
    RANK: tl.constexpr,
    HALF: tl.constexpr,
):
    """Each channel's part: of_log_dt (H,), of_log_re and of_im (H, N/2), whose rows lie half_row numbers apart, of_B
    and of_P (H, N), whose rows lie `row` apart, the second part of P of_second after the first, and of_C (H, N).
    """
    h, N, n = tl.program_id(0).to(tl.int64), 2 * half, tl.arange(0, HALF)
    s = h % S
    system = read_system(log_dt, Lambda_log_re, Lambda_im, P, h, s, S, n, half, RANK)
    dt, rate, w_re, w_im, p1_re, p1_im, p2_re, p2_im = system
    b_re, b_im = read_pair(B + s * N, n, half)
    # once more what the forward made
    wb_re, wb_im = times(w_re, w_im, b_re, b_im)
    u1_re, u1_im, u2_re, u2_im, k11, k12, k21, k22 = products(w_re, w_im, p1_re, p1_im, p2_re, p2_im)
    m11, m12, m21, m22 = inverse(k11, k12, k21, k22, dt)
    v1_re, v1_im = u1_re * m11 + u2_re * m21, u1_im * m11 + u2_im * m21  # w P M
    v2_re, v2_im = u1_re * m12 + u2_re * m22, u1_im * m12 + u2_im * m22
    q1, q2 = dot(p1_re, p1_im, wb_re, wb_im), dot(p2_re, p2_im, wb_re, wb_im)
    # B_bar = dt (w B - dt sum_s v_s q_s), q_s = p_s w B
    g_re, g_im = read_pair(of_B_bar + h * N, n, half)
    t1, t2 = dot(g_re, g_im, v1_re, v1_im), dot(g_re, g_im, v2_re, v2_im)
    of_dt = dot(g_re, g_im, wb_re, wb_im) - 2.0 * dt * (t1 * q1 + t2 * q2)
    of_q1, of_q2 = -dt * dt * t1, -dt * dt * t2
    gwb_re = dt * g_re + of_q1 * p1_re + of_q2 * p2_re
    gwb_im = dt * g_im + of_q1 * p1_im + of_q2 * p2_im
    gp1_re, gp1_im, gp2_re, gp2_im = of_q1 * wb_re, of_q1 * wb_im, of_q2 * wb_re, of_q2 * wb_im
    # F_s = 2 dt v_s; z_s the gradient of v_s over dt
    f = read_factor(of_F + h * N * RANK, n, half, RANK)
    of_dt += 2.0 * (dot(f[0], f[1], v1_re, v1_im) + dot(f[2], f[3], v2_re, v2_im))
    z1_re, z1_im = 2.0 * f[0] - dt * q1 * g_re, 2.0 * f[1] - dt * q1 * g_im
    z2_re, z2_im = 2.0 * f[2] - dt * q2 * g_re, 2.0 * f[3] - dt * q2 * g_im
    # v_s = sum_r u_r M_rs
    gu1_re, gu1_im = dt * (m11 * z1_re + m12 * z2_re), dt * (m11 * z1_im + m12 * z2_im)
    gu2_re, gu2_im = dt * (m21 * z1_re + m22 * z2_re), dt * (m21 * z1_im + m22 * z2_im)
    a11, a12 = dt * dot(u1_re, u1_im, z1_re, z1_im), dt * dot(u1_re, u1_im, z2_re, z2_im)
    a21, a22 = dt * dot(u2_re, u2_im, z1_re, z1_im), dt * dot(u2_re, u2_im, z2_re, z2_im)
    # M is an inverse: -M^T (its gradient) M^T
    b11, b12 = m11 * a11 + m21 * a21, m11 * a12 + m21 * a22
    b21, b22 = m12 * a11 + m22 * a21, m12 * a12 + m22 * a22
    c11, c12 = -(b11 * m11 + b12 * m12), -(b11 * m21 + b12 * m22)
    c21, c22 = -(b21 * m11 + b22 * m12), -(b21 * m21 + b22 * m22)
    # of I + dt k, k_rs = p_r u_s
    of_dt += c11 * k11 + c12 * k12 + c21 * k21 + c22 * k22
    gp1_re, gp1_im = gp1_re + dt * (c11 * u1_re + c12 * u2_re), gp1_im + dt * (c11 * u1_im + c12 * u2_im)
    gp2_re, gp2_im = gp2_re + dt * (c21 * u1_re + c22 * u2_re), gp2_im + dt * (c21 * u1_im + c22 * u2_im)
    gu1_re, gu1_im = gu1_re + dt * (c11 * p1_re + c21 * p2_re), gu1_im + dt * (c11 * p1_im + c21 * p2_im)
    gu2_re, gu2_im = gu2_re + dt * (c12 * p1_re + c22 * p2_re), gu2_im + dt * (c12 * p1_im + c22 * p2_im)
    # w: of E = 2 w - 1, w B, u_r = w P_r and G_r = conj(w) P_r
    e_re, e_im = read_pair(of_E + h * N, n, half)
    gw_re, gw_im = times_conjugate(b_re, b_im, gwb_re, gwb_im)
    gw_re, gw_im = gw_re + 2.0 * e_re, gw_im + 2.0 * e_im
    x_re, x_im = times_conjugate(p1_re, p1_im, gu1_re, gu1_im)
    gw_re, gw_im = gw_re + x_re, gw_im + x_im
    x_re, x_im = times_conjugate(p2_re, p2_im, gu2_re, gu2_im)
    gw_re, gw_im = gw_re + x_re, gw_im + x_im
    g = read_factor(of_G + h * N * RANK, n, half, RANK)
    x_re, x_im = times_conjugate(g[0], g[1], p1_re, p1_im)
    gw_re, gw_im = gw_re + x_re, gw_im + x_im
    x_re, x_im = times_conjugate(g[2], g[3], p2_re, p2_im)
    gw_re, gw_im = gw_re + x_re, gw_im + x_im
    x_re, x_im = times_conjugate(w_re, w_im, gu1_re, gu1_im)
    y_re, y_im = times(w_re, w_im, g[0], g[1])
    write_pair(of_P + h * row, gp1_re + x_re + y_re, gp1_im + x_im + y_im, n, half)
    if RANK == 2:
        x_re, x_im = times_conjugate(w_re, w_im, gu2_re, gu2_im)
        y_re, y_im = times(w_re, w_im, g[2], g[3])
        write_pair(of_P + of_second + h * row, gp2_re + x_re + y_re, gp2_im + x_im + y_im, n, half)
    x_re, x_im = times_conjugate(w_re, w_im, gwb_re, gwb_im)
    write_pair(of_B + h * row, x_re, x_im, n, half)
    # w = 1 / (1 - z / 2): its slope is w^2 / 2; z = dt Lambda
    x_re, x_im = times(w_re, w_im, w_re, w_im)
    z_re, z_im = times_conjugate(0.5 * x_re, 0.5 * x_im, gw_re, gw_im)
    tl.store(of_log_re + h * half_row + n, -dt * rate * z_re, mask=n < half)
    tl.store(of_im + h * half_row + n, dt * z_im, mask=n < half)
    frequency = tl.load(Lambda_im + s * half + n, mask=n < half, other=0.0)
    of_dt += tl.sum(z_im * frequency - z_re * rate, 0)
    tl.store(of_log_dt + h, dt * of_dt)
    c_re, c_im = read_pair(of_C_row + h * N, n, half)
    write_pair(of_C + h * N, 2.0 * c_re, -2.0 * c_im, n, half)


# ---- launches


def over_channels(H: int, S: int, N: int) -> tuple[tuple[int], tuple[int, int], dict]:
    """A launch over H channels that share S systems of N states: the grid, (S, N/2), and what is constant."""
    return (H,), (S, N // 2), {"HALF": max(16, triton.next_power_of_2(N // 2)), "num_warps": 1}


def sum_up_shared(found: list[torch.Tensor], H: int, S: int) -> list[torch.Tensor]:
    """Gradients (H, ...) of what H channels have of S systems -> (S, ...), summed over the channels in order."""
    return found if S == H else [x.unflatten(0, (H // S, S)).sum(0) for x in found]


def _launch(log_dt, P) -> tuple[tuple[int], tuple[int, int], dict]:
    rank, S, N = P.shape
    grid, sizes, constants = over_channels(len(log_dt), S, N)
    return grid, sizes, {"RANK": rank, **constants}


def _empty(log_dt, P) -> tuple[torch.Tensor, ...]:
    (H,), (rank, _, N) = log_dt.shape, P.shape
    vectors, factors = (H, N), (H, N, rank)
    return tuple(log_dt.new_empty(shape) for shape in (vectors, factors, factors, vectors, vectors))


def run_forward(
    log_dt: torch.Tensor,
    Lambda_log_re: torch.Tensor,
    Lambda_im: torch.Tensor,
    P: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """E, F, G, B_bar and C_row; see `bilinear_dplr`."""
    inputs = [x.contiguous() for x in (log_dt, Lambda_log_re, Lambda_im, P, B, C)]
    outputs = _empty(log_dt, P)
    grid, sizes, options = _launch(log_dt, P)
    if len(log_dt):
        with on_device(log_dt.device):
            bilinear_kernel[grid](*inputs, *outputs, *sizes, **options)
    return outputs


def run_backward(
    of_E: torch.Tensor,
    of_F: torch.Tensor,
    of_G: torch.Tensor,
    of_B_bar: torch.Tensor,
    of_C_row: torch.Tensor,
    log_dt: torch.Tensor,
    Lambda_log_re: torch.Tensor,
    Lambda_im: torch.Tensor,
    P: torch.Tensor,
    B: torch.Tensor,
) -> list[torch.Tensor]:
    """The gradients of log_dt, of C and of Lambda_log_re, Lambda_im, B and P. What channels share is summed over them
    in order, in one launch: then the last four are one (S, N/2 + N/2 + N + rank N), see `parts`.
    """
    (H,), (rank, S, N) = log_dt.shape, P.shape
    gradients = [x.contiguous() for x in (of_E, of_F, of_G, of_B_bar, of_C_row)]
    inputs = [x.contiguous() for x in (log_dt, Lambda_log_re, Lambda_im, P, B)]
    of_log_dt, of_C = torch.empty_like(log_dt), log_dt.new_empty(H, N)
    if S == H:
        found = [log_dt.new_empty(shape) for shape in ((H, N // 2), (H, N // 2), (H, N), (rank, H, N))]
        of_log_re, of_im, of_B, of_P = found
    else:
        found = [log_dt.new_empty(H, 2 * N + rank * N)]
        of_log_re, of_im, of_B, of_P = parts(*found, rank)
    strides = of_log_re.stride(0), of_B.stride(0), of_P.stride(0)
    grid, sizes, options = _launch(log_dt, P)
    if H:
        with on_device(log_dt.device):
            bilinear_gradient_kernel[grid](
                *inputs, *gradients, of_log_dt, of_log_re, of_im, of_P, of_B, of_C, *sizes, *strides, **options
            )
    return [of_log_dt, of_C, *sum_up_shared(found, H, S)]


def parts(shared: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of Lambda_log_re and Lambda_im (S, N/2), of B (S, N) and of P (rank, S, N), of one tensor."""
    N = shared.shape[1] // (2 + rank)
    of_log_re, of_im, of_B, of_P = shared.split([N // 2, N // 2, N, rank * N], 1)
    return of_log_re, of_im, of_B, of_P.unflatten(1, (rank, N)).transpose(0, 1)


# what the compiler and autograd see
discretize = torch.library.custom_op(qualified("dplr_discretization"), run_forward, mutates_args=())
discretize_backward = torch.library.custom_op(qualified("dplr_discretization_backward"), run_backward, mutates_args=())


@discretize.register_fake
def _(log_dt, Lambda_log_re, Lambda_im, P, B, C):
    return _empty(log_dt, P)


@discretize_backward.register_fake
def _(of_E, of_F, of_G, of_B_bar, of_C_row, log_dt, Lambda_log_re, Lambda_im, P, B):
    found = [x.new_empty(x.shape) for x in (log_dt, of_C_row)]
    rank, S, N = P.shape
    if S != len(log_dt):
        return [*found, P.new_empty(S, 2 * N + rank * N)]
    return found + [x.new_empty(x.shape) for x in (Lambda_log_re, Lambda_im, B, P)]


def save(ctx, inputs, output):
    """For `backward`, by autograd."""
    ctx.save_for_backward(*inputs[:5])


def backward(ctx, *gradients, run=discretize_backward):
    """The gradients of all inputs of `discretize`."""
    of_log_dt, of_C, *found = run(*gradients, *ctx.saved_tensors)
    of_log_re, of_im, of_B, of_P = parts(*found, len(ctx.saved_tensors[3])) if len(found) == 1 else found
    return of_log_dt, of_log_re, of_im, of_P, of_B, of_C


discretize.register_autograd(backward, setup_context=save)


def dplr_discretization(log_dt, Lambda_log_re, Lambda_im, P, B, C) -> DiscreteDPLR:
    """`bilinear_dplr` by the kernel."""
    return DiscreteDPLR(*discretize(log_dt, Lambda_log_re, Lambda_im, P, B, C))


# ---- what the registry asks for


def example(H: int, S: int, N: int, rank: int, device=None) -> list[torch.Tensor]:
    """log_dt, Lambda_log_re, Lambda_im, P, B and C of H channels that share S systems."""
    generator = torch.Generator().manual_seed(0)
    shapes = (H,), (S, N // 2), (S, N // 2), (rank, S, N), (S, N), (H, N)
    log_dt, log_re, im, *others = (torch.randn(shape, generator=generator) for shape in shapes)
    return [x.to(device) for x in (log_dt - 4, 0.5 * log_re - 0.5, 20 * im, *others)]


PROBLEMS = [(64, 1), (64, 2), (6, 1)]  # what models have: states a channel, rank


def self_check_cases(device: torch.device, *problem) -> list[Case]:
    """Of one problem, as PROBLEMS lists them, or of all of these: channels that share systems."""
    return [_case(device, *each) for each in ([problem] if problem else PROBLEMS)]


def _case(device, N, rank) -> Case:
    leaves = example(6, 3, N, rank, device)
    generator = torch.Generator().manual_seed(1)
    shapes = (6, N), (6, N, rank), (6, N, rank), (6, N), (6, N)
    weights = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
    label = f"discretisation of rank {rank}, N = {N}"
    return gradient_case(label, dplr_discretization, bilinear_dplr, leaves, weights, 2e-5)
