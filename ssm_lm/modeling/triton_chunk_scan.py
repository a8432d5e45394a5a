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
the activation's own gradient would keep just so.

Several channels a program would spare the transpose, but not for less: 16 channels' operators are 400 KiB in
bfloat16, and 8 of them, with a dense carry, still more than an SM's shared memory.

The rows of a matrix product are batch elements: M = 16 of them, so that the state stays in registers and no chunk
waits for more than the one before. Fewer batch elements leave rows empty; at B = 8 tensor cores still wait for memory.

The backward is the same kernel with transposed operators, over the chunks in reverse, then one Gram product that holds
the gradients of all four operators. Nothing is summed atomically: every result is the same bits every time.
"""

from typing import NamedTuple

import torch

from .activations import ACTIVATIONS
from .chunked import (
    PLAIN,
    ChunkOperators,
    Implementation,
    Saved,
    Wanted,
    differentiable,
    operator_gradients,
)
from .kernel_launch import architecture, family, numbered_configuration, on_device, qualified, tuned
from .kernel_limits import longest_chunk
from .kernels_s4 import Case
from .triton_step import activate

try:
    import triton
    import triton.language as tl
except ImportError:  # `kernels_s4` asks for this module in a `try` of its own, and reports the cause
    raise

# ---- kernels. Sequences are rows (H, B, L); chunk c of a row holds the tokens c T - pad .. (c + 1) T - pad, of which
# ---- those outside of 0 .. L - 1 count as zero. TP and NP: T and N, or for a diagonal carry N/2, as powers of two


@triton.jit
def transpose_kernel(x, y, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """x (rows, columns) -> y (columns, rows)."""
    blocks = tl.cdiv(columns, COLUMNS)
    r = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = (tl.program_id(0) % blocks).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (r < rows)[:, None] & (c < columns)[None, :]
    tile = tl.load(x + r[:, None] * columns + c[None, :], mask=inside, other=0)
    tl.store(y + c[:, None] * rows + r[None, :], tl.trans(tile), mask=tl.trans(inside))


@triton.jit
def scan_kernel(
    x,  # (H, B, L) what drives the state: u, or in reverse the gradient of y
    y,  # (H, B, L) what comes out: y, or the gradient of u
    taps,  # (H, T)
    emit,  # (H, T, N)
    inject,  # (H, N, T)
    carry,  # (H, N, N) or (H, N)
    first,  # (B, H, N) the state before the first chunk that is run, None for zero
    last,  # (B, H, N) the state after the last
    states,  # (H, B, C, N) the state with which every chunk's output was made; None: not kept
    before,  # (H, B, L) y before its activation; None: not kept
    keep,  # (B, C) bytes, or None
    B,
    H,
    L,
    C,
    T,
    N,
    pad,
    REVERSE: tl.constexpr,
    DENSE: tl.constexpr,
    HAS_OUTPUT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    TP: tl.constexpr,
    NP: tl.constexpr,
    M: tl.constexpr,
    PRECISION: tl.constexpr,
    CARRY_PRECISION: tl.constexpr,
):
    """One channel and M batch elements; grid (H, B / M)."""
    h = tl.program_id(0).to(tl.int64)
    b = tl.program_id(1) * M + tl.arange(0, M)
    b_in = b < B
    t, n = tl.arange(0, TP), tl.arange(0, NP)
    width = N if DENSE else N // 2  # of a state's first, or only, part
    n_in = n < width
    low = x.dtype.element_ty

    # the operators as right factors of row vectors; in reverse, transposed
    lag = t[:, None] - t[None, :] if REVERSE else t[None, :] - t[:, None]
    within = tl.load(taps + h * T + lag, mask=(lag >= 0) & (lag < T), other=0.0).to(low)
    tn_in = (t < T)[:, None] & n_in[None, :]
    nt_in = n_in[:, None] & (t < T)[None, :]
    tn_emit, nt_emit = emit + h * T * N + t[:, None] * N + n[None, :], emit + h * T * N + t[None, :] * N + n[:, None]
    tn_inject, nt_inject = (
        inject + h * T * N + n[None, :] * T + t[:, None],
        inject + h * T * N + n[:, None] * T + t[None, :],
    )
    if REVERSE:
        into, out_of, half_into, half_out = tn_emit, nt_inject, width, width * T
    else:
        into, out_of, half_into, half_out = tn_inject, nt_emit, width * T, width
    into0 = tl.load(into, mask=tn_in, other=0.0).to(low)
    out0 = tl.load(out_of, mask=nt_in, other=0.0).to(low)
    if DENSE:
        square = n[:, None] * N + n[None, :] if REVERSE else n[None, :] * N + n[:, None]
        power = tl.load(carry + h * N * N + square, mask=n_in[:, None] & n_in[None, :], other=0.0)
    else:
        into1 = tl.load(into + half_into, mask=tn_in, other=0.0).to(low)
        out1 = tl.load(out_of + half_out, mask=nt_in, other=0.0).to(low)
        power_re = tl.load(carry + h * N + n, mask=n_in, other=0.0)[None, :]
        power_im = tl.load(carry + h * N + width + n, mask=n_in, other=0.0)[None, :]
        if REVERSE:
            power_im = -power_im

    state_in = b_in[:, None] & n_in[None, :]
    at_end = (b.to(tl.int64)[:, None] * H + h) * N + n[None, :]
    s0 = tl.zeros((M, NP), tl.float32)
    s1 = tl.zeros((M, NP), tl.float32)
    if first is not None:
        s0 = tl.load(first + at_end, mask=state_in, other=0.0)
        if not DENSE:
            s1 = tl.load(first + at_end + width, mask=state_in, other=0.0)

    row = (h * B + b)[:, None]
    for step in range(0, C):
        c = C - 1 - step if REVERSE else step
        token = c * T - pad + t
        x_in = b_in[:, None] & ((t < T) & (token >= 0) & (token < L))[None, :]
        X = tl.load(x + row * L + token[None, :], mask=x_in, other=0.0)
        if keep is not None:
            stays = tl.load(keep + b.to(tl.int64) * C + c, mask=b_in, other=0)[:, None] != 0
            if not REVERSE:
                s0 = tl.where(stays, s0, 0.0)
                s1 = tl.where(stays, s1, 0.0)
        low0, low1 = s0.to(low), s1.to(low)
        if states is not None:
            at = states + (row * C + c) * N + n[None, :]
            tl.store(at, low0, mask=state_in)
            if not DENSE:
                tl.store(at + width, low1, mask=state_in)
        if HAS_OUTPUT:
            out = tl.dot(X, within, input_precision=PRECISION)
            out = tl.dot(low0, out0, out, input_precision=PRECISION)
            if not DENSE:
                out = tl.dot(low1, out1, out, input_precision=PRECISION)
            if before is not None:
                tl.store(before + row * L + token[None, :], out.to(low), mask=x_in)
            tl.store(y + row * L + token[None, :], activate(out, ACTIVATION).to(low), mask=x_in)
        if DENSE:
            s0 = tl.dot(s0, power, input_precision=CARRY_PRECISION)
            s0 = tl.dot(X, into0, s0, input_precision=PRECISION)
        else:
            turned = power_re * s0 - power_im * s1
            s1 = tl.dot(X, into1, power_re * s1 + power_im * s0, input_precision=PRECISION)
            s0 = tl.dot(X, into0, turned, input_precision=PRECISION)
        if keep is not None:
            if REVERSE:
                s0 = tl.where(stays, s0, 0.0)
                s1 = tl.where(stays, s1, 0.0)
    tl.store(last + at_end, s0, mask=state_in)
    if not DENSE:
        tl.store(last + at_end + width, s1, mask=state_in)


@triton.jit
def gram_kernel(
    grad_y,  # (H, B, L)
    driven,  # (H, B, C, N) the gradient that reaches the state after every chunk
    u,  # (H, B, L)
    starts,  # (H, B, C, N) the state before every chunk
    gram,  # (H, T + N, T + N), float32
    B,
    L,
    C,
    T,
    N,
    pad,
    P: tl.constexpr,
    R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sums over the B C chunks of outer products, [grad_y | driven]^T [u | starts]; P x P of them a program, T at most
    P. States are sequences too, cut into chunks of N. Grid ((1 + N / P)^2, H).
    """
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
    left_width, left_length = tl.where(left_block == 0, T, N), tl.where(left_block == 0, L, C * N)
    right_width, right_length = tl.where(right_block == 0, T, N), tl.where(right_block == 0, L, C * N)
    left_pad, right_pad = tl.where(left_block == 0, pad, 0), tl.where(right_block == 0, pad, 0)
    i = tl.maximum(left_block - 1, 0) * P + tl.arange(0, P)
    j = tl.maximum(right_block - 1, 0) * P + tl.arange(0, P)

    total = tl.zeros((P, P), tl.float32)
    for start in range(0, B * C, R):
        r = start + tl.arange(0, R)
        sequence, c = (h * B + r // C)[:, None], (r % C)[:, None]
        r_in = (r < B * C)[:, None]
        at = c * left_width - left_pad + i[None, :]
        inside = r_in & (i < left_width)[None, :] & (at >= 0) & (at < left_length)
        a = tl.load(left + sequence * left_length + at, mask=inside, other=0.0)
        at = c * right_width - right_pad + j[None, :]
        inside = r_in & (j < right_width)[None, :] & (at >= 0) & (at < right_length)
        b = tl.load(right + sequence * right_length + at, mask=inside, other=0.0)
        total = tl.dot(tl.trans(a), b, total, input_precision=PRECISION)
    row = tl.where(left_block == 0, 0, T) + i[:, None]
    column = tl.where(right_block == 0, 0, T) + j[None, :]
    inside = (i < left_width)[:, None] & (j < right_width)[None, :]
    tl.store(gram + (h * (T + N) + row) * (T + N) + column, total, mask=inside)


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
        return (Launch(16, 4, 2) if N <= 64 else Launch(16, 8, 1),)
    if family == "blackwell":
        return (Launch(16, 4 if N <= 64 else 8, 1),)
    return (Launch(16, 4, 1 if family == "interpreter" or (dense and N > 64) else 2),)


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


def _chunks(L: int, T: int, from_zero: bool) -> tuple[int, int]:
    """How many chunks, and how many zeros stand before the first token. From a zero state these change nothing, and
    the last chunk is a whole one, with the true state after it.
    """
    chunks = -(-L // T)
    return chunks, chunks * T - L if from_zero else 0


def launch_scan(x, y, operators, first, last, states, keep, pad, reverse, activation="identity", before=None):
    """Run `scan_kernel`. x, y (H, B, L), y None for no output; the rest as there. All contiguous, on one device."""
    H, B, L = x.shape
    taps, _, inject, carry = operators
    T, N, dense = taps.shape[-1], inject.shape[1], carry.dim() == 3
    if H * B == 0:
        return
    kind = family(architecture(x.device))
    product, carried = precisions(kind, x.dtype)
    TP, NP = power_of_two(T), power_of_two(N if dense else N // 2)
    C = -(-(L + pad) // T)

    def run(launch):
        scan_kernel[(H, triton.cdiv(B, launch.rows))](
            x,
            x if y is None else y,
            *operators,
            first,
            last,
            states,
            before,
            keep,
            B,
            H,
            L,
            C,
            T,
            N,
            pad,
            REVERSE=reverse,
            DENSE=dense,
            HAS_OUTPUT=y is not None,
            ACTIVATION=activation,
            TP=TP,
            NP=NP,
            M=launch.rows,
            PRECISION=product,
            CARRY_PRECISION=carried,
            **launch.options(kind),
        )

    with on_device(x.device):
        # programs and chunks to the next power of two: what fills a card, and what is waited for
        size = f"{(H * triton.cdiv(B, 16)).bit_length()} {C.bit_length()}"
        problem = f"{x.dtype} T{TP} N{NP} {'dense' if dense else 'diagonal'} size {size}"
        run(tuned("chunk_scan", problem, scan_configurations(kind, x.dtype, N, dense), run, x.device))


def launch_gram(grad_y, driven, u, starts, gram, T, pad):
    """Run `gram_kernel`."""
    H, B, C, N = starts.shape
    if H == 0:
        return
    kind = family(architecture(u.device))
    (launch,) = gram_configurations(kind, u.dtype)
    P = gram_block(kind, u.dtype, T, N)
    arguments = (grad_y, driven, u, starts, gram, B, u.shape[2], C, T, N, pad)
    blocks = 1 + triton.cdiv(N, P)
    with on_device(u.device):
        gram_kernel[(blocks * blocks, H)](
            *arguments,
            P=P,
            R=launch.rows,
            PRECISION=precisions(kind, u.dtype)[0],
            **launch.options(kind),
        )


# ---- operators of torch


@torch.library.custom_op(qualified("transpose"), mutates_args=())
def transpose(x: torch.Tensor) -> torch.Tensor:
    """(rows, columns) -> (columns, rows), contiguous."""
    rows, columns = x.shape
    y = x.new_empty(columns, rows)
    if x.numel():
        grid = (triton.cdiv(rows, 64) * triton.cdiv(columns, 64),)
        with on_device(x.device):
            transpose_kernel[grid](x.contiguous(), y, rows, columns, ROWS=64, COLUMNS=64, num_warps=4, num_stages=1)
    return y


@transpose.register_fake
def _(x):
    return x.new_empty(x.shape[1], x.shape[0])


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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (H, B, L) -> y (H, B, L), the final state (B, H, N), and with `save`, for the backward, the states (H, B, C, N)
    at the chunks' starts and y before its activation. What is not asked for, or the same as y, is empty. activation:
    one of ACTIVATIONS, applied to y in float32.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is one of {', '.join(ACTIVATIONS)}, not {activation!r}")
    operators = [operator.float().contiguous() for operator in (taps, emit, inject, carry)]
    (H, B, L), N = x.shape, inject.shape[1]
    chunks, pad = _chunks(L, taps.shape[-1], initial_state is None)
    y = torch.empty(x.shape if has_output else 0, dtype=x.dtype, device=x.device)
    final = torch.empty(B, H, N, dtype=torch.float32, device=x.device)
    starts = torch.empty((H, B, chunks, N) if save else 0, dtype=x.dtype, device=x.device)
    keep_before = save and has_output and activation != "identity"
    before = torch.empty(x.shape if keep_before else 0, dtype=x.dtype, device=x.device)
    first = None if initial_state is None else initial_state.float().contiguous()
    launch_scan(
        x.contiguous(),
        y if has_output else None,
        operators,
        first,
        final,
        starts if save else None,
        _bytes(keep),
        pad,
        reverse=False,
        activation=activation,
        before=before if keep_before else None,
    )
    return y, final, starts, before


@scan.register_fake
def _(x, taps, emit, inject, carry, initial_state, keep, has_output, save, activation):
    (H, B, L), N = x.shape, inject.shape[1]
    y = x.new_empty(x.shape if has_output else 0)
    starts = x.new_empty((H, B, -(-L // taps.shape[-1]), N) if save else 0)
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
    from_zero: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of x (H, B, L), of the initial state (B, H, N), and the Gram matrix (H, T + N, T + N) that holds
    those of the operators; see `operator_gradients`.
    """
    operators = [operator.float().contiguous() for operator in (taps, emit, inject, carry)]
    (H, B, L), N, T = x.shape, inject.shape[1], taps.shape[-1]
    _, pad = _chunks(L, T, from_zero)
    x = x.contiguous()
    grad_y = torch.zeros_like(x) if grad_y is None else grad_y.contiguous()
    grad_x, driven = torch.empty_like(x), torch.empty_like(starts)
    grad_initial = torch.empty(B, H, N, dtype=torch.float32, device=x.device)
    gram = torch.empty(H, T + N, T + N, dtype=torch.float32, device=x.device)
    first = None if grad_final is None else grad_final.float().contiguous()
    launch_scan(grad_y, grad_x, operators, first, grad_initial, driven, _bytes(keep), pad, reverse=True)
    launch_gram(grad_y, driven, x, starts, gram, T, pad)
    return grad_x, grad_initial, gram


@scan_backward.register_fake
def _(grad_y, grad_final, x, starts, keep, taps, emit, inject, carry, from_zero):
    (H, B, _), N, size = x.shape, inject.shape[1], taps.shape[-1] + inject.shape[1]
    like = dict(dtype=torch.float32)
    return x.new_empty(x.shape), x.new_empty(B, H, N, **like), x.new_empty(H, size, size, **like)


# ---- from and to the model's layout


def to_rows(sequence: torch.Tensor) -> torch.Tensor:
    """(B, L, H) -> (H, B, L), contiguous; without a copy where `sequence` is a view of rows."""
    rows = sequence.permute(2, 0, 1)
    return rows if rows.is_contiguous() else transpose(sequence.flatten(0, 1)).view(rows.shape)


def from_rows(rows: torch.Tensor) -> torch.Tensor:
    """(H, B, L) -> (B, L, H), contiguous."""
    H, B, L = rows.shape
    return transpose(rows.flatten(1)).view(B, L, H)


# ---- the implementation


def forward(u, operators: ChunkOperators, initial_state, wanted: Wanted, save: bool):
    """See `chunked.Implementation`; y is a (B, L, H) view of rows, and what is saved lies in rows."""
    rows = to_rows(u)
    options = wanted.keep, wanted.has_output, save, wanted.activation
    y, final, starts, before = scan(rows, *operators, initial_state, *options)
    return y.permute(1, 2, 0) if wanted.has_output else None, final, Saved(rows, starts, before)


def backward(saved: Saved, operators: ChunkOperators, wanted: Wanted, grad_y, grad_final, from_zero: bool):
    """See `chunked.Implementation`."""
    rows, starts, before = saved
    if grad_y is not None:
        grad_y = ACTIVATIONS[wanted.activation].backward(to_rows(grad_y), before)
    grad_u, grad_initial, gram = scan_backward(grad_y, grad_final, rows, starts, wanted.keep, *operators, from_zero)
    return from_rows(grad_u), grad_initial, operator_gradients(gram, operators.taps, operators.carry)


FUSED = Implementation(forward, backward, to_rows)


# ---- the self-check


def self_check_cases(
    device: torch.device, dtype: torch.dtype | None = None, N: int = 64, dense: bool | None = None
) -> list[Case]:
    """Forward and backward, with an initial state and resets: of a scan in `dtype` of N states a channel, or of the
    four kinds that models have, in every configuration. Each is machine code of its own: one may be right and another
    wrong.
    """
    kind = family(architecture(device))
    return [
        _case(device, each, of_carry, N, tolerance, bare, number)
        for each, tolerance in ((torch.bfloat16, 2e-2), (torch.float32, 2e-5))
        if dtype in (None, each)
        for of_carry in ((False, True) if dense is None else (dense,))
        for number in range(len(scan_configurations(kind, each, N, of_carry)))
        for bare in (False, True)
    ]


def _case(device, dtype, dense, N, tolerance, bare, number, H=2, B=15, chunks=18):
    """bare: without initial state and resets, and with an activation, as in a step of training. number: of the
    configuration. The chunks of the batch are more than four of the Gram product's steps, which are pipelined.
    """
    T = longest_chunk(dtype, N, dense)
    generator = torch.Generator().manual_seed(0)

    def random(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator, dtype=torch.float32) * scale).to(device)

    decay = random(H, N, N, scale=0.5 / N**0.5) if dense else random(H, N, scale=0.3)
    operators = ChunkOperators(random(H, T), random(H, T, N, scale=N**-0.5), random(H, N, T, scale=T**-0.5), decay)
    u, grad_y = (random(B, chunks * T, H).to(dtype) for _ in range(2))
    state, grad_state = random(B, H, N), random(B, H, N)
    keep = torch.ones(B, chunks, dtype=torch.bool, device=device)
    keep[1, 2] = keep[3, 0] = False

    def run(implementation, cast):
        inputs = [cast(x).requires_grad_() for x in (u, *operators, *([] if bare else [state]))]
        rest = [None, Wanted(activation="gelu")] if bare else [inputs[5], Wanted(keep)]
        y, final = differentiable(implementation, inputs[0], ChunkOperators(*inputs[1:5]), *rest)
        gradients = torch.autograd.grad([y, final], inputs, [cast(grad_y).to(y.dtype), cast(grad_state)])
        return [y.detach(), final.detach(), *gradients]

    label = (
        f"{'dense' if dense else 'diagonal'} {str(dtype).removeprefix('torch.')} of {N} states"
        f"{' from zero, gelu' if bare else ''}{f', configuration {number}' if number else ''}"
    )

    def run_kernel():
        with numbered_configuration(number):
            return run(FUSED, lambda x: x.detach().clone())

    return Case(
        label,
        run_kernel,
        lambda: run(PLAIN, lambda x: x.detach().double()),
        tolerance,
    )
