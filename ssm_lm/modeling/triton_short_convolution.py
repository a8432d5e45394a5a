"""The short convolution on a GPU: one launch forward, with the activation and the new tail; one launch back.

A program walks the tokens of ROWS segments at once, for BLOCK_C channels. What the taps see, the last K inputs, stays
in registers and moves on by one at each token: an input is read once, a document's border empties the window, and the
first token of a segment finds in it what lies before, in the row or in the tail. Inputs are read two tokens ahead.

The backward walks the same way, K - 1 tokens further than its segment: the output before its activation is made anew
from the inputs, and what each of them is still owed moves along beside it. Nothing but u is kept for it. Sums for
weight and bias are written a program, and added up in a fixed order, no atomics.

Everything is float32 between reading and writing. The equation stands in short_convolution.py.
"""

from functools import partial

import torch

from .kernel_launch import in_rows, on_device, qualified
from .kernel_limits import CONVOLVED_CHANNELS, CONVOLVED_ROWS, convolved_tokens
from .kernels_s4 import Case, gradient_case
from .short_taps import convolve_taps
from .triton_step import activate

try:
    import triton
    import triton.language as tl
except ImportError:  # `kernels_s4` asks for this module in a `try` of its own, and reports the cause
    raise


@triton.jit
def place(L, T, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """(row of the batch, its number among the row's programs, first tokens of the segments, channels) of a program of
    the grid (B blocks, blocks of channels).
    """
    blocks = tl.maximum(tl.cdiv(L, T * ROWS), 1)
    block = tl.program_id(0) % blocks
    segments = block * ROWS + tl.arange(0, ROWS)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    return (tl.program_id(0) // blocks).to(tl.int64), block, segments * T, channels


@triton.jit
def is_document(seq_idx, token, exists):
    """Whether tokens are no padding; False where they do not exist."""
    return exists & (tl.load(seq_idx + token, mask=exists, other=0) >= 0)


@triton.jit
def read(x, token, exists, c, C, row):
    """(tokens, channels) of x, whose tokens lie `row` numbers apart; 0 where a token does not exist."""
    inside = exists[:, None] & (c < C)[None, :]
    return tl.load(x + (token * row)[:, None] + c[None, :], mask=inside, other=0.0)


@triton.jit
def read_input(u, seq_idx, b, t, c, L, C, row, RESETS: tl.constexpr):
    """What the convolution sees of tokens t."""
    token = b * L + t
    exists = (t >= 0) & (t < L)
    if RESETS:
        exists = is_document(seq_idx, token, exists)
    return read(u, token, exists, c, C, row)


@triton.jit
def read_before(u, initial, seq_idx, b, t, c, L, C, row, has_initial, K: tl.constexpr, RESETS: tl.constexpr):
    """The same in float32, of tokens that may lie before the first, in `initial` (B, K - 1, C)."""
    x = read_input(u, seq_idx, b, t, c, L, C, row, RESETS).to(tl.float32)
    of_initial = (t < 0) & (t > -K) & (has_initial != 0)
    return x + read(initial, b * (K - 1) + t + K - 1, of_initial, c, C, C)


@triton.jit
def is_same(begins, b, t, L):
    """Whether tokens t are of the document of the token before them; True beyond the row."""
    return tl.load(begins + b * L + t, mask=(t >= 0) & (t < L), other=0) == 0


@triton.jit
def cut(x, same):
    """x (tokens, channels) where it is of the same document, else 0; what is not a number does not pass either."""
    return tl.where(same[:, None], x, 0.0)


@triton.jit
def convolve(x0, x1, x2, x3, w0, w1, w2, w3, bias, K: tl.constexpr):
    """bias + sum_i w_i x_i of the inputs of 0 to K - 1 tokens ago."""
    y = bias + w0 * x0
    if K > 1:
        y += w1 * x1
    if K > 2:
        y += w2 * x2
    if K > 3:
        y += w3 * x3
    return y


@triton.jit
def read_taps(weight, bias, c, C, K: tl.constexpr):
    """w_0 .. w_3, of the token itself and those before it, and the bias, each (1, channels); 0 beyond K taps."""
    last = c * K + K - 1
    w0 = tl.load(weight + last, mask=c < C, other=0.0).to(tl.float32)
    w1 = tl.load(weight + last - 1, mask=(c < C) & (K > 1), other=0.0).to(tl.float32)
    w2 = tl.load(weight + last - 2, mask=(c < C) & (K > 2), other=0.0).to(tl.float32)
    w3 = tl.load(weight + last - 3, mask=(c < C) & (K > 3), other=0.0).to(tl.float32)
    constant = tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)
    return w0[None, :], w1[None, :], w2[None, :], w3[None, :], constant[None, :]


@triton.jit
def read_window(u, initial, begins, seq_idx, b, t, c, L, C, row, has_initial, K: tl.constexpr, RESETS: tl.constexpr):
    """The inputs of 1, 2 and 3 tokens before t, of the document of the token before t; 0 beyond K taps."""
    x1 = tl.zeros((t.shape[0], c.shape[0]), tl.float32)
    x2, x3 = x1, x1
    if K > 3:
        x3 = read_before(u, initial, seq_idx, b, t - 3, c, L, C, row, has_initial, K, RESETS)
    if K > 2:
        x2 = read_before(u, initial, seq_idx, b, t - 2, c, L, C, row, has_initial, K, RESETS)
        if RESETS:
            x3 = cut(x3, is_same(begins, b, t - 2, L))
    if K > 1:
        x1 = read_before(u, initial, seq_idx, b, t - 1, c, L, C, row, has_initial, K, RESETS)
        if RESETS:
            same = is_same(begins, b, t - 1, L)
            x2, x3 = cut(x2, same), cut(x3, same)
    return x1, x2, x3


# lengths, and what a call asks for, are no constants: another one compiles nothing new
@triton.jit(do_not_specialize=["L", "T", "has_initial", "has_tail"])
def convolve_kernel(
    u,
    weight,
    bias,
    initial,
    begins,
    seq_idx,
    y,
    tail,
    L,
    T,
    C,
    row,
    has_initial,
    has_tail,
    K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RESETS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y (B, L, C) of u (B, L, C), whose tokens lie `row` numbers apart, and tail (B, K - 1, C) after it."""
    b, block, first, c = place(L, T, ROWS, BLOCK_C)
    if (block == 0) & (has_tail != 0):  # first, so that its addresses hold no registers in the loop
        at = tl.arange(0, ROWS)
        last = L - K + 1 + at
        kept = read_before(u, initial, seq_idx, b, last, c, L, C, row, has_initial, K, RESETS)
        if RESETS:
            for later in tl.static_range(1, K - 1):
                kept = cut(kept, is_same(begins, b, last + later, L))
        is_kept = (at < K - 1)[:, None] & (c < C)[None, :]
        tl.store(tail + ((b * (K - 1) + at) * C)[:, None] + c[None, :], kept, mask=is_kept)
    w0, w1, w2, w3, constant = read_taps(weight, bias, c, C, K)
    x1, x2, x3 = read_window(u, initial, begins, seq_idx, b, first, c, L, C, row, has_initial, K, RESETS)
    ahead0 = read_input(u, seq_idx, b, first, c, L, C, row, RESETS)
    ahead1 = read_input(u, seq_idx, b, first + 1, c, L, C, row, RESETS)
    for i in range(T):
        t = first + i
        ahead2 = read_input(u, seq_idx, b, t + 2, c, L, C, row, RESETS)
        x0 = ahead0.to(tl.float32)
        if RESETS:
            same = is_same(begins, b, t, L)
            x1, x2, x3 = cut(x1, same), cut(x2, same), cut(x3, same)
        out = activate(convolve(x0, x1, x2, x3, w0, w1, w2, w3, constant, K), ACTIVATION)
        inside = (t < L)[:, None] & (c < C)[None, :]
        tl.store(y + ((b * L + t) * C)[:, None] + c[None, :], out.to(y.dtype.element_ty), mask=inside)
        x3, x2, x1, ahead0, ahead1 = x2, x1, x0, ahead1, ahead2


@triton.jit(do_not_specialize=["L", "T", "has_initial", "has_grad_tail"])
def convolve_backward_kernel(
    g,
    grad_tail,
    u,
    weight,
    bias,
    initial,
    begins,
    seq_idx,
    grad_u,
    grad_weight,
    grad_bias,
    grad_initial,
    L,
    T,
    C,
    row,
    g_row,
    has_initial,
    has_grad_tail,
    K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RESETS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """grad_u (B, L, C) and grad_initial (B, K - 1, C) of g, that of y, whose tokens lie g_row numbers apart, and of
    grad_tail (B, K - 1, C); a program's part of grad_weight (programs, C, K) and grad_bias (programs, C).
    """
    b, block, first, c = place(L, T, ROWS, BLOCK_C)
    w0, w1, w2, w3, constant = read_taps(weight, bias, c, C, K)
    x1, x2, x3 = read_window(u, initial, begins, seq_idx, b, first, c, L, C, row, has_initial, K, RESETS)
    zero = tl.zeros((ROWS, BLOCK_C), tl.float32)
    owed0, owed1, owed2, owed3 = zero, zero, zero, zero  # to the inputs of so many tokens ago
    sum0, sum1, sum2, sum3, total = zero, zero, zero, zero, zero
    is_near = first >= 0
    # whether so many tokens ago it was the same document, from `first` on
    near1, near2, near3 = is_near, is_near, is_near
    ahead0 = read_input(u, seq_idx, b, first, c, L, C, row, RESETS)
    ahead1 = read_input(u, seq_idx, b, first + 1, c, L, C, row, RESETS)
    g_ahead0 = read(g, b * L + first, first < L, c, C, g_row)
    g_ahead1 = read(g, b * L + first + 1, first + 1 < L, c, C, g_row)
    for i in range(T + K - 1):
        t = first + i
        ahead2 = read_input(u, seq_idx, b, t + 2, c, L, C, row, RESETS)
        g_ahead2 = read(g, b * L + t + 2, t + 2 < L, c, C, g_row)
        x0, s = ahead0.to(tl.float32), g_ahead0.to(tl.float32)
        if RESETS:
            same = is_same(begins, b, t, L)
            x1, x2, x3 = cut(x1, same), cut(x2, same), cut(x3, same)
            near3, near2, near1 = near2 & same, near1 & same, same
        if ACTIVATION == "silu":
            y = convolve(x0, x1, x2, x3, w0, w1, w2, w3, constant, K)
            part = tl.sigmoid(y)
            s = s * part * (1 + y * (1 - part))
        own = cut(s, is_near & (i < T))  # the others are those of the next segment
        total += own
        sum0 += own * x0
        owed3, owed2, owed1, owed0 = owed2, owed1, owed0, w0 * s
        if K > 1:
            sum1 += own * x1
            owed1 += cut(w1 * s, near1)
        if K > 2:
            sum2 += own * x2
            owed2 += cut(w2 * s, near2)
        if K > 3:
            sum3 += own * x3
            owed3 += cut(w3 * s, near3)
        done, is_near_done = owed0, is_near
        if K == 2:
            done, is_near_done = owed1, near1
        if K == 3:
            done, is_near_done = owed2, near2
        if K == 4:
            done, is_near_done = owed3, near3
        p = t - (K - 1)
        # what is in the new tail
        after = p - (L - K + 1)
        is_kept = (after >= 0) & (after < K - 1) & is_near_done & (has_grad_tail != 0)
        done += read(grad_tail, b * (K - 1) + after, is_kept, c, C, C)
        is_own = (p >= first) & (p < first + T) & (p < L)
        if RESETS:
            done = cut(done, is_document(seq_idx, b * L + p, is_own) | (p < 0))
        at = ((b * L + p) * C)[:, None] + c[None, :]
        tl.store(grad_u + at, done.to(grad_u.dtype.element_ty), mask=is_own[:, None] & (c < C)[None, :])
        if (block == 0) & (i < K - 1) & (has_initial != 0):
            is_before = (first == 0) & (p < 0) & (has_initial != 0)
            at = ((b * (K - 1) + p + K - 1) * C)[:, None] + c[None, :]
            tl.store(grad_initial + at, done, mask=is_before[:, None] & (c < C)[None, :])
        x3, x2, x1, ahead0, ahead1, g_ahead0, g_ahead1 = x2, x1, x0, ahead1, ahead2, g_ahead1, g_ahead2
    at = tl.program_id(0).to(tl.int64) * C + c
    tl.store(grad_bias + at, tl.sum(total, 0), mask=c < C)
    tl.store(grad_weight + at * K + K - 1, tl.sum(sum0, 0), mask=c < C)
    if K > 1:
        tl.store(grad_weight + at * K + K - 2, tl.sum(sum1, 0), mask=c < C)
    if K > 2:
        tl.store(grad_weight + at * K + K - 3, tl.sum(sum2, 0), mask=c < C)
    if K > 3:
        tl.store(grad_weight + at * K + K - 4, tl.sum(sum3, 0), mask=c < C)


# ---- launches

TILES = {"ROWS": CONVOLVED_ROWS, "BLOCK_C": CONVOLVED_CHANNELS, "num_warps": 8, "num_stages": 1}


class _Launch:
    """What the launches of one convolution share."""

    def __init__(self, u, weight, begins, seq_idx, activation):
        B, L, C = u.shape
        self.T, blocks = convolved_tokens(B, L, C)
        self.programs = B * blocks
        self.grid = self.programs, triton.cdiv(C, CONVOLVED_CHANNELS)
        self.documents = None, None
        if begins is not None:
            self.documents = begins.contiguous().view(torch.uint8), seq_idx.long().contiguous()
        self.options = {"K": weight.shape[1], "ACTIVATION": activation, "RESETS": begins is not None, **TILES}


def run_forward(
    u: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    tail: torch.Tensor | None,
    begins: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    activation: str,
    has_tail: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `convolve_taps`, but that the new tail is float32, and empty without has_tail."""
    (B, L, C), K = u.shape, weight.shape[1]
    y = u.new_empty(B, L, C)
    new_tail = u.new_empty((B, K - 1, C) if has_tail else 0, dtype=torch.float32)
    launch, (u, row) = _Launch(u, weight, begins, seq_idx, activation), in_rows(u)
    initial = new_tail if tail is None else tail.float().contiguous()  # is not read where there is none
    if B and C:
        with on_device(u.device):
            convolve_kernel[launch.grid](
                u,
                weight.contiguous(),
                bias.contiguous(),
                initial,
                *launch.documents,
                y,
                new_tail,
                L,
                launch.T,
                C,
                row,
                int(tail is not None),
                int(has_tail),
                **launch.options,
            )
    return y, new_tail


def run_backward(
    grad_y: torch.Tensor,
    grad_tail: torch.Tensor | None,
    u: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    tail: torch.Tensor | None,
    begins: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    activation: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of u, weight and bias, each in its dtype, and of the tail in float32, empty where there is none."""
    (B, L, C), K = u.shape, weight.shape[1]
    launch, (u, row), (grad_y, g_row) = _Launch(u, weight, begins, seq_idx, activation), in_rows(u), in_rows(grad_y)
    grad_u = u.new_empty(B, L, C)
    grad_initial = u.new_empty((B, K - 1, C) if tail is not None else 0, dtype=torch.float32)
    grad_weight, grad_bias = (u.new_empty(launch.programs, *x.shape, dtype=torch.float32) for x in (weight, bias))
    if B and C:
        with on_device(u.device):
            convolve_backward_kernel[launch.grid](
                grad_y,
                grad_initial if grad_tail is None else grad_tail.float().contiguous(),
                u,
                weight.contiguous(),
                bias.contiguous(),
                grad_initial if tail is None else tail.float().contiguous(),
                *launch.documents,
                grad_u,
                grad_weight,
                grad_bias,
                grad_initial,
                L,
                launch.T,
                C,
                row,
                g_row,
                int(tail is not None),
                int(grad_tail is not None),
                **launch.options,
            )
    return grad_u, grad_weight.sum(0).to(weight.dtype), grad_bias.sum(0).to(bias.dtype), grad_initial


# what the compiler and autograd see
convolve_tokens = torch.library.custom_op(qualified("short_convolution"), run_forward, mutates_args=())
convolve_tokens_backward = torch.library.custom_op(
    qualified("short_convolution_backward"), run_backward, mutates_args=()
)


@convolve_tokens.register_fake
def _(u, weight, bias, tail, begins, seq_idx, activation, has_tail):
    (B, L, C), K = u.shape, weight.shape[1]
    return u.new_empty(B, L, C), u.new_empty((B, K - 1, C) if has_tail else 0, dtype=torch.float32)


@convolve_tokens_backward.register_fake
def _(grad_y, grad_tail, u, weight, bias, tail, begins, seq_idx, activation):
    (B, L, C), K = u.shape, weight.shape[1]
    grad_initial = u.new_empty((B, K - 1, C) if tail is not None else 0, dtype=torch.float32)
    return u.new_empty(B, L, C), weight.new_empty(weight.shape), bias.new_empty(bias.shape), grad_initial


def save(ctx, inputs, output):
    """For `backward`, by autograd."""
    *tensors, activation, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.activation = activation
    ctx.save_for_backward(*tensors)


def backward(ctx, grad_y, grad_tail, run=convolve_tokens_backward):
    """The gradients of all inputs of `convolve_tokens`."""
    u, weight, bias, tail, begins, seq_idx = ctx.saved_tensors
    grad_y = torch.zeros_like(u) if grad_y is None else grad_y
    if grad_tail is not None and not grad_tail.numel():  # the compiler's, of a tail that was not wanted
        grad_tail = None
    *gradients, grad_initial = run(grad_y, grad_tail, u, weight, bias, tail, begins, seq_idx, ctx.activation)
    return *gradients, None if tail is None else grad_initial.to(tail.dtype), None, None, None, None


convolve_tokens.register_autograd(backward, setup_context=save)


def short_convolution(
    u, weight, bias, tail, begins, seq_idx, activation="identity", has_tail=True
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`convolve_taps` by the kernel."""
    y, new_tail = convolve_tokens(u, weight, bias, tail, begins, seq_idx, activation, has_tail)
    if not has_tail:
        return y, None
    return y, new_tail if tail is None else new_tail.to(tail.dtype)


# ---- what the registry asks for


TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
# what models have: the dtype of inputs, of weights, taps, what follows, documents, whether a backward is to come
PROBLEMS = [
    (torch.float32, torch.float32, 4, "silu", True, True),
    (torch.bfloat16, torch.float32, 4, "silu", False, True),
    (torch.float16, torch.float32, 4, "identity", True, True),
]


def self_check_cases(device: torch.device, *problem) -> list[Case]:
    """Of one problem, as PROBLEMS lists them, or of all of these."""
    return [_case(device, *each) for each in ([problem] if problem else PROBLEMS)]


def _case(device, dtype, of_weight, K, activation, documents, trains) -> Case:
    """Several programs by time and by channels, the inputs part of a wider tensor, from a tail and with one."""
    B, L, C = 1, 70, 144
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, dtype=torch.float32):
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(device, dtype)

    wide, weight, bias = normal(B, L, C + 16).to(dtype), normal(C, K).to(of_weight), normal(C).to(of_weight)
    tail, gradients = normal(B, K - 1, C), (normal(B, L, C).to(dtype), normal(B, K - 1, C))
    begins = seq_idx = None
    if documents:
        number = torch.arange(L).expand(B, L) // 7
        seq_idx = torch.where(number == 2, -1, number).to(device)
        begins = torch.nn.functional.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))

    def run(convolve, wide, *others):
        return convolve(wide[..., :C], *others, begins, seq_idx, activation)

    label = f"taps in {str(dtype).removeprefix('torch.')}, {activation}, {'documents' if documents else 'one document'}"
    ours, twin, leaves = partial(run, short_convolution), partial(run, convolve_taps), (wide, weight, bias, tail)
    return gradient_case(label, ours, twin, leaves, gradients, TOLERANCES[dtype], trains)
