"""The scan of SSD on a GPU: within chunks by matrix products, over the chunks by a recurrence; forward and backward.

A head's state is (P, N), N as [real | imaginary], carried in float32. What lies in memory between the launches is in
the dtype of the tokens, as a product on tensor cores takes it. Chunks of T tokens, in three launches there, five back:

    ends      what a chunk adds to the state, (w v)^T b~                            a program a chunk and head
    carry     S_(k+1) = R_k (keep_k S_k + end_k), every chunk's start in its place   a program a head and 16 channels
    emit      y = (c~ b~^T o W) v + e^-decay c~ S_k + D v                           a program a chunk and head

with b~ and c~ turned back to their chunk's start as they are read, W_ij = exp(decay_j - decay_i) dt_j for j <= i of one
document, w_j the same seen from the chunk's end, R the turn over a chunk. The backward is the same three in reverse:
what y asks of each start (`ends` on the gradient and c~), the recurrence from the last chunk on, and the gradient of v
(`emit` with b~ and c~ in each other's place). Then

    vectors   the gradient of c~, and in reverse that of b~, with those of dt, decay and D   a program a chunk and head

each by itself, for the tiles of both are more than the registers hold. All heads share b and c: their gradients are
written a head, and summed in a fixed order, no atomics.

Where dt is a parameter, turns and decays are those of all rows and chunks, (E, T), which a launch of its own makes
(triton_ssd_system.py), and are read from cache.

Source: Dao and Gu (2024), section 6; the equations stand in ssd.py.
"""

from functools import partial

import torch

from .kernel_launch import in_rows, on_device, qualified
from .kernels_s4 import Case
from .ssd_chunks import heads_of, numbers_of_documents, scan_by, scan_vectors, sum_up_gradients, turns_of_chunks
from .triton_ssd_system import run_turns, run_turns_backward, turns_case

try:
    import triton
    import triton.language as tl
except ImportError:  # `kernels_s4` asks for this module in a `try` of its own, and reports the cause
    raise


CHANNELS, FEW_CHANNELS = 32, 16  # of a head at a time


@triton.jit
def place(L, T, chunks, E, SHARED: tl.constexpr):
    """(row, chunk, head, tokens of the chunk, the index of its operators) of a program of the grid (B chunks, E)."""
    row = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    head = tl.program_id(1)
    operators = head.to(tl.int64) if SHARED else (row * chunks + chunk) * E + head
    return row, chunk, head, tl.minimum(L - chunk * T, T), operators


@triton.jit
def reach(decay, numbers, at_operators, at_numbers, n, RESETS: tl.constexpr, T: tl.constexpr):
    """decay and number of document of each token; what of a token's weight reaches the end, and of the start's a token
    (both 0 beyond the n tokens); what of the start's reaches the end.
    """
    t = tl.arange(0, T)
    d = tl.load(decay + at_operators + t, mask=t < n, other=0.0)
    end = tl.load(decay + at_operators + n - 1)
    number = tl.zeros((T,), tl.int32)
    last = 0
    if RESETS:
        number = tl.load(numbers + at_numbers + t, mask=t < n, other=-1)
        last = tl.load(numbers + at_numbers + n - 1)
    to_end = tl.where((t < n) & (number == last), tl.exp(tl.minimum(d - end, 0.0)), 0.0)
    from_start = tl.where((t < n) & (number == 0), tl.exp(-d), 0.0)
    return d, number, to_end, from_start, tl.where(last == 0, tl.exp(-end), 0.0)


@triton.jit
def turns(cos, sin, at, n, M, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr):
    """(BLOCK_T, BLOCK_M) each, 0 outside."""
    t, m = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_M)
    where, inside = t[:, None] * M + m[None, :], (t[:, None] < n) & (m[None, :] < M)
    return tl.load(cos + at * M + where, mask=inside, other=0.0), tl.load(sin + at * M + where, mask=inside, other=0.0)


@triton.jit
def turned_back(x, at, n, M, cos, sin, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr):
    """Rows of 2 M numbers from the row `at`, turned by the negative angles: real and imaginary parts, float32.

    Each is a sum over two, which Triton leaves in the layout in which its terms were loaded. Written as a sum of two
    tiles it would be made in the layout of a product's operand, of which every warp holds the whole: twice the
    registers.
    """
    t, m = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_M)
    where = x + at * 2 * M + (t[:, None] * 2 * M + m[None, :])
    inside = (t[:, None] < n) & (m[None, :] < M)
    re = tl.load(where, mask=inside, other=0.0).to(tl.float32)
    im = tl.load(where + M, mask=inside, other=0.0).to(tl.float32)
    return tl.sum(tl.join(cos * re, sin * im), 2), tl.sum(tl.join(cos * im, -sin * re), 2)


@triton.jit
def values(x, stride, at, n, head, first, P, BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr):
    """A head's channels from `first` on, of tokens from the row `at` on, in rows `stride` apart, float32."""
    t, p = tl.arange(0, BLOCK_T), first + tl.arange(0, BLOCK_P)
    inside = (t[:, None] < n) & (p[None, :] < P)
    where = x + at * stride + head * P + (t[:, None] * stride + p[None, :])
    return tl.load(where, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def state_tile(states, here, first, P, M, BLOCK_P: tl.constexpr, BLOCK_M: tl.constexpr):
    """Pointers to the real parts of a head's states, channels from `first` on, in (heads, P, 2 M), and which there are;
    `here`: the head's number, over rows and chunks too.
    """
    p, m = first + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_M)
    return states + here * P * 2 * M + (p[:, None] * 2 * M + m[None, :]), (p[:, None] < P) & (m[None, :] < M)


@triton.jit
def multiply(a, b, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """a b, summed in float32; the factors rounded to DTYPE."""
    return tl.dot(a.to(DTYPE), b.to(DTYPE), input_precision=PRECISION)


@triton.jit(do_not_specialize=["L", "T", "chunks", "E"])
def ends_kernel(
    v,
    b,
    cos,
    sin,
    decay,
    step,
    numbers,
    ends,
    stride,
    L,
    T,
    chunks,
    E,
    P,
    M,
    REVERSE: tl.constexpr,
    RESETS: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """ends (B, chunks, E, P, 2 M): sum over tokens of w v b~^T, before the turn over the chunk. In reverse, of the
    gradient of y for v and c for b: what the chunk's outputs ask of its start. stride: of v's rows.
    Grid: (B chunks, E, blocks of channels).
    """
    row, chunk, head, n, at = place(L, T, chunks, E, SHARED)
    first = tl.program_id(2) * BLOCK_P
    t = tl.arange(0, BLOCK_T)
    _, _, to_end, from_start, _ = reach(decay, numbers, at * T, (row * chunks + chunk) * T, n, RESETS, BLOCK_T)
    if REVERSE:
        weight = from_start
    else:
        weight = to_end * tl.load(step + at * T + t, mask=t < n, other=0.0)
    co, si = turns(cos, sin, at * T, n, M, BLOCK_T, BLOCK_M)
    token = row * L + chunk * T
    b_re, b_im = turned_back(b, token, n, M, co, si, BLOCK_T, BLOCK_M)
    x = tl.trans(values(v, stride, token, n, head, first, P, BLOCK_T, BLOCK_P) * weight[:, None])
    where, inside = state_tile(ends, (row * chunks + chunk) * E + head, first, P, M, BLOCK_P, BLOCK_M)
    dtype: tl.constexpr = v.dtype.element_ty
    tl.store(where, multiply(x, b_re, dtype, PRECISION).to(ends.dtype.element_ty), mask=inside)
    tl.store(where + M, multiply(x, b_im, dtype, PRECISION).to(ends.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["L", "T", "chunks", "E"])
def carry_kernel(
    ends,
    initial,
    final,
    cos,
    sin,
    decay,
    numbers,
    L,
    T,
    chunks,
    E,
    P,
    M,
    REVERSE: tl.constexpr,
    RESETS: tl.constexpr,
    SHARED: tl.constexpr,
    INITIAL: tl.constexpr,
    KEEPS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Put the state that a chunk starts from in the place of what it adds, in `ends`, where KEEPS says that it will be
    read; final: the one after the last.

    In reverse, from the gradient `initial` of the final state: in the place of what the chunk's outputs ask of its
    start, the gradient of the state at its end before the turn; final: that of the initial state.
    Grid: (B E, blocks of channels).
    """
    row = (tl.program_id(0) // E).to(tl.int64)
    head = tl.program_id(0) % E
    first, m = tl.program_id(1) * BLOCK_P, tl.arange(0, BLOCK_M)
    last_state, inside = state_tile(final, row * E + head, first, P, M, BLOCK_P, BLOCK_M)
    s_re = tl.zeros((BLOCK_P, BLOCK_M), tl.float32)
    s_im = tl.zeros((BLOCK_P, BLOCK_M), tl.float32)
    if INITIAL:
        first_state, _ = state_tile(initial, row * E + head, first, P, M, BLOCK_P, BLOCK_M)
        s_re = tl.load(first_state, mask=inside, other=0.0)
        s_im = tl.load(first_state + M, mask=inside, other=0.0)
    for k in range(0, chunks):
        chunk = chunks - 1 - k if REVERSE else k
        last = tl.minimum(L - chunk * T, T) - 1
        at = (head.to(tl.int64) if SHARED else (row * chunks + chunk) * E + head) * T + last
        keep = tl.exp(-tl.load(decay + at))
        if RESETS:
            keep = tl.where(tl.load(numbers + (row * chunks + chunk) * T + last) == 0, keep, 0.0)
        co = tl.load(cos + at * M + m, mask=m < M, other=0.0)[None, :]
        si = tl.load(sin + at * M + m, mask=m < M, other=0.0)[None, :]
        where, _ = state_tile(ends, (row * chunks + chunk) * E + head, first, P, M, BLOCK_P, BLOCK_M)
        e_re = tl.load(where, mask=inside, other=0.0).to(tl.float32)
        e_im = tl.load(where + M, mask=inside, other=0.0).to(tl.float32)
        if REVERSE:
            s_re, s_im = co * s_re + si * s_im, co * s_im - si * s_re
        if KEEPS:
            tl.store(where, s_re.to(ends.dtype.element_ty), mask=inside)
            tl.store(where + M, s_im.to(ends.dtype.element_ty), mask=inside)
        s_re, s_im = keep * s_re + e_re, keep * s_im + e_im
        if not REVERSE:
            s_re, s_im = co * s_re - si * s_im, co * s_im + si * s_re
    tl.store(last_state, s_re, mask=inside)
    tl.store(last_state + M, s_im, mask=inside)


@triton.jit
def weights(d, number, n, REVERSE: tl.constexpr, RESETS: tl.constexpr, T: tl.constexpr):
    """[i, j]: exp(decay_j - decay_i) for j <= i of one document, among n tokens; else 0. In reverse, transposed."""
    t = tl.arange(0, T)
    if REVERSE:
        together = (t[:, None] <= t[None, :]) & (t[None, :] < n)
        apart = d[:, None] - d[None, :]
    else:
        together = (t[:, None] >= t[None, :]) & (t[:, None] < n)
        apart = d[None, :] - d[:, None]
    if RESETS:
        together = together & (number[:, None] == number[None, :])
    return tl.where(together, tl.exp(tl.minimum(apart, 0.0)), 0.0)


@triton.jit(do_not_specialize=["L", "T", "chunks", "E"])
def emit_kernel(
    v,
    b,
    c,
    cos,
    sin,
    decay,
    step,
    numbers,
    skip,
    starts,
    y,
    stride,
    L,
    T,
    chunks,
    E,
    P,
    M,
    REVERSE: tl.constexpr,
    RESETS: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y (B, L, E P) from every chunk's start. In reverse the gradient of v: from that of y for v, b and c in each
    other's place, and the gradient of every chunk's end before its turn for the starts. stride: of v's rows.
    Grid: (B chunks, E, blocks of channels).
    """
    row, chunk, head, n, at = place(L, T, chunks, E, SHARED)
    first = tl.program_id(2) * BLOCK_P
    t, p = tl.arange(0, BLOCK_T), first + tl.arange(0, BLOCK_P)
    dtype: tl.constexpr = v.dtype.element_ty
    d, number, to_end, from_start, _ = reach(decay, numbers, at * T, (row * chunks + chunk) * T, n, RESETS, BLOCK_T)
    dt = tl.load(step + at * T + t, mask=t < n, other=0.0)
    co, si = turns(cos, sin, at * T, n, M, BLOCK_T, BLOCK_M)
    token = row * L + chunk * T
    c_re, c_im = turned_back(c, token, n, M, co, si, BLOCK_T, BLOCK_M)
    b_re, b_im = turned_back(b, token, n, M, co, si, BLOCK_T, BLOCK_M)
    score = multiply(c_re, tl.trans(b_re), dtype, PRECISION) + multiply(c_im, tl.trans(b_im), dtype, PRECISION)
    score = score * weights(d, number, n, REVERSE, RESETS, BLOCK_T)
    if not REVERSE:
        score = score * dt[None, :]
    x = values(v, stride, token, n, head, first, P, BLOCK_T, BLOCK_P)
    inside_chunk = multiply(score, x, dtype, PRECISION)
    where, inside = state_tile(starts, (row * chunks + chunk) * E + head, first, P, M, BLOCK_P, BLOCK_M)
    out = multiply(c_re, tl.trans(tl.load(where, mask=inside, other=0.0)), dtype, PRECISION)
    out += multiply(c_im, tl.trans(tl.load(where + M, mask=inside, other=0.0)), dtype, PRECISION)
    if REVERSE:
        out = (out * to_end[:, None] + inside_chunk) * dt[:, None]
    else:
        out = out * from_start[:, None] + inside_chunk
    out += x * tl.load(skip + head * P + p, mask=p < P, other=0.0)[None, :]
    at_y = y + (token * E + head) * P + (t[:, None] * E * P + p[None, :])
    tl.store(at_y, out.to(y.dtype.element_ty), mask=(t[:, None] < n) & (p[None, :] < P))


@triton.jit
def store_turned(x, at, stride, n, M, re, im, co, si, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr):
    """Gradients of what was turned back, turned forth, to rows of 2 M numbers that are `stride` apart."""
    t, m = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_M)
    inside = (t[:, None] < n) & (m[None, :] < M)
    where = x + at + (t[:, None] * stride + m[None, :])
    tl.store(where, (co * re - si * im).to(x.dtype.element_ty), mask=inside)
    tl.store(where + M, (co * im + si * re).to(x.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["L", "T", "chunks", "E"])
def vectors_kernel(
    g,
    v,
    b,
    c,
    cos,
    sin,
    decay,
    step,
    numbers,
    starts,
    asked,
    gradient,
    grad_decay,
    grad_step,
    grad_angle,
    grad_skip,
    stride,
    L,
    T,
    chunks,
    E,
    P,
    M,
    REVERSE: tl.constexpr,
    RESETS: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """From g, the gradient of y, that of c, a head's part, (B, L, E, 2 M), and what goes through the weights of pairs
    of tokens and through the starts to grad_decay and grad_step (B, chunks, E, T); of D, grad_skip (B, chunks, E, P);
    what goes through c to grad_angle (B, chunks, E, T, M), or where steps are SHARED (B, chunks, E, M): summed over
    tokens, each as often as there are steps in its angle. stride: of v's rows.

    In reverse that of b, from g and `asked` (B, chunks, E, P, 2 M), the gradient of every chunk's end before its turn;
    what goes through b and the end is then added to those of decays, steps and angles. An angle turns back: its
    gradient is Re g Im b - Im g Re b, g that of b, both turned back or neither. A pair's part in the gradients of its
    two decays is one number, added and subtracted: as products of b and c with their gradients it would be two, rounded
    apart. Grid: (B chunks, E).
    """
    row, chunk, head, n, at = place(L, T, chunks, E, SHARED)
    t, m = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_M)
    dtype: tl.constexpr = v.dtype.element_ty
    here = (row * chunks + chunk) * E + head
    d, number, to_end, from_start, keep = reach(decay, numbers, at * T, (row * chunks + chunk) * T, n, RESETS, BLOCK_T)
    dt = tl.load(step + at * T + t, mask=t < n, other=0.0)
    token = row * L + chunk * T

    # what sums over channels, some at a time: a head of them is more than the registers hold
    score = tl.zeros((BLOCK_T, BLOCK_T), tl.float32)  # [i, j] g_i v_j, in reverse transposed
    re = tl.zeros((BLOCK_T, BLOCK_M), tl.float32)
    im = tl.zeros((BLOCK_T, BLOCK_M), tl.float32)
    through = tl.zeros((BLOCK_P, BLOCK_M), tl.float32)
    turn = tl.zeros((BLOCK_P, BLOCK_M), tl.float32)
    for first in range(0, P, BLOCK_P):
        dy = values(g, E * P, token, n, head, first, P, BLOCK_T, BLOCK_P)
        x = values(v, stride, token, n, head, first, P, BLOCK_T, BLOCK_P)
        where, inside = state_tile(starts, here, first, P, M, BLOCK_P, BLOCK_M)
        s_re = tl.load(where, mask=inside, other=0.0).to(tl.float32)
        s_im = tl.load(where + M, mask=inside, other=0.0).to(tl.float32)
        if REVERSE:
            where, _ = state_tile(asked, here, first, P, M, BLOCK_P, BLOCK_M)
            q_re = tl.load(where, mask=inside, other=0.0).to(tl.float32)
            q_im = tl.load(where + M, mask=inside, other=0.0).to(tl.float32)
            through += q_re * s_re + q_im * s_im
            turn += q_im * s_re - q_re * s_im
            score += multiply(x, tl.trans(dy), dtype, PRECISION)
            re += multiply(x, q_re, dtype, PRECISION)
            im += multiply(x, q_im, dtype, PRECISION)
        else:
            p = first + tl.arange(0, BLOCK_P)
            tl.store(grad_skip + here * P + p, tl.sum(dy * x, 0), mask=p < P)
            score += multiply(dy, tl.trans(x), dtype, PRECISION)
            re += multiply(dy, s_re, dtype, PRECISION)
            im += multiply(dy, s_im, dtype, PRECISION)

    apart = weights(d, number, n, REVERSE, RESETS, BLOCK_T)
    co, si = turns(cos, sin, at * T, n, M, BLOCK_T, BLOCK_M)
    b_re, b_im = turned_back(b, token, n, M, co, si, BLOCK_T, BLOCK_M)
    c_re, c_im = turned_back(c, token, n, M, co, si, BLOCK_T, BLOCK_M)
    at_decay, at_step = grad_decay + here * T + t, grad_step + here * T + t
    if REVERSE:
        re, im = re * to_end[:, None], im * to_end[:, None]
        reached = tl.sum(re * b_re + im * b_im, 1)
        at_end = tl.sum(dt * reached, 0) + keep * tl.sum(tl.sum(through, 1), 0)
        d_dt = tl.load(at_step, mask=t < T, other=0.0) + reached
        d_decay = tl.load(at_decay, mask=t < T, other=0.0) + dt * reached - tl.where(t == n - 1, at_end, 0.0)
        of_turn = keep * tl.sum(turn, 0) + tl.sum((im * b_re - re * b_im) * dt[:, None], 0)
        score = score * apart
        re = (re + multiply(score, c_re, dtype, PRECISION)) * dt[:, None]
        im = (im + multiply(score, c_im, dtype, PRECISION)) * dt[:, None]
        of_angle = re * b_im - im * b_re + tl.where(t[:, None] == n - 1, of_turn[None, :], 0.0)
    else:
        pairs = multiply(c_re, tl.trans(b_re), dtype, PRECISION) + multiply(c_im, tl.trans(b_im), dtype, PRECISION)
        pairs = pairs * apart * score
        re, im = re * from_start[:, None], im * from_start[:, None]
        d_dt = tl.sum(pairs, 0)
        d_decay = dt * d_dt - tl.sum(pairs * dt[None, :], 1) - tl.sum(re * c_re + im * c_im, 1)
        score = score * apart * dt[None, :]
        re += multiply(score, b_re, dtype, PRECISION)
        im += multiply(score, b_im, dtype, PRECISION)
        of_angle = re * c_im - im * c_re
    if SHARED:
        at_angle, inside = grad_angle + here * M + m, m < M
        of_angle = tl.sum(of_angle * (t + 1).to(tl.float32)[:, None], 0)
    else:
        at_angle = grad_angle + here * T * M + (t[:, None] * M + m[None, :])
        inside = (t[:, None] < T) & (m[None, :] < M)
    if REVERSE:
        of_angle += tl.load(at_angle, mask=inside, other=0.0)
    tl.store(at_angle, of_angle, mask=inside)
    tl.store(at_decay, d_decay, mask=t < T)
    tl.store(at_step, d_dt, mask=t < T)
    store_turned(gradient, (token * E + head) * 2 * M, E * 2 * M, n, M, re, im, co, si, BLOCK_T, BLOCK_M)


# ---- launches


def block(size: int) -> int:
    """Of a matrix product, 16 at least."""
    return max(16, triton.next_power_of_2(size))


def channels(kernel, dtype: torch.dtype, P: int, M: int) -> int:
    """How many of a head's P a program takes at a time: fewer where more than 64 states would leave the registers."""
    few = kernel is carry_kernel or (kernel is emit_kernel and dtype == torch.float32 and M > 32)
    return min(FEW_CHANNELS if few else CHANNELS, block(P))


def options(kernel, dtype: torch.dtype, M: int, T: int) -> dict[str, int]:
    """Of a launch. Without tensor cores a thread holds whole rows of a product's factors; eight warps share them. They
    share the gradients of b and c too, of more than 64 states or 32 tokens.
    """
    few = kernel is carry_kernel or (dtype == torch.bfloat16 and not (kernel is vectors_kernel and max(M, T) > 32))
    return {"num_warps": 4 if few else 8, "num_stages": 1}


PRECISION = "ieee"  # of float32 factors; made of several products of tensor cores, they spill


class _Launch:
    """What the launches of one scan share; see `run_forward`."""

    def __init__(self, v, b, angle, decay, step, begins, T):
        (B, L, H), E = v.shape, heads_of(step)
        self.chunks, self.E, self.M = triton.cdiv(L, T), E, b.shape[-1] // 2
        self.P, self.T, self.L, self.B = H // E, T, L, B
        self.sizes = (L, T, self.chunks, E, self.P, self.M)
        # what all launches read, but that the carry needs no steps
        is_shared = step.dim() == 1
        turns = run_turns(angle, decay, step, T) if is_shared else turns_of_chunks(angle, decay, step)
        self.system = *turns, numbers_of_documents(begins, T)
        self.switches = {"RESETS": begins is not None, "SHARED": is_shared}
        self.device, self.dtype = v.device, v.dtype
        self.programs = B * self.chunks, E

    def tiles(self, kernel) -> dict:
        """Sizes of a launch's tiles, and its options."""
        sizes = {"BLOCK_P": channels(kernel, self.dtype, self.P, self.M), "BLOCK_M": block(self.M)}
        if kernel is not carry_kernel:
            sizes |= {"BLOCK_T": block(self.T), "PRECISION": PRECISION}
        return sizes | options(kernel, self.dtype, self.M, self.T)

    def blocks(self, kernel) -> int:
        """How many programs of a launch share the channels of a head."""
        return triton.cdiv(self.P, channels(kernel, self.dtype, self.P, self.M))

    def states(self, v, row, b, initial, reverse, keeps=True) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, chunks, E, P, 2 M), the starts where they are kept, and (B, E P, 2 M): the first two launches."""
        B, E, P, M = self.B, self.E, self.P, self.M
        ends = v.new_empty(B, self.chunks, E, P, 2 * M)
        final = v.new_empty(B, E * P, 2 * M, dtype=torch.float32)
        shared = {"REVERSE": reverse, **self.switches}
        cos, sin, decay, _, numbers = self.system
        with on_device(self.device):
            ends_kernel[*self.programs, self.blocks(ends_kernel)](
                v, b, *self.system, ends, row, *self.sizes, **shared, **self.tiles(ends_kernel)
            )
            carry_kernel[B * E, self.blocks(carry_kernel)](
                ends,
                initial,
                final,
                cos,
                sin,
                decay,
                numbers,
                *self.sizes,
                INITIAL=initial is not None,
                KEEPS=keeps,
                **shared,
                **self.tiles(carry_kernel),
            )
        return ends, final


def _float32(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.float().contiguous()


def run_forward(
    v: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    angle: torch.Tensor,
    decay: torch.Tensor,
    step: torch.Tensor,
    skip: torch.Tensor,
    initial_state: torch.Tensor | None,
    begins: torch.Tensor | None,
    T: int,
    has_output: bool = True,
    save: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """v (B, L, E P), b and c (B, L, N), float32 or bfloat16, all of one dtype. angle (B, chunks, E, T, N / 2), decay
    and step (B, chunks, E, T): turns and decays since the start of a chunk of T tokens, steps; or where all steps of a
    head are one, frequencies (E, N / 2), rates and steps (E,). Float64. skip (E P,), D; initial_state (B, E P, N) or
    None for zero; begins (B, L) bool or None. Differentiable in all but begins.

    save: whether a backward is to come. Returns y as v, the final state (B, E P, N), float32, and every chunk's start
    (B, chunks, E, P, N), as v; y without has_output and starts without save are empty.
    """
    (v, row), b, c = in_rows(v), b.contiguous(), c.contiguous()
    launch = _Launch(v, b, angle, decay, step, begins, T)
    starts, final = launch.states(v, row, b, _float32(initial_state), reverse=False, keeps=has_output or save)
    if not has_output:
        return v.new_empty(0), final, starts if save else starts.new_empty(0)
    y = torch.empty_like(v, memory_format=torch.contiguous_format)
    with on_device(v.device):
        emit_kernel[*launch.programs, launch.blocks(emit_kernel)](
            v,
            b,
            c,
            *launch.system,
            skip.float(),
            starts,
            y,
            row,
            *launch.sizes,
            REVERSE=False,
            **launch.switches,
            **launch.tiles(emit_kernel),
        )
    return y, final, starts if save else starts.new_empty(0)


def run_backward(
    grad_y: torch.Tensor,
    grad_final: torch.Tensor,
    starts: torch.Tensor,
    v: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    angle: torch.Tensor,
    decay: torch.Tensor,
    step: torch.Tensor,
    skip: torch.Tensor,
    begins: torch.Tensor | None,
    T: int,
) -> tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor
]:
    """Gradients of v, b, c, angle, decay, step, skip, each in its dtype, and of the initial state in float32."""
    (v, row), b, c, grad_y = in_rows(v), b.contiguous(), c.contiguous(), grad_y.contiguous()
    launch = _Launch(v, b, angle, decay, step, begins, T)
    asked, grad_initial = launch.states(grad_y, grad_y.shape[2], c, _float32(grad_final), reverse=True)
    B, K, E, M = launch.B, launch.chunks, launch.E, launch.M
    grad_v = torch.empty_like(v, memory_format=torch.contiguous_format)
    of_heads = v.new_empty(2, B, launch.L, E, 2 * M)  # in the dtype of the tokens, as what lies between launches
    grad_decay, grad_step = (v.new_empty(B, K, E, T, dtype=torch.float32) for _ in range(2))
    is_shared = launch.switches["SHARED"]
    grad_angle = v.new_empty(B, K, E, *([] if is_shared else [T]), M, dtype=torch.float32)
    grad_skip = v.new_empty(B, K, E, launch.P, dtype=torch.float32)
    with on_device(v.device):
        emit_kernel[*launch.programs, launch.blocks(emit_kernel)](
            grad_y,
            c,
            b,
            *launch.system,
            skip.float(),
            asked,
            grad_v,
            E * launch.P,
            *launch.sizes,
            REVERSE=True,
            **launch.switches,
            **launch.tiles(emit_kernel),
        )
        for gradient, reverse in ((of_heads[1], False), (of_heads[0], True)):
            vectors_kernel[launch.programs](
                grad_y,
                v,
                b,
                c,
                *launch.system,
                starts,
                asked,
                gradient,
                grad_decay,
                grad_step,
                grad_angle,
                grad_skip,
                row,
                *launch.sizes,
                REVERSE=reverse,
                **launch.switches,
                **launch.tiles(vectors_kernel),
            )
    of_b, of_c, *of_system, of_skip = sum_up_gradients(
        of_heads, (grad_angle, grad_decay, grad_step), grad_skip, is_shared
    )
    if is_shared:
        of_system = run_turns_backward(*of_system, angle, decay, step)
    gradients = of_b, of_c, *of_system, of_skip
    gradients = (x.to(like.dtype) for x, like in zip(gradients, (b, c, angle, decay, step, skip), strict=True))
    return grad_v, *gradients, grad_initial


# what the compiler and autograd see: what lies within, its buffers too, is hidden
ssd_scan_chunks = torch.library.custom_op(qualified("ssd_scan_chunks"), run_forward, mutates_args=())
ssd_scan_chunks_backward = torch.library.custom_op(qualified("ssd_scan_chunks_backward"), run_backward, mutates_args=())


@ssd_scan_chunks.register_fake
def _(v, b, c, angle, decay, step, skip, initial_state, begins, T, has_output=True, save=True):
    (B, L, H), E, N = v.shape, heads_of(step), b.shape[-1]
    final = v.new_empty(B, H, N, dtype=torch.float32)
    starts = v.new_empty((B, -(-L // T), E, H // E, N) if save else 0)
    return v.new_empty(v.shape if has_output else 0), final, starts


@ssd_scan_chunks_backward.register_fake
def _(grad_y, grad_final, starts, v, b, c, angle, decay, step, skip, begins, T):
    like = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (v, b, c, angle, decay, step, skip))
    return (*like, v.new_empty(v.shape[0], v.shape[2], b.shape[-1], dtype=torch.float32))


def save(ctx, inputs, output):
    """For `backward`, by autograd."""
    *vectors, initial_state, begins, ctx.T, _, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.of_state = None if initial_state is None else initial_state.dtype
    ctx.save_for_backward(output[2], *vectors, begins)


def backward(ctx, grad_y, grad_final, _, run=ssd_scan_chunks_backward):
    """The gradients of all inputs of `ssd_scan_chunks`."""
    starts, v, *rest = ctx.saved_tensors
    grad_y = torch.zeros_like(v) if grad_y is None else grad_y
    if grad_final is None:
        grad_final = v.new_zeros(v.shape[0], v.shape[2], starts.shape[-1], dtype=torch.float32)
    *gradients, grad_initial = run(grad_y, grad_final, starts, v, *rest, ctx.T)
    return *gradients, None if ctx.of_state is None else grad_initial.to(ctx.of_state), None, None, None, None


ssd_scan_chunks.register_autograd(backward, setup_context=save)


def ssd_scan(*scanned, **wanted) -> tuple[torch.Tensor | None, torch.Tensor]:
    """`ssd_chunks.scan_vectors` by the kernels."""
    return scan_by(ssd_scan_chunks, *scanned, makes_turns=True, **wanted)


# ---- what the registry asks for


def self_check_cases(
    device: torch.device,
    dtype: torch.dtype | None = None,
    P: int | None = None,
    N: int | None = None,
    T: int = 32,
) -> list[Case]:
    """Forward and backward of a scan of tokens in `dtype`, heads of P channels and N states, in chunks of T tokens with
    constant steps and of half as many with the token's own, from a state over documents and from zero over one; the
    turns of a chunk. None: what models have, at small sizes.
    """
    half = max(1, T // 2)
    sizes = (2, 2 * T + 6, 2, 16, 32, T, False), (1, 2 * half + 8, 1, 20, 6, half, True)
    return [turns_case(device, N or 32, T)] + [
        _case(device, each, B, L, E, P or channels, N or states, length, selective, whole, tolerance)
        for each, tolerance in ((torch.bfloat16, 3e-2), (torch.float32, 2e-5))
        if dtype in (None, each)
        for B, L, E, channels, states, length, selective in sizes
        for whole in (False, True)
    ]


def _case(device, dtype, B, L, E, P, N, T, selective, whole, tolerance) -> Case:
    """Tokens that have much in common: of independent ones, what reaches a frequency from all of them is small beside
    its parts, and a gradient from factors in bfloat16 is 5 to 20% off.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, dtype=torch.float32):
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(device, dtype)

    steps = (B, L, E) if selective else (E,)
    dt, decay = normal(*steps, dtype=torch.float64).sigmoid() / 2, normal(E, dtype=torch.float64).exp()
    omega, states = normal(E, N // 2, dtype=torch.float64), [] if whole else [normal(B, E * P, N)]
    shared = normal(N)
    vectors = 1 + normal(B, L, E * P), shared + normal(B, L, N) / 2, shared + normal(B, L, N) / 2
    inputs = [*(x.to(dtype) for x in vectors), dt, decay, omega, normal(E * P), *states]
    begins = torch.zeros(B, L, dtype=torch.bool)
    begins[-1, [1, L - 5]] = True
    begins = None if whole else begins.to(device)

    def run(scan, cast):
        leaves = [cast(x.clone()).requires_grad_() for x in inputs]
        outputs = scan(*leaves[:7], None if whole else leaves[7], begins, T)
        # half the sum of squares: of random gradients, what reaches a rate may be all but nothing, and then is rounding
        gradients = torch.autograd.grad(outputs, leaves, [x.detach() for x in outputs])
        return [x.detach() for x in (*outputs, *gradients)]

    label = (
        f"a scan in {str(dtype).removeprefix('torch.')} with {'selective' if selective else 'constant'} dt, "
        f"{'of one document' if whole else 'with documents'}"
    )
    return Case(label, partial(run, ssd_scan, lambda x: x), partial(run, scan_vectors, torch.Tensor.double), tolerance)
