"""The operators of a chunk of S4 on a GPU: one launch forward, two back. The twin is dplr_operators.py.

No matrix is squared. A channel's program walks the T tokens of the chunk; a product with A = R(E) - F G^T takes O(N):

    x_{j+1} = A x_j,  x_0 = B         columns: inject; C x_j: taps
    y_j = y_{j-1} A,  y_{-1} = C      rows: emit
    v_{j+1} = v_j A,  v_0 = G^T       the rows by which the carry grows:
    A^{j+1} = R(E) A^j - F v_j        elementwise in A^j, which stays in registers

The backward goes through the same recurrences. That of A^j is linear in it, so that its adjoint is M, the gradient of
the carry, times conj(E)^k: what is left are sums over tokens of rows v_j times powers of E (`carry_gradient_kernel`,
which also writes v_j and the gradients U that the carry sends to them). The three vectors' adjoints then walk from the
last token to the first (`chain_gradient_kernel`), with x_j and y_j read from the operators themselves.

All numbers are float32 and all sums are of float32 products, none of TF32; a vector of N is a pair of halves (re, im),
(1, HALF) along rows of a matrix, (HALF, 1) along its columns. No atomics. Another T or H compiles nothing new.
"""

from functools import partial

import torch

from .chunked import ChunkOperators, operator_shapes
from .dplr_operators import krylov_operators
from .kernel_launch import on_device, qualified
from .kernels_s4 import Case, gradient_case

try:
    import triton
    import triton.language as tl
except ImportError:  # `kernels_s4` asks for this module in a `try` of its own, and reports the cause
    raise


@triton.jit
def read_pair(x, n, half):
    """The halves of a vector of 2 half numbers, 0 beyond them."""
    return tl.load(x + n, mask=n < half, other=0.0), tl.load(x + half + n, mask=n < half, other=0.0)


@triton.jit
def read_factor(x, n, half, RANK: tl.constexpr):
    """The halves of the columns of a factor (2 half, RANK): re, im, re, im; zeros for a second one where it has one."""
    first_re, first_im = read_column(x, 0, n, half, RANK)
    second_re, second_im = read_column(x, 1, n, half, RANK)
    return first_re, first_im, second_re, second_im


@triton.jit
def read_column(x, r: tl.constexpr, n, half, RANK: tl.constexpr):
    inside = (n < half) & (r < RANK)
    at = n * RANK + r
    return tl.load(x + at, mask=inside, other=0.0), tl.load(x + half * RANK + at, mask=inside, other=0.0)


@triton.jit
def write_pair(x, pair_re, pair_im, n, half):
    tl.store(x + n, pair_re, mask=n < half)
    tl.store(x + half + n, pair_im, mask=n < half)


@triton.jit
def write_columns(inject, re, im, at, n, T, half):
    """Columns `at` (rows of these tiles) of a matrix (2 half, T), by their halves; those before the first are none."""
    inside = (at >= 0) & (n < half)
    tl.store(inject + n * T + at, re, mask=inside)
    tl.store(inject + (half + n) * T + at, im, mask=inside)


@triton.jit
def dot(a_re, a_im, b_re, b_im):
    """(1, 1): the product of two rows."""
    return tl.sum(a_re * b_re + a_im * b_im, 1, keep_dims=True)


@triton.jit
def turn(e_re, e_im, x_re, x_im):
    """R(E) x; with -e_im its transposed."""
    return e_re * x_re - e_im * x_im, e_im * x_re + e_re * x_im


@triton.jit
def turn_rows(e_re, e_im, rr, ri, ir, ii):
    """R(E) times a matrix in quarters; e down its rows."""
    rr, ir = turn(e_re, e_im, rr, ir)
    ri, ii = turn(e_re, e_im, ri, ii)
    return rr, ri, ir, ii


@triton.jit
def multiply(e_re, e_im, f, g, x_re, x_im, RANK: tl.constexpr):
    """(R(E) - F G^T) x, with f and g the halves of their columns; with -e_im, and g before f, the product from the
    left.
    """
    out_re, out_im = turn(e_re, e_im, x_re, x_im)
    s = dot(g[0], g[1], x_re, x_im)
    out_re, out_im = out_re - s * f[0], out_im - s * f[1]
    if RANK == 2:
        s = dot(g[2], g[3], x_re, x_im)
        out_re, out_im = out_re - s * f[2], out_im - s * f[3]
    return out_re, out_im


# lengths are no constants: another one compiles nothing new
@triton.jit(do_not_specialize=["T", "half", "has_skip"])
def operators_kernel(
    E,
    F,
    G,
    B,
    C,
    skip,
    taps,
    emit,
    inject,
    carry,
    T,
    half,
    has_skip,
    RANK: tl.constexpr,
    HALF: tl.constexpr,
    STEPS: tl.constexpr,
):
    """taps (H, T), emit (H, T, N), inject (H, N, T), carry (H, N, N) of E, B, C (H, N), F and G (H, N, RANK).
    skip (H,) is added to the first tap, or is not read where has_skip is 0.
    """
    h, N = tl.program_id(0).to(tl.int64), 2 * half
    n = tl.arange(0, HALF)[None, :]
    m = tl.arange(0, HALF)[:, None]
    e_re, e_im = read_pair(E + h * N, n, half)
    f, g = read_factor(F + h * N * RANK, n, half, RANK), read_factor(G + h * N * RANK, n, half, RANK)
    c_re, c_im = read_pair(C + h * N, n, half)
    x_re, x_im = read_pair(B + h * N, n, half)
    y_re, y_im, v_re, v_im, w_re, w_im = c_re, c_im, g[0], g[1], g[2], g[3]
    # down the rows of A^j
    down_re, down_im = read_pair(E + h * N, m, half)
    down = read_factor(F + h * N * RANK, m, half, RANK)
    # A^j in quarters, by the halves of its rows and of its columns
    rr = tl.where((m == n) & (n < half), 1.0, 0.0)
    ri = tl.zeros((HALF, HALF), tl.float32)
    ir, ii = ri, rr
    i = tl.arange(0, STEPS)[:, None]
    d = tl.load(skip + h, mask=has_skip != 0, other=0.0)
    for first in range(0, T, STEPS):
        # columns, the last one first, as inject has them
        columns_re = tl.zeros((STEPS, HALF), tl.float32)
        columns_im = columns_re
        for step in range(tl.minimum(STEPS, T - first)):
            is_step = i == STEPS - 1 - step
            columns_re, columns_im = tl.where(is_step, x_re, columns_re), tl.where(is_step, x_im, columns_im)
            x_re, x_im = multiply(e_re, e_im, f, g, x_re, x_im, RANK)
            y_re, y_im = multiply(e_re, -e_im, g, f, y_re, y_im, RANK)
            # always so; a solver of addresses takes the bounds of the two loops apart
            is_token = first + step < T
            write_pair(emit + (h * T + first + step) * N, y_re, y_im, n, tl.where(is_token, half, 0))
            rr, ri, ir, ii = turn_rows(down_re, down_im, rr, ri, ir, ii)
            rr, ri, ir, ii = rr - down[0] * v_re, ri - down[0] * v_im, ir - down[1] * v_re, ii - down[1] * v_im
            v_re, v_im = multiply(e_re, -e_im, g, f, v_re, v_im, RANK)
            if RANK == 2:
                rr, ri, ir, ii = rr - down[2] * w_re, ri - down[2] * w_im, ir - down[3] * w_re, ii - down[3] * w_im
                w_re, w_im = multiply(e_re, -e_im, g, f, w_re, w_im, RANK)
        at = T - STEPS - first + i  # of inject
        write_columns(inject + h * N * T, columns_re, columns_im, at, n, T, half)
        tap = dot(c_re, c_im, columns_re, columns_im)
        tl.store(taps + h * T + T - 1 - at, tl.where(at == T - 1, tap + d, tap), mask=at >= 0)
    at = h * N * N + m * N + n
    inside = (m < half) & (n < half)
    tl.store(carry + at, rr, mask=inside)
    tl.store(carry + at + half, ri, mask=inside)
    tl.store(carry + at + half * N, ir, mask=inside)
    tl.store(carry + at + half * N + half, ii, mask=inside)


@triton.jit
def read_matrix(x, m, n, row, half):
    """The quarters of a matrix whose rows lie `row` numbers apart."""
    at, inside = m * row + n, (m < half) & (n < half)
    rr = tl.load(x + at, mask=inside, other=0.0)
    ri = tl.load(x + at + half, mask=inside, other=0.0)
    ir = tl.load(x + at + half * row, mask=inside, other=0.0)
    ii = tl.load(x + at + half * row + half, mask=inside, other=0.0)
    return rr, ri, ir, ii


@triton.jit
def sum_of_rows(a, g):
    """(HALF, 1) each: the sums over columns of conj(a) g, both in quarters."""
    re = tl.sum(a[0] * g[0] + a[2] * g[2] + a[1] * g[1] + a[3] * g[3], 1, keep_dims=True)
    im = tl.sum(a[0] * g[2] - a[2] * g[0] + a[1] * g[3] - a[3] * g[1], 1, keep_dims=True)
    return re, im


@triton.jit
def weigh_rows(p_re, p_im, g):
    """(1, HALF) each: minus the product of a vector down the rows of a matrix, in quarters, with it."""
    re = -tl.sum(p_re * g[0] + p_im * g[2], 0, keep_dims=True)
    im = -tl.sum(p_re * g[1] + p_im * g[3], 0, keep_dims=True)
    return re, im


# the gradients of operators are parts of one matrix, which begin anywhere
@triton.jit(do_not_specialize=["T", "half", "head", "row"], do_not_specialize_on_alignment=["of_carry"])
def carry_gradient_kernel(
    E,
    F,
    G,
    of_carry,
    rows,
    of_rows,
    of_E,
    of_F,
    T,
    half,
    head,
    row,
    RANK: tl.constexpr,
    HALF: tl.constexpr,
):
    """rows (H, T, RANK, N), v_j, and of_rows, what the carry sends to them; what it sends to E and F with these left
    as they are: of_E (H, N), of_F (H, N, RANK). of_carry: (H, N, N), heads and rows so many numbers apart.

    By A^T = E^T - sum_r F_r D_r of complex rows and real columns: D = sum_j E^(T-1-j) v_j, and its slope in E.
    """
    h, N = tl.program_id(0).to(tl.int64), 2 * half
    n = tl.arange(0, HALF)[None, :]
    m = tl.arange(0, HALF)[:, None]
    gradient = read_matrix(of_carry + h * head, m, n, row, half)
    e_re, e_im = read_pair(E + h * N, n, half)
    f, g = read_factor(F + h * N * RANK, n, half, RANK), read_factor(G + h * N * RANK, n, half, RANK)
    down_re, down_im = read_pair(E + h * N, m, half)
    down = read_factor(F + h * N * RANK, m, half, RANK)
    v_re, v_im, w_re, w_im = g[0], g[1], g[2], g[3]
    p_re, p_im, r_re, r_im = down[0], down[1], down[2], down[3]  # E^k F
    q_re, q_im = tl.where(m < half, 1.0, 0.0), tl.zeros((HALF, 1), tl.float32)  # E^k
    zero = tl.zeros((HALF, HALF), tl.float32)
    d_rr, d_ri, d_ir, d_ii = zero, zero, zero, zero
    b_rr, b_ri, b_ir, b_ii = zero, zero, zero, zero  # of the second column
    s_rr, s_ri, s_ir, s_ii = zero, zero, zero, zero  # the slope of sum_r F_r D_r
    for j in range(T):
        at, back = (h * T + j) * RANK * N, (h * T + T - 1 - j) * RANK * N
        write_pair(rows + at, v_re, v_im, n, half)
        u_re, u_im = weigh_rows(p_re, p_im, gradient)
        write_pair(of_rows + back, u_re, u_im, n, half)
        s_rr, s_ri, s_ir, s_ii = turn_rows(down_re, down_im, s_rr, s_ri, s_ir, s_ii)
        t_rr, t_ri, t_ir, t_ii = turn_rows(down[0], down[1], d_rr, d_ri, d_ir, d_ii)
        s_rr, s_ri, s_ir, s_ii = s_rr + t_rr, s_ri + t_ri, s_ir + t_ir, s_ii + t_ii
        d_rr, d_ri, d_ir, d_ii = turn_rows(down_re, down_im, d_rr, d_ri, d_ir, d_ii)
        d_rr, d_ri = d_rr + v_re, d_ri + v_im
        v_re, v_im = multiply(e_re, -e_im, g, f, v_re, v_im, RANK)
        p_re, p_im = turn(down_re, down_im, p_re, p_im)
        if RANK == 2:
            write_pair(rows + at + N, w_re, w_im, n, half)
            u_re, u_im = weigh_rows(r_re, r_im, gradient)
            write_pair(of_rows + back + N, u_re, u_im, n, half)
            t_rr, t_ri, t_ir, t_ii = turn_rows(down[2], down[3], b_rr, b_ri, b_ir, b_ii)
            s_rr, s_ri, s_ir, s_ii = s_rr + t_rr, s_ri + t_ri, s_ir + t_ir, s_ii + t_ii
            b_rr, b_ri, b_ir, b_ii = turn_rows(down_re, down_im, b_rr, b_ri, b_ir, b_ii)
            b_rr, b_ri = b_rr + w_re, b_ri + w_im
            w_re, w_im = multiply(e_re, -e_im, g, f, w_re, w_im, RANK)
            r_re, r_im = turn(down_re, down_im, r_re, r_im)
        if j < T - 1:
            q_re, q_im = turn(down_re, down_im, q_re, q_im)
    # T conj(E)^(T-1) times the diagonal, as of the complex product
    at, inside = of_carry + h * head + m * row + m, m < half
    a = tl.load(at, mask=inside, other=0.0) + tl.load(at + half * row + half, mask=inside, other=0.0)
    b = tl.load(at + half * row, mask=inside, other=0.0) - tl.load(at + half, mask=inside, other=0.0)
    s_re, s_im = sum_of_rows((s_rr, s_ri, s_ir, s_ii), gradient)
    write_pair(of_E + h * N, T * (q_re * a + q_im * b) - s_re, T * (q_re * b - q_im * a) - s_im, m, half)
    d_re, d_im = sum_of_rows((d_rr, d_ri, d_ir, d_ii), gradient)
    write_column(of_F + h * N * RANK, 0, -d_re, -d_im, m, half, RANK)
    if RANK == 2:
        b_re, b_im = sum_of_rows((b_rr, b_ri, b_ir, b_ii), gradient)
        write_column(of_F + h * N * RANK, 1, -b_re, -b_im, m, half, RANK)


@triton.jit
def write_column(x, r: tl.constexpr, re, im, n, half, RANK: tl.constexpr):
    """Column r of a factor, by its halves."""
    tl.store(x + n * RANK + r, re, mask=n < half)
    tl.store(x + (half + n) * RANK + r, im, mask=n < half)


@triton.jit
def add_product(sums, f, g, x_re, x_im, l_re, l_im, RANK: tl.constexpr):
    """`sums`, the gradients of E (re, im) and of the halves of the columns of F and G, with those of l^T A x."""
    s, t = dot(g[0], g[1], x_re, x_im), dot(f[0], f[1], l_re, l_im)
    e_re, e_im = sums[0] + x_re * l_re + x_im * l_im, sums[1] + x_re * l_im - x_im * l_re
    f_re, f_im, g_re, g_im = sums[2] - s * l_re, sums[3] - s * l_im, sums[4] - t * x_re, sums[5] - t * x_im
    f2_re, f2_im, g2_re, g2_im = sums[6], sums[7], sums[8], sums[9]
    if RANK == 2:
        s, t = dot(g[2], g[3], x_re, x_im), dot(f[2], f[3], l_re, l_im)
        f2_re, f2_im, g2_re, g2_im = f2_re - s * l_re, f2_im - s * l_im, g2_re - t * x_re, g2_im - t * x_im
    return e_re, e_im, f_re, f_im, g_re, g_im, f2_re, f2_im, g2_re, g2_im


@triton.jit
def read_before(x, j, n, half):
    """`read_pair` of what lies before token j, zeros at the first."""
    inside = (n < half) & (j > 0)
    return tl.load(x + n, mask=inside, other=0.0), tl.load(x + half + n, mask=inside, other=0.0)


@triton.jit
def read_rows(rows, of_rows, token, r: tl.constexpr, j, n, half, RANK: tl.constexpr):
    """Row r of v_{j-1}, zeros at the first token, and the gradient that the carry sends to that of v_j."""
    N = 2 * half
    v_re, v_im = read_before(rows + ((token - 1) * RANK + r) * N, j, n, half)
    g_re, g_im = read_pair(of_rows + (token * RANK + r) * N, n, half)
    return v_re, v_im, g_re, g_im


@triton.jit(
    do_not_specialize=["T", "half", "emit_head", "emit_row", "inject_head", "inject_row"],
    do_not_specialize_on_alignment=["of_emit", "of_inject"],
)
def chain_gradient_kernel(
    E,
    F,
    G,
    B,
    C,
    emit,
    inject,
    rows,
    of_rows,
    of_taps,
    of_emit,
    of_inject,
    of_E,
    of_F,
    of_G,
    of_B,
    of_C,
    of_skip,
    T,
    half,
    emit_head,
    emit_row,
    inject_head,
    inject_row,
    RANK: tl.constexpr,
    HALF: tl.constexpr,
):
    """Adds to of_E and of_F, and writes of_G (H, N, RANK), of_B and of_C (H, N) and of_skip (H,): from the last token
    to the first, the gradients l of x_j, y_j and v_j, each the input of the one before.
    """
    h, N = tl.program_id(0).to(tl.int64), 2 * half
    n = tl.arange(0, HALF)[None, :]
    e_re, e_im = read_pair(E + h * N, n, half)
    f, g = read_factor(F + h * N * RANK, n, half, RANK), read_factor(G + h * N * RANK, n, half, RANK)
    c_re, c_im = read_pair(C + h * N, n, half)
    e_sum = read_pair(of_E + h * N, n, half)
    f_sum = read_factor(of_F + h * N * RANK, n, half, RANK)
    zero = tl.zeros((1, HALF), tl.float32)
    sums = (e_sum[0], e_sum[1], f_sum[0], f_sum[1], zero, zero, f_sum[2], f_sum[3], zero, zero)
    to_c_re, to_c_im = zero, zero
    lx_re, lx_im, ly_re, ly_im, lv_re, lv_im, lw_re, lw_im = zero, zero, zero, zero, zero, zero, zero, zero
    for step in range(T):
        j = T - 1 - step
        # x_{j+1} = A x_j, and C x_j is a tap; inject has the last column first
        at = inject + (h * N + n) * T + step
        x_re = tl.load(at, mask=n < half, other=0.0)
        x_im = tl.load(at + half * T, mask=n < half, other=0.0)
        tap = tl.load(of_taps + h * T + j)
        sums = add_product(sums, f, g, x_re, x_im, lx_re, lx_im, RANK)
        to_c_re, to_c_im = to_c_re + tap * x_re, to_c_im + tap * x_im
        lx_re, lx_im = multiply(e_re, -e_im, g, f, lx_re, lx_im, RANK)
        at = of_inject + h * inject_head + n * inject_row + step
        lx_re += tl.load(at, mask=n < half, other=0.0) + tap * c_re
        lx_im += tl.load(at + half * inject_row, mask=n < half, other=0.0) + tap * c_im
        # y_j = y_{j-1} A, and y_{-1} is C
        y_re, y_im = read_pair(of_emit + h * emit_head + j * emit_row, n, half)
        ly_re, ly_im = ly_re + y_re, ly_im + y_im
        y_re, y_im = read_before(emit + (h * T + j - 1) * N, j, n, half)
        y_re, y_im = tl.where(j > 0, y_re, c_re), tl.where(j > 0, y_im, c_im)
        sums = add_product(sums, f, g, ly_re, ly_im, y_re, y_im, RANK)
        ly_re, ly_im = multiply(e_re, e_im, f, g, ly_re, ly_im, RANK)
        # v_j = v_{j-1} A, and v_0 is G
        v_re, v_im, g_re, g_im = read_rows(rows, of_rows, h * T + j, 0, j, n, half, RANK)
        lv_re, lv_im = lv_re + g_re, lv_im + g_im
        sums = add_product(sums, f, g, lv_re, lv_im, v_re, v_im, RANK)
        g_re, g_im = multiply(e_re, e_im, f, g, lv_re, lv_im, RANK)
        lv_re, lv_im = tl.where(j > 0, g_re, lv_re), tl.where(j > 0, g_im, lv_im)
        if RANK == 2:
            v_re, v_im, g_re, g_im = read_rows(rows, of_rows, h * T + j, 1, j, n, half, RANK)
            lw_re, lw_im = lw_re + g_re, lw_im + g_im
            sums = add_product(sums, f, g, lw_re, lw_im, v_re, v_im, RANK)
            g_re, g_im = multiply(e_re, e_im, f, g, lw_re, lw_im, RANK)
            lw_re, lw_im = tl.where(j > 0, g_re, lw_re), tl.where(j > 0, g_im, lw_im)
    write_pair(of_E + h * N, sums[0], sums[1], n, half)
    write_column(of_F + h * N * RANK, 0, sums[2], sums[3], n, half, RANK)
    write_column(of_G + h * N * RANK, 0, sums[4] + lv_re, sums[5] + lv_im, n, half, RANK)
    if RANK == 2:
        write_column(of_F + h * N * RANK, 1, sums[6], sums[7], n, half, RANK)
        write_column(of_G + h * N * RANK, 1, sums[8] + lw_re, sums[9] + lw_im, n, half, RANK)
    write_pair(of_B + h * N, lx_re, lx_im, n, half)
    write_pair(of_C + h * N, to_c_re + ly_re, to_c_im + ly_im, n, half)
    tl.store(of_skip + h, tl.load(of_taps + h * T))


# ---- launches

STEPS = 16  # tokens whose columns are written together
WARPS = {"operators": 8, "carry": 8, "chain": 1}


def _launch(E, F, length: int) -> tuple[tuple[int], tuple[int, int], dict]:
    """The grid, (T, N/2), and what is constant."""
    half = E.shape[1] // 2
    return (len(E),), (length, half), {"RANK": F.shape[2], "HALF": max(16, triton.next_power_of_2(half))}


def run_forward(
    E: torch.Tensor,
    F: torch.Tensor,
    G: torch.Tensor,
    B_bar: torch.Tensor,
    C_row: torch.Tensor,
    length: int,
    skip: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """taps, emit, inject and carry; see `krylov_operators`."""
    outputs = _empty(E, length)
    grid, sizes, constants = _launch(E, F, length)
    inputs = [x.contiguous() for x in (E, F, G, B_bar, C_row, C_row if skip is None else skip)]
    if len(E):
        with on_device(E.device):
            operators_kernel[grid](
                *(*inputs, *outputs, *sizes, int(skip is not None)),
                **constants,
                STEPS=STEPS,
                num_warps=WARPS["operators"],
                num_stages=1,
            )
    return outputs


def _empty(E, T) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    H, N = E.shape
    return tuple(E.new_empty(shape) for shape in operator_shapes(H, T, N, dense=True))


def run_backward(
    of_taps: torch.Tensor,
    of_emit: torch.Tensor,
    of_inject: torch.Tensor,
    of_carry: torch.Tensor,
    E: torch.Tensor,
    F: torch.Tensor,
    G: torch.Tensor,
    B_bar: torch.Tensor,
    C_row: torch.Tensor,
    emit: torch.Tensor,
    inject: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of E, F, G, B_bar, C_row and of a skip."""
    (H, T, N), rank = emit.shape, F.shape[2]
    of_emit, of_inject, of_carry = (x if x.stride(2) == 1 else x.contiguous() for x in (of_emit, of_inject, of_carry))
    E, F, G, B_bar, C_row = (x.contiguous() for x in (E, F, G, B_bar, C_row))
    of_E, of_B, of_C = (E.new_empty(H, N) for _ in range(3))
    of_F, of_G = (E.new_empty(H, N, rank) for _ in range(2))
    of_skip = E.new_empty(H)
    rows, of_rows = (E.new_empty(H, T, rank, N) for _ in range(2))
    grid, sizes, constants = _launch(E, F, T)
    if H:
        with on_device(E.device):
            carry_gradient_kernel[grid](
                E,
                F,
                G,
                of_carry,
                rows,
                of_rows,
                of_E,
                of_F,
                *sizes,
                *of_carry.stride()[:2],
                **constants,
                num_warps=WARPS["carry"],
                num_stages=1,
            )
            chain_gradient_kernel[grid](
                E,
                F,
                G,
                B_bar,
                C_row,
                emit,
                inject,
                rows,
                of_rows,
                of_taps.contiguous(),
                of_emit,
                of_inject,
                of_E,
                of_F,
                of_G,
                of_B,
                of_C,
                of_skip,
                *sizes,
                *of_emit.stride()[:2],
                *of_inject.stride()[:2],
                **constants,
                num_warps=WARPS["chain"],
                num_stages=1,
            )
    return of_E, of_F, of_G, of_B, of_C, of_skip


# what the compiler and autograd see
make_operators = torch.library.custom_op(qualified("dplr_operators"), run_forward, mutates_args=())
make_operators_backward = torch.library.custom_op(qualified("dplr_operators_backward"), run_backward, mutates_args=())


@make_operators.register_fake
def _(E, F, G, B_bar, C_row, length, skip):
    return _empty(E, length)


@make_operators_backward.register_fake
def _(of_taps, of_emit, of_inject, of_carry, E, F, G, B_bar, C_row, emit, inject):
    return tuple(x.new_empty(x.shape) for x in (E, F, G, B_bar, C_row, E[:, 0]))


def save(ctx, inputs, output):
    """For `backward`, by autograd."""
    *tensors, _, skip = inputs
    _, emit, inject, _ = output
    ctx.save_for_backward(*tensors, emit, inject)
    ctx.has_skip = skip is not None


def backward(ctx, *gradients, run=make_operators_backward):
    """The gradients of all inputs of `make_operators`."""
    *found, of_skip = run(*gradients, *ctx.saved_tensors)
    return *found, None, of_skip if ctx.has_skip else None


make_operators.register_autograd(backward, setup_context=save)


def dplr_operators(E, F, G, B_bar, C_row, length: int, skip=None) -> ChunkOperators:
    """`krylov_operators` by the kernel."""
    return ChunkOperators(*make_operators(E, F, G, B_bar, C_row, length, skip))


# ---- what the registry asks for


def example(H: int, N: int, rank: int, device=None) -> list[torch.Tensor]:
    """E, F, G, B_bar and C_row of stable systems: those of the bilinear transform of diag(Lambda) - P P^*."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    P = torch.complex(normal(H, N // 2, rank), normal(H, N // 2, rank)) / (2 * N**0.5)
    rates = 0.05 + torch.rand(H, N // 2, generator=generator, dtype=torch.float64)
    w = 1 / (1 - 0.05 * torch.complex(-rates, 20 * normal(H, N // 2)))
    p, wP, G = (torch.cat([x.real, x.imag], 1) for x in (P, w[..., None] * P, w.conj()[..., None] * P))
    F = 0.2 * wP @ torch.linalg.inv(torch.eye(rank, dtype=p.dtype) + 0.1 * p.mT @ wP)
    E = 2 * w - 1
    return [x.to(device, torch.float32) for x in (torch.cat([E.real, E.imag], 1), F, G, normal(H, N), normal(H, N))]


PROBLEMS = [(64, 1), (64, 2), (6, 1)]  # what models have: states a channel, rank


def self_check_cases(device: torch.device, *problem) -> list[Case]:
    """Of one problem, as PROBLEMS lists them, or of all of these: several channels; a tile of tokens and a part."""
    return [_case(device, *each, T=STEPS + 8) for each in ([problem] if problem else PROBLEMS)]


def _case(device, N, rank, T) -> Case:
    generator = torch.Generator().manual_seed(1)
    leaves = [*example(3, N, rank, device), torch.randn(3, generator=generator).to(device)]
    shapes = operator_shapes(3, T, N, dense=True)
    weights = [torch.randn(shape, generator=generator).to(device) for shape in shapes]

    def run(make, E, F, G, B_bar, C_row, skip):
        return make(E, F, G, B_bar, C_row, T, skip)

    ours, twin = partial(run, dplr_operators), partial(run, krylov_operators)
    return gradient_case(f"operators of rank {rank}, N = {N}", ours, twin, leaves, weights, 2e-5)
