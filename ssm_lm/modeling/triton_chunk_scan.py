"""The chunk scan as Triton kernels; its twin, and the equations, are in chunked.py.

Layout. A program works on one channel, whose operators stay in registers while it walks over the chunks: it reads a
channel's tokens one after the other. A model's tensors are (B, L, H), where neighbours in time are H numbers apart,
and a GPU moves 32 bytes at least: read in place, a bfloat16 costs 16 times its size. So the kernels work on "rows",
(H, B, L), made by a tiled transpose that reads and writes whole sectors. The output is a (B, L, H) view of rows: what
comes next is elementwise and a matrix product, which takes a transposed operand as it is.

Bytes an element (token and channel) of the forward, bfloat16, at B = 8, L = 8192, H = 1024, N = T = 64: transpose
2 + 2, scan 2 + 2, operators (taps, emit, inject, dense carry: float32, 48.25 KiB a channel for 65536 tokens) 0.75;
together 8.75, where no implementation can do with less than 4.75. On an H100 (3.35 TB/s) these are 0.18 ms and 0.10 ms,
a ratio of 1.84. Tensor cores: 2 T + 4 N = 384 FLOP, and for a dense carry 2 N^2 / T = 128 three times over; together
768, which at 989 TFLOP/s take 0.05 ms, or 0.10 ms with the empty half of the rows (below): less than the memory.
Training also writes the states at the chunks' starts, 2 N / T = 2 bytes, and y before its activation, 2 bytes, which
the activation's own gradient would keep just so. Below 16 rows, segments (below) read the rows once more: 2 bytes.

Several channels a program would spare the transpose, but not for less: 16 channels' operators are 400 KiB in
bfloat16, and 8 of them, with a dense carry, still more than an SM's shared memory.

The rows of a matrix product are batch elements: M = 16 of them, so that the state stays in registers and no chunk
waits for more than the one before. Rows that a small batch leaves empty are filled with time: a row (H, B, C T) of C
chunks is also G segments, (H, B G, C T / G), without a copy. A program, which has all those of its channel, first
finds the state that each would leave from zero, links these in its registers, as sequence parallelism does between
ranks, and starts every segment from its true state: at B = 1 two chains of C / 16 chunks for one of C, for 2 bytes more
an element, which its own second pass may find in the cache.

A row holds whole chunks: before the first token stand zeros, which change nothing in a zero state. So every address is
a multiple of 16 elements, whatever the length; no mask is left over time; and no size but N is one that Triton
specialises on: another batch, width or length is the same machine code, which is what the self-check has seen.

The backward is the same kernel with transposed operators, over the chunks in reverse, then one Gram product for the
gradients of all four operators. Nothing is summed atomically: every result is the same bits every time.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .activations import ACTIVATIONS
from .chunked import (
    PLAIN,
    ChunkOperators,
    Implementation,
    Saved,
    Wanted,
    carry_gradient,
    differentiable,
    operator_shapes,
)
from .kernel_launch import architecture, family, numbered_configuration, on_device, qualified, tuned
from .kernel_limits import chunks_in_a_row, longest_chunk, segments
from .kernels_s4 import Case
from .triton_step import activate

try:
    import triton
    import triton.language as tl
except ImportError:  # `kernels_s4` asks for this module in a `try` of its own, and reports the cause
    raise

# ---- kernels. Sequences are rows (H, B, C T): chunk c of a row holds the tokens c T .. (c + 1) T. TP and NP: T and N,
# ---- or for a diagonal carry N/2, as powers of two. FULL: T is TP


@triton.jit(do_not_specialize=["L", "S", "pad", "B"])
def to_rows_kernel(
    x,  # (B, L, H)
    y,  # (H, B, S), S of 16 or of 1 times `S`
    L,
    H,
    S,
    pad,
    B,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """y[h, b, pad + t] = x[b, t, h], zeros before and after. Grid: tiles of S by H, then B."""
    size = S * UNIT
    blocks = tl.cdiv(H, COLUMNS)
    p = (tl.program_id(0) // blocks) * ROWS + tl.arange(0, ROWS)
    h = (tl.program_id(0) % blocks).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    b = tl.program_id(1).to(tl.int64)
    token = p - pad
    inside = ((token >= 0) & (token < L))[:, None] & (h < H)[None, :]
    tile = tl.load(x + (b * L + token)[:, None] * H + h[None, :], mask=inside, other=0)
    tl.store(y + (h[:, None] * B + b) * size + p[None, :], tl.trans(tile), mask=(h < H)[:, None] & (p < size)[None, :])


@triton.jit(do_not_specialize=["L", "S", "pad", "B"])
def from_rows_kernel(
    x,  # (H, B, S)
    y,  # (B, L, H)
    L,
    H,
    S,
    pad,
    B,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The inverse of `to_rows_kernel`, by the same tiles."""
    size = S * UNIT
    blocks = tl.cdiv(H, COLUMNS)
    p = (tl.program_id(0) // blocks) * ROWS + tl.arange(0, ROWS)
    h = (tl.program_id(0) % blocks).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    b = tl.program_id(1).to(tl.int64)
    token = p - pad
    stored = ((token >= 0) & (token < L))[:, None] & (h < H)[None, :]
    loaded = (h < H)[:, None] & (p < size)[None, :]
    tile = tl.load(x + (h[:, None] * B + b) * size + p[None, :], mask=loaded, other=0)
    tl.store(y + (b * L + token)[:, None] * H + h[None, :], tl.trans(tile), mask=stored)


@triton.jit
def load_into(into, half, mask, low, DENSE: tl.constexpr):
    """What takes a chunk into a state, (TP, NP); of a complex state its real parts, and its imaginary ones."""
    into0 = tl.load(into, mask=mask, other=0.0).to(low)
    into1 = into0
    if not DENSE:
        into1 = tl.load(into + half, mask=mask, other=0.0).to(low)
    return into0, into1


@triton.jit
def load_carry(carry, h, n, N, width, REVERSE: tl.constexpr, DENSE: tl.constexpr):
    """A dense carry as a right factor, (NP, NP), or a diagonal one's real and imaginary parts, (1, NP); in reverse
    transposed.
    """
    if DENSE:
        square = n[:, None] * N + n[None, :] if REVERSE else n[None, :] * N + n[:, None]
        inside = (n < N)[:, None] & (n < N)[None, :]
        carry0 = tl.load(carry + h * N * N + square, mask=inside, other=0.0)
        carry1 = carry0
    else:
        carry0 = tl.load(carry + h * N + n, mask=n < width, other=0.0)[None, :]
        carry1 = tl.load(carry + h * N + width + n, mask=n < width, other=0.0)[None, :]
        if REVERSE:
            carry1 = -carry1
    return carry0, carry1


@triton.jit
def load_states(states, at, mask, width, DENSE: tl.constexpr):
    """Float32 states (M, NP): all of them, or real parts and imaginary ones."""
    s0 = tl.load(states + at, mask=mask, other=0.0)
    s1 = tl.zeros_like(s0)
    if not DENSE:
        s1 = tl.load(states + at + width, mask=mask, other=0.0)
    return s0, s1


@triton.jit
def store_states(states, at, s0, s1, mask, width, DENSE: tl.constexpr):
    """What `load_states` reads, in the dtype of `states`."""
    tl.store(states + at, s0, mask=mask)
    if not DENSE:
        tl.store(states + at + width, s1, mask=mask)


@triton.jit
def advance(s0, s1, X, into0, into1, carry0, carry1, DENSE: tl.constexpr, PRECISION: tl.constexpr, CARRY: tl.constexpr):
    """The states after the chunks X."""
    if DENSE:
        s0 = tl.dot(s0, carry0, input_precision=CARRY)
        s0 = tl.dot(X, into0, s0, input_precision=PRECISION)
    else:
        turned = carry0 * s0 - carry1 * s1
        s1 = tl.dot(X, into1, carry0 * s1 + carry1 * s0, input_precision=PRECISION)
        s0 = tl.dot(X, into0, turned, input_precision=PRECISION)
    return s0, s1


@triton.jit
def restart(s0, s1, stays):
    """States (M, NP), zero where they do not stay (M, 1)."""
    return tl.where(stays, s0, 0.0), tl.where(stays, s1, 0.0)


@triton.jit
def stay_before(keep, c, b_in, C):
    """Whether states stay before chunk c of the rows at `keep`, (M, 1); beyond the last one they do."""
    return tl.load(keep + c, mask=b_in & (c < C), other=1)[:, None] != 0


@triton.jit
def upper_bits(x):
    """Float32 numbers with the sign, the exponent and the ten bits that TF32 has."""
    return (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def product(a, b, c, PRECISION: tl.constexpr):
    """a b + c of float32 numbers. "three parts": in TF32, products of upper and lower bits, one a turn; all at once, as
    Triton's "tf32x3", their operands leave the registers.
    """
    if PRECISION == "three parts":
        for turn in range(0, 3):
            of_a = tl.where(turn == 0, a - upper_bits(a), upper_bits(a))
            of_b = tl.where(turn == 1, b - upper_bits(b), upper_bits(b))
            c = tl.dot(of_a, of_b, c, input_precision="tf32")
    else:
        c = tl.dot(a, b, c, input_precision=PRECISION)
    return c


@triton.jit
def power(carry0, carry1, count, DENSE: tl.constexpr, PRECISION: tl.constexpr):
    """carry^count, count at least 1, by squares from its highest bit on."""
    total0, total1 = carry0, carry1
    bit = 1
    while bit * 2 <= count:
        bit *= 2
    while bit > 1:
        bit = bit // 2
        odd = (count // bit) % 2 == 1
        if DENSE:
            total0 = product(total0, total0, tl.zeros_like(total0), PRECISION)
            if odd:
                total0 = product(total0, carry0, tl.zeros_like(total0), PRECISION)
        else:
            re, im = total0 * total0 - total1 * total1, 2 * total0 * total1
            total0 = tl.where(odd, re * carry0 - im * carry1, re)
            total1 = tl.where(odd, re * carry1 + im * carry0, im)
    return total0, total1


@triton.jit
def over_segment(s0, s1, total0, total1, end0, end1, stays, DENSE: tl.constexpr, PRECISION: tl.constexpr):
    """The states after segments that leave `end` from zero and restart from it where their state does not stay."""
    s0, s1 = restart(s0, s1, stays)
    if DENSE:
        s0 = product(s0, total0, end0, PRECISION)
    else:
        turned = total0 * s0 - total1 * s1 + end0
        s1 = total0 * s1 + total1 * s0 + end1
        s0 = turned
    return s0, s1


@triton.jit
def rows_of(x, rows):
    """x[rows], (M, NP)."""
    return tl.gather(x, tl.broadcast_to(rows[:, None], x.shape), 0)


@triton.jit(do_not_specialize=["B", "H", "C", "T", "G", "has_first"])
def scan_kernel(
    x,  # (H, B, C T) what drives the state: u, or in reverse the gradient of y
    y,  # (H, B, C T) what comes out: y, or the gradient of u
    taps,  # (H, T)
    emit,  # (H, T, N)
    inject,  # (H, N, T)
    carry,  # (H, N, N) or (H, N)
    first,  # (B / G, H, N) the state before the first chunk that is run; zero where has_first is 0
    last,  # (B / G, H, N) the state after the last
    states,  # (H, B, C, N) the state with which every chunk's output was made; None: not kept
    before,  # (H, B, C T) y before its activation; None: not kept
    keep,  # (B, C) bytes, or None
    B,
    H,
    C,
    T,
    N,
    G,  # rows of one sequence, its segments one after the other; 1 unless LINKS
    has_first,
    REVERSE: tl.constexpr,
    DENSE: tl.constexpr,
    HAS_OUTPUT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FULL: tl.constexpr,
    LINKS: tl.constexpr,
    TP: tl.constexpr,
    NP: tl.constexpr,
    M: tl.constexpr,
    PRECISION: tl.constexpr,
    CARRY_PRECISION: tl.constexpr,
    LINK_PRECISION: tl.constexpr,
):
    """One channel and M rows; grid (H, B / M). With LINKS, where B is at most M, rows are segments: the states that
    they leave from zero are found first, and linked, s_(g+1) = carry^C s_g + end_g, so that each starts from its own.
    """
    h = tl.program_id(0).to(tl.int64)
    b = tl.program_id(1) * M + tl.arange(0, M)
    b_in = b < B
    t, n = tl.arange(0, TP), tl.arange(0, NP)
    width = N if DENSE else N // 2  # of a state's first, or only, part
    n_in = n < width
    low = x.dtype.element_ty
    tokens = TP if FULL else T

    # the operators as right factors of row vectors; in reverse, transposed
    tn_in = (t < tokens)[:, None] & n_in[None, :]
    nt_in = n_in[:, None] & (t < tokens)[None, :]
    operator = h * tokens * N
    tn_emit, nt_emit = emit + operator + t[:, None] * N + n[None, :], emit + operator + t[None, :] * N + n[:, None]
    tn_inject, nt_inject = (
        inject + operator + n[None, :] * tokens + t[:, None],
        inject + operator + n[:, None] * tokens + t[None, :],
    )
    if REVERSE:
        into, out_of, half_into, half_out = tn_emit, nt_inject, width, width * tokens
    else:
        into, out_of, half_into, half_out = tn_inject, nt_emit, width * tokens, width
    into0, into1 = load_into(into, half_into, tn_in, low, DENSE)
    carry0, carry1 = load_carry(carry, h, n, N, width, REVERSE, DENSE)

    row = (h * B + b)[:, None]
    if keep is not None:
        keep += b.to(tl.int64) * C
    x_in = b_in[:, None]
    if not FULL:
        x_in = x_in & (t < tokens)[None, :]
    state_in = b_in[:, None] & n_in[None, :]
    sequence, g = b, tl.zeros_like(b)
    if LINKS:  # G is 1 else, but the compiler does not know
        sequence, g = b // G, b % G
    begins = g == (G - 1 if REVERSE else 0)  # where a sequence does, in the order in which it is run
    at_end = (sequence.to(tl.int64)[:, None] * H + h) * N + n[None, :]
    at_start = state_in & begins[:, None] & (has_first != 0)

    if LINKS:
        end0 = tl.zeros((M, NP), tl.float32)
        end1 = tl.zeros((M, NP), tl.float32)
        stays = tl.full((M, 1), 1, tl.int1)
        if keep is not None:
            if not REVERSE:
                stays = stay_before(keep, 0, b_in, C)
        for step in range(0, C):
            c = C - 1 - step if REVERSE else step
            X = tl.load(x + row * (C * tokens) + (c * tokens + t)[None, :], mask=x_in, other=0.0)
            end0, end1 = advance(end0, end1, X, into0, into1, carry0, carry1, DENSE, PRECISION, CARRY_PRECISION)
            if keep is not None:
                stay = stay_before(keep, c if REVERSE else c + 1, b_in, C)
                end0, end1 = restart(end0, end1, stay)
                stays = stays & stay
        total0, total1 = power(carry0, carry1, C, DENSE, LINK_PRECISION)
    s0, s1 = load_states(first, at_end, at_start, width, DENSE)
    if LINKS:
        earlier = tl.minimum(b + 1, M - 1) if REVERSE else tl.maximum(b - 1, 0)
        for _ in range(1, G):  # after i turns the first i + 1 segments of a sequence start from their states
            left0, left1 = over_segment(s0, s1, total0, total1, end0, end1, stays, DENSE, LINK_PRECISION)
            s0 = tl.where(begins[:, None], s0, rows_of(left0, earlier))
            if not DENSE:
                s1 = tl.where(begins[:, None], s1, rows_of(left1, earlier))

    if LINKS and not HAS_OUTPUT and states is None:
        s0, s1 = over_segment(s0, s1, total0, total1, end0, end1, stays, DENSE, LINK_PRECISION)
    else:
        if keep is not None:
            if not REVERSE:
                s0, s1 = restart(s0, s1, stay_before(keep, 0, b_in, C))
        if HAS_OUTPUT:
            lag = t[:, None] - t[None, :] if REVERSE else t[None, :] - t[:, None]
            within = tl.load(taps + h * tokens + lag, mask=(lag >= 0) & (lag < tokens), other=0.0).to(low)
            out0, out1 = load_into(out_of, half_out, nt_in, low, DENSE)
        for step in range(0, C):
            c = C - 1 - step if REVERSE else step
            token = row * (C * tokens) + (c * tokens + t)[None, :]
            X = tl.load(x + token, mask=x_in, other=0.0)
            low0, low1 = s0.to(low), s1.to(low)
            if states is not None:
                store_states(states, (row * C + c) * N + n[None, :], low0, low1, state_in, width, DENSE)
            if HAS_OUTPUT:
                out = tl.dot(X, within, input_precision=PRECISION)
                out = tl.dot(low0, out0, out, input_precision=PRECISION)
                if not DENSE:
                    out = tl.dot(low1, out1, out, input_precision=PRECISION)
                if before is not None:
                    tl.store(before + token, out.to(low), mask=x_in)
                tl.store(y + token, activate(out, ACTIVATION).to(low), mask=x_in)
            s0, s1 = advance(s0, s1, X, into0, into1, carry0, carry1, DENSE, PRECISION, CARRY_PRECISION)
            if keep is not None:
                # of the chunk that comes next; here, where the state has left the layout of a product's operand
                s0, s1 = restart(s0, s1, stay_before(keep, c if REVERSE else c + 1, b_in, C))
    ends = g == (0 if REVERSE else G - 1)
    store_states(last, at_end, s0, s1, state_in & ends[:, None], width, DENSE)


@triton.jit
def along_diagonals(x, P: tl.constexpr):
    """x (P, P) -> the sums of x[i, i - lag] for every lag (P,)."""
    column = tl.arange(0, P)[:, None] - tl.arange(0, P)[None, :]
    return tl.sum(tl.where(column >= 0, columns_of(x, tl.maximum(column, 0)), 0.0), 0)


@triton.jit
def columns_of(x, columns):
    """x[i, columns[i, j]]."""
    return tl.gather(x, columns, 1)


@triton.jit(do_not_specialize=["chunks", "T"])
def gram_kernel(
    grad_y,  # (H, B C, T)
    driven,  # (H, B C, N) the gradient that reaches the state after every chunk
    u,  # (H, B C, T)
    starts,  # (H, B C, N) the state before every chunk
    of_taps,  # (H, T), of_emit (H, T, N), of_inject (H, N, T), float32: gradients
    of_emit,
    of_inject,
    of_states,  # (H, N, N), float32: the outer products of driven and starts
    chunks,  # B C
    T,
    N,
    FULL: tl.constexpr,
    TP: tl.constexpr,
    P: tl.constexpr,
    R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sums over the B C chunks of outer products, [grad_y | driven]^T [u | starts]; P x P of them a program, T at most
    P. Of the first T rows and columns the sums along the diagonals, each of a tap. Grid ((1 + N / P)^2, H).
    """
    tokens = TP if FULL else T
    blocks = 1 + tl.cdiv(N, P)
    left_block, right_block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    h = tl.program_id(1).to(tl.int64)
    if left_block == 0:
        left = grad_y
    else:
        left = driven
    if right_block == 0:
        right = u
    else:
        right = starts
    left_width, right_width = tl.where(left_block == 0, tokens, N), tl.where(right_block == 0, tokens, N)
    i = tl.maximum(left_block - 1, 0) * P + tl.arange(0, P)
    j = tl.maximum(right_block - 1, 0) * P + tl.arange(0, P)

    total = tl.zeros((P, P), tl.float32)
    for start in range(0, chunks, R):
        r = start + tl.arange(0, R)
        r_in = (r < chunks)[:, None]
        chunk = (h * chunks + r)[:, None]
        a = tl.load(left + chunk * left_width + i[None, :], mask=r_in & (i < left_width)[None, :], other=0.0)
        b = tl.load(right + chunk * right_width + j[None, :], mask=r_in & (j < right_width)[None, :], other=0.0)
        total = tl.dot(tl.trans(a), b, total, input_precision=PRECISION)
    at = (h * left_width + i[:, None]) * right_width + j[None, :]
    inside = (i < left_width)[:, None] & (j < right_width)[None, :]
    if left_block == 0:
        if right_block == 0:
            tl.store(of_taps + h * tokens + i, along_diagonals(total, P), mask=i < tokens)
        else:
            tl.store(of_emit + at, total, mask=inside)
    else:
        if right_block == 0:
            tl.store(of_inject + at, total, mask=inside)
        else:
            tl.store(of_states + at, total, mask=inside)


# ---- launches


class Launch(NamedTuple):
    """rows: of a matrix product, which are batch elements in the scan, and chunks in the Gram product."""

    rows: int
    num_warps: int
    num_stages: int

    def options(self, family: str) -> dict[str, int]:
        """What Triton takes at a launch. Left to itself, ptxas spills a few registers of a thread where one more
        program then fits on a multiprocessor: it may use all that there are.
        """
        every_register = {"maxnreg": 255} if family in ("cuda", "blackwell") else {}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **every_register}


def scan_configurations(family: str, dtype: torch.dtype, N: int, dense: bool) -> tuple[Launch, ...]:
    """What `scan_kernel` may be launched with, the default first."""
    if family == "cuda":  # more stages or fewer warps spill, or do not fit the shared memory of an A100
        if dtype == torch.bfloat16:
            return (Launch(16, 4, 4), Launch(16, 4, 2)) if N <= 64 else (Launch(16, 8, 2),)
        return (Launch(16, 8 if dense else 4, 2) if N <= 64 else Launch(16, 8, 1),)
    if family == "blackwell":
        return (Launch(16, 4 if N <= 64 else 8, 1),)
    return (Launch(16, 4, 1 if family == "interpreter" or (dense and N > 64) else 2),)


def link_precision(family: str) -> str:
    """Of the products that link segments: every squaring doubles the error of the one before. In three TF32 products a
    float32 number has 22 bits; in six bfloat16 ones it has all 24, but their operands spill.
    """
    return "three parts" if family == "cuda" else "ieee"


def gram_configurations(family: str, dtype: torch.dtype) -> tuple[Launch, ...]:
    """What `gram_kernel` may be launched with."""
    low = dtype == torch.bfloat16
    if family == "blackwell":  # no four warps for 64 x 64 products, which are tcgen05's
        return (Launch(32, 2, 1) if low else Launch(16, 4, 1),)
    if family == "cuda":
        return (Launch(64 if low else 16, 4, 3),)
    return (Launch(64 if low else 32, 4, 1),)


def gram_block(family: str, dtype: torch.dtype, T: int, N: int) -> int:
    """P of `gram_kernel`."""
    return 32 if max(T, N) <= 32 or (family == "blackwell" and dtype == torch.float32) else 64


def precisions(family: str, dtype: torch.dtype) -> tuple[str, str]:
    """How a product of float32 numbers is made: of the sequence, and of the carry.

    In three bfloat16 products it has 16 bits of a mantissa, in six all that float32 has. AMD multiplies float32 itself.
    """
    if family in ("hip", "interpreter"):
        return "ieee", "ieee"
    return ("ieee", "bf16x3") if dtype == torch.bfloat16 else ("bf16x6", "bf16x6")


def power_of_two(n: int) -> int:
    return max(16, 1 << (n - 1).bit_length())


def tile_of_chunk(dtype: torch.dtype, N: int, dense: bool, T: int, rest: bool) -> tuple[int, bool]:
    """(TP, FULL) of a chunk of T tokens. What is left of a sequence, a chunk of any length, is one kernel for all."""
    TP = longest_chunk(dtype, N, dense) if rest else power_of_two(T)
    return (max(TP, power_of_two(T)), False) if rest else (TP, TP == T)


def launch_scan(x, y, operators, first, last, states, keep, reverse, activation="identity", before=None, rest=False):
    """Run `scan_kernel`, in segments where rows are left. x, y (H, B, C T), y None for no output, the rest as there but
    for a whole sequence a row; all contiguous, on one device.
    """
    H, B, size = x.shape
    taps, _, inject, carry = operators
    T, N, dense = taps.shape[-1], inject.shape[1], carry.dim() == 3
    if H * B == 0:
        return
    kind = family(architecture(x.device))
    product, carried = precisions(kind, x.dtype)
    TP, full = tile_of_chunk(x.dtype, N, dense, T, rest)
    NP, C = power_of_two(N if dense else N // 2), size // T
    G = segments(kind, B, C, N, dense)
    rows, C = B * G, C // G  # (H, B G, C T / G) lies as (H, B, C T) does

    def run(launch):
        scan_kernel[(H, triton.cdiv(rows, launch.rows))](
            x,
            x if y is None else y,
            *operators,
            last if first is None else first,
            last,
            states,
            before,
            keep,
            rows,
            H,
            C,
            T,
            N,
            G,
            int(first is not None),
            REVERSE=reverse,
            DENSE=dense,
            HAS_OUTPUT=y is not None,
            ACTIVATION=activation,
            FULL=full,
            LINKS=G > 1,
            TP=TP,
            NP=NP,
            M=launch.rows,
            PRECISION=product,
            CARRY_PRECISION=carried,
            LINK_PRECISION=link_precision(kind),
            **launch.options(kind),
        )

    with on_device(x.device):
        choices = scan_configurations(kind, x.dtype, N, dense)
        if reverse or y is None or rest:  # the others are worth their compilations forward alone
            return run(choices[0])
        # programs and chunks to the next power of two: what fills a card, and what is waited for
        size = f"{(H * triton.cdiv(rows, 16)).bit_length()} {C.bit_length()}{'' if states is None else ' saving'}"
        linked = " segments" if G > 1 else ""
        problem = f"{x.dtype} T{TP} N{NP} {'dense' if dense else 'diagonal'} size {size}{linked}"
        run(tuned("chunk_scan", problem, choices, run, x.device))


def launch_gram(grad_y, driven, u, starts, found, T, rest=False):
    """Run `gram_kernel`. found: its four outputs."""
    H, B, C, N = starts.shape
    if H == 0:
        return
    kind = family(architecture(u.device))
    (launch,) = gram_configurations(kind, u.dtype)
    P = gram_block(kind, u.dtype, T, N)
    TP = power_of_two(T)
    blocks = 1 + triton.cdiv(N, P)
    with on_device(u.device):
        gram_kernel[(blocks * blocks, H)](
            *(grad_y, driven, u, starts, *found, B * C, T, N),
            FULL=TP == T and not rest,
            TP=P if rest else TP,
            P=P,
            R=launch.rows,
            PRECISION=precisions(kind, u.dtype)[0],
            **launch.options(kind),
        )


# ---- operators of torch


def _unit(size: int) -> int:
    """Rows of a multiple of 16 elements are moved in vectors."""
    return 16 if size % 16 == 0 else 1


def _launch_turn(kernel, x, y, B, L, H, size, pad):
    if B * H * size == 0:
        return
    unit = _unit(size)
    with on_device(x.device):
        grid = triton.cdiv(size, 64) * triton.cdiv(H, 64), B
        options = {"ROWS": 64, "COLUMNS": 64, "num_warps": 4, "num_stages": 1}
        kernel[grid](x, y, L, H, size // unit, pad, B, UNIT=unit, **options)


@torch.library.custom_op(qualified("to_rows"), mutates_args=())
def turn_to_rows(x: torch.Tensor, size: int, pad: int) -> torch.Tensor:
    """(B, L, H) -> (H, B, size): `pad` zeros, the L tokens, zeros."""
    B, L, H = x.shape
    y = x.new_empty(H, B, size)
    _launch_turn(to_rows_kernel, x.contiguous(), y, B, L, H, size, pad)
    return y


@turn_to_rows.register_fake
def _(x, size, pad):
    return x.new_empty(x.shape[2], x.shape[0], size)


@torch.library.custom_op(qualified("from_rows"), mutates_args=())
def turn_from_rows(rows: torch.Tensor, length: int, pad: int) -> torch.Tensor:
    """(H, B, size) -> (B, L, H): the L tokens after `pad`."""
    H, B, size = rows.shape
    y = rows.new_empty(B, length, H)
    _launch_turn(from_rows_kernel, rows.contiguous(), y, B, length, H, size, pad)
    return y


@turn_from_rows.register_fake
def _(rows, length, pad):
    return rows.new_empty(rows.shape[1], length, rows.shape[0])


@torch.library.custom_op(qualified("chunk_scan"), mutates_args=())
def scan(
    x: torch.Tensor,
    taps: torch.Tensor,
    emit: torch.Tensor,
    inject: torch.Tensor,
    carry: torch.Tensor,
    initial_state: torch.Tensor | None,
    keep: torch.Tensor | None,
    has_output: bool,
    save: bool,
    activation: str,
    rest: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (H, B, C T) -> y of its shape, the final state (B, H, N), and with `save`, for the backward, the states
    (H, B, C, N) at the chunks' starts and y before its activation. What is not asked for, or the same as y, is empty.
    activation: one of ACTIVATIONS, applied to y in float32. rest: see `chunked.Wanted`.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is one of {', '.join(ACTIVATIONS)}, not {activation!r}")
    operators = [operator.float().contiguous() for operator in (taps, emit, inject, carry)]
    (H, B, size), N = x.shape, inject.shape[1]
    y = torch.empty(x.shape if has_output else 0, dtype=x.dtype, device=x.device)
    starts = torch.empty((H, B, size // taps.shape[-1], N) if save else 0, dtype=x.dtype, device=x.device)
    keep_before = save and has_output and activation != "identity"
    before = torch.empty(x.shape if keep_before else 0, dtype=x.dtype, device=x.device)
    final = torch.empty(B, H, N, dtype=torch.float32, device=x.device)
    launch_scan(
        x.contiguous(),
        y if has_output else None,
        operators,
        None if initial_state is None else initial_state.float().contiguous(),
        final,
        starts if save else None,
        _bytes(keep),
        reverse=False,
        activation=activation,
        before=before if keep_before else None,
        rest=rest,
    )
    return y, final, starts, before


@scan.register_fake
def _(x, taps, emit, inject, carry, initial_state, keep, has_output, save, activation, rest):
    (H, B, size), N = x.shape, inject.shape[1]
    y = x.new_empty(x.shape if has_output else 0)
    starts = x.new_empty((H, B, size // taps.shape[-1], N) if save else 0)
    before = x.new_empty(x.shape if save and has_output and activation != "identity" else 0)
    return y, x.new_empty(B, H, N, dtype=torch.float32), starts, before


def _bytes(keep):
    return None if keep is None else keep.contiguous().view(torch.uint8)


@torch.library.custom_op(qualified("chunk_scan_backward"), mutates_args=())
def scan_backward(
    grad_y: torch.Tensor | None,
    grad_final: torch.Tensor | None,
    x: torch.Tensor,
    starts: torch.Tensor,
    keep: torch.Tensor | None,
    taps: torch.Tensor,
    emit: torch.Tensor,
    inject: torch.Tensor,
    carry: torch.Tensor,
    rest: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of x (H, B, C T), of the initial state (B, H, N), of taps, emit and inject; of the carry the outer
    products of which it is made, (H, N, N), see `carry_gradient`.
    """
    operators = [operator.float().contiguous() for operator in (taps, emit, inject, carry)]
    (H, B, _), N, T = x.shape, inject.shape[1], taps.shape[-1]
    x = x.contiguous()
    grad_y = torch.zeros_like(x) if grad_y is None else grad_y.contiguous()
    grad_x, driven = torch.empty_like(x), torch.empty_like(starts)
    first = None if grad_final is None else grad_final.float().contiguous()
    grad_initial = torch.empty(B, H, N, dtype=torch.float32, device=x.device)
    launch_scan(*(grad_y, grad_x, operators, first, grad_initial, driven, _bytes(keep)), reverse=True, rest=rest)
    found = [torch.empty(shape, dtype=torch.float32, device=x.device) for shape in operator_shapes(H, T, N, dense=True)]
    launch_gram(grad_y, driven, x, starts, found, T, rest)
    return grad_x, grad_initial, *found


@scan_backward.register_fake
def _(grad_y, grad_final, x, starts, keep, taps, emit, inject, carry, rest):
    (H, B, _), N = x.shape, inject.shape[1]
    shapes = (B, H, N), *operator_shapes(H, taps.shape[-1], N, dense=True)
    return x.new_empty(x.shape), *(x.new_empty(shape, dtype=torch.float32) for shape in shapes)


# ---- from and to the model's layout


def to_rows(sequence: torch.Tensor, size: int | None = None) -> torch.Tensor:
    """(B, L, H) -> (H, B, size), contiguous, with zeros before the tokens; None: L. Without a copy where `sequence` is
    a view of such rows.
    """
    size = sequence.shape[1] if size is None else size
    rows, pad = sequence.permute(2, 0, 1), size - sequence.shape[1]
    if rows.is_contiguous():
        return F.pad(rows, (pad, 0)) if pad else rows
    return turn_to_rows(sequence, size, pad)


def from_rows(rows: torch.Tensor, length: int | None = None) -> torch.Tensor:
    """(H, B, size) -> the last `length` tokens of it, (B, L, H), contiguous; None: all."""
    length = rows.shape[2] if length is None else length
    return turn_from_rows(rows, length, rows.shape[2] - length)


# ---- the implementation


def forward(u, operators: ChunkOperators, initial_state, wanted: Wanted, save: bool):
    """See `chunked.Implementation`; y is a (B, L, H) view of rows, and what is saved lies in rows."""
    (B, L, _), T, N = u.shape, operators.taps.shape[-1], operators.inject.shape[1]
    kind, dense = family(architecture(u.device)), operators.carry.dim() == 3
    chunks = chunks_in_a_row(kind, B, L, T, N, dense, from_zero=initial_state is None)
    rows, keep = to_rows(u, chunks * T), wanted.keep
    if keep is not None and keep.shape[1] < chunks:
        keep = F.pad(keep, (chunks - keep.shape[1], 0), value=True)
    options = wanted.has_output, save, wanted.activation, wanted.rest
    y, final, starts, before = scan(rows, *operators, initial_state, keep, *options)
    y = y[..., chunks * T - L :].permute(1, 2, 0) if wanted.has_output else None
    return y, final, Saved(rows, starts, before)


def backward(saved: Saved, operators: ChunkOperators, wanted: Wanted, grad_y, grad_final, length: int):
    """See `chunked.Implementation`."""
    rows, starts, before = saved
    keep, chunks = wanted.keep, starts.shape[2]
    if keep is not None and keep.shape[1] < chunks:
        keep = F.pad(keep, (chunks - keep.shape[1], 0), value=True)
    if grad_y is not None:
        grad_y = ACTIVATIONS[wanted.activation].backward(to_rows(grad_y, rows.shape[2]), before)
    grad_u, grad_initial, *of_operators, of_states = scan_backward(
        grad_y, grad_final, rows, starts, keep, *operators, wanted.rest
    )
    if wanted.in_rows:
        grad_u = grad_u[..., rows.shape[2] - length :].permute(1, 2, 0)
    else:
        grad_u = from_rows(grad_u, length)
    return grad_u, grad_initial, ChunkOperators(*of_operators, carry_gradient(of_states, operators.carry))


FUSED = Implementation(forward, backward, to_rows)


# ---- the self-check


def self_check_cases(
    device: torch.device,
    dtype: torch.dtype | None = None,
    N: int = 64,
    dense: bool | None = None,
    T: int | None = None,
    gradient: bool = True,
    documents: bool | None = None,
    from_state: bool = False,
    activation: str = "identity",
) -> list[Case]:
    """Of a scan in `dtype` of N states a channel in chunks of T tokens, as it is about to be called: the very machine
    code, for nothing else is specialised on; with gradients or without; over documents, from a state and with an
    activation or not; in every configuration. Each is machine code of its own: one may be right and another wrong.

    documents None: the four kinds that models have, each with and without all of that.
    """
    kind = family(architecture(device))
    if documents is None:
        ways = (True, True, "identity"), (False, False, "gelu")
    else:
        ways = ((documents, from_state, activation),)
    return [
        case
        for each, tolerance in ((torch.bfloat16, 2e-2), (torch.float32, 2e-5))
        if dtype in (None, each)
        for of_carry in ((False, True) if dense is None else (dense,))
        for number in range(len(scan_configurations(kind, each, N, of_carry)))
        for way in ways
        for case in _cases(device, each, of_carry, N, T or longest_chunk(each, N, of_carry), gradient, *way, tolerance)(
            number
        )
    ]


def _cases(device, dtype, dense, N, T, gradient, documents, from_state, activation, tolerance):
    """number of the configuration -> the cases. The rows leave room for segments, of which few chunks make none; many
    are, with those of the batch, more than four of the Gram product's steps, which are pipelined.
    """
    B, many, few, H = 4, 68, 7, 2 if family(architecture(device)) == "interpreter" else 16
    label = (
        f"{'dense' if dense else 'diagonal'} {str(dtype).removeprefix('torch.')} of {N} states in chunks of {T}"
        f"{', over documents' if documents else ''}{', from a state' if from_state else ''}"
        f"{'' if activation == 'identity' else f', {activation}'}{'' if gradient else ', without gradients'}"
    )
    options = {"gradient": gradient, "documents": documents, "activation": activation}

    def cases(number):
        def case(of, T, length, **more):
            functions = _functions(device, dtype, dense, N, T, B, length, H, number=number, **options, **more)
            return Case(f"{label}{of}{f', configuration {number}' if number else ''}", *functions, tolerance)

        lacks = 0 if documents or from_state or T < 4 else 3
        found = []
        for chunks, of in ((many, ""), (few, ", in one segment")):
            problem = T, chunks * T - lacks
            found.append(case(of, *problem, from_state=from_state))
            if not gradient and not number:
                found.append(case(f"{of}, its last state alone", *problem, from_state=from_state, has_output=False))
        if from_state and not documents and not number:
            found.append(case(", what is left", max(1, T - 1), max(1, T - 1), from_state=True, rest=True))
        return found

    return cases


def _functions(device, dtype, dense, N, T, B, length, H, number, gradient, documents, activation, from_state, **more):
    """(the kernel's run, its twin's) on one random problem. more: of `Wanted`."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator, dtype=torch.float32) * scale).to(device)

    decay = random(H, N, N, scale=0.5 / N**0.5) if dense else random(H, N, scale=0.3)
    operators = ChunkOperators(random(H, T), random(H, T, N, scale=N**-0.5), random(H, N, T, scale=T**-0.5), decay)
    u, grad_y = (random(B, length, H).to(dtype) for _ in range(2))
    state, grad_state = random(B, H, N), random(B, H, N)
    keep = torch.ones(B, -(-length // T), dtype=torch.bool, device=device) if documents else None
    if documents:
        keep[1, 2] = keep[3, 0] = False
    wanted = Wanted(keep, activation=activation, **more)

    def run(implementation, cast, pad=0):
        inputs = [cast(x).requires_grad_(gradient) for x in (u, *operators, *([state] if from_state else []))]
        first = F.pad(inputs[0], (0, 0, pad, 0))  # zeros, which the kernel puts there itself
        with torch.set_grad_enabled(gradient):
            start = inputs[5] if from_state else None
            y, final = differentiable(implementation, first, ChunkOperators(*inputs[1:5]), start, wanted)
        if not wanted.has_output:
            return [final]
        y = y[:, pad:]
        if not gradient:
            return [y, final]
        gradients = torch.autograd.grad([y, final], inputs, [cast(grad_y).to(y.dtype), cast(grad_state)])
        return [y.detach(), final.detach(), *gradients]

    def run_kernel():
        with numbered_configuration(number):
            return run(FUSED, lambda x: x.detach().clone())

    return run_kernel, lambda: run(PLAIN, lambda x: x.detach().double(), -length % T)
