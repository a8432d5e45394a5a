"""The scan of S5 on a GPU: x_t = Lambda x_(t-1) + u_t for P/2 complex states, forward and backward.

u and x are (B, L, P) as [real | imaginary]; the lanes of a warp take neighbouring states, so every access is one line
of memory. The recurrence of a state is four multiplications a token, far below what reading u takes; what is to be
found is parallel work, and it comes from cutting the sequence into chunks of T tokens, in four launches:

    powers  Lambda and Lambda^T, float32, of log Lambda in float64
    ends    every chunk from a zero state: what it would hand on           reads u
    carry   s_(c+1) = Lambda^T s_c + end_c, a state a lane                 reads and writes 1/T of that
    emit    every chunk again, from its true start                         reads u, writes x

The backward is the same scan in reverse with conj(Lambda), which also sums lambda_t conj(x_(t-1)), the gradient of
Lambda, chunk by chunk: sums of fixed order, no atomics. x is what it saves, and C needs x anyway.

Lambda^T is made in float64, so that rounding Lambda to float32 turns a phase over T tokens at most.
"""

from functools import partial

import torch

from .kernel_launch import on_device, qualified
from .kernel_limits import s5_chunk_length
from .kernels_s4 import Case
from .prefix_scans import complex_scan, gradient_of_logs
from .triton_diagonal_discretization import complex_exponential
from .triton_dplr_discretization import times

try:
    import triton
    import triton.language as tl
except ImportError:  # `kernels_s4` asks for this module in a `try` of its own, and reports the cause
    raise


UNROLL, CARRY_UNROLL = 8, 16  # tokens, and chunks, that are loaded before the first of them is needed


@triton.jit(do_not_specialize=["T", "HALF"])
def powers_kernel(log_re, log_im, powers, T, HALF, BLOCK: tl.constexpr):
    """powers (2, P): Lambda and Lambda^T of log Lambda (P/2,). Grid: blocks of states."""
    p = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = p < HALF
    re, im = tl.load(log_re + p, mask=inside, other=0.0), tl.load(log_im + p, mask=inside, other=0.0)
    for row in tl.static_range(2):
        l_re, l_im = complex_exponential(re, im) if row == 0 else complex_exponential(re * T, im * T)
        tl.store(powers + 2 * row * HALF + p, l_re.to(tl.float32), mask=inside)
        tl.store(powers + (2 * row + 1) * HALF + p, l_im.to(tl.float32), mask=inside)


@triton.jit
def ends_kernel(
    u,
    Lambda,
    begins,
    initial,
    ends,
    kept,
    L,
    T,
    chunks,
    HALF,
    REVERSE: tl.constexpr,
    RESETS: tl.constexpr,
    INITIAL: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ends (B, chunks, P): what a chunk hands on when it starts from zero; the one where the scan begins starts from
    `initial` (B, P). kept (B, chunks): 0 where a document begins in the chunk, so that nothing passes through.

    In reverse, what the chunk's tokens hand back: r <- conj(Lambda) (u_t + r), nothing where t begins a document.
    Grid: (B chunks, blocks of states).
    """
    b = (tl.program_id(0) // chunks).to(tl.int64)
    c = tl.program_id(0) % chunks
    p = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = p < HALF
    l_re = tl.load(Lambda + p, mask=inside, other=0.0)
    l_im = tl.load(Lambda + HALF + p, mask=inside, other=0.0)
    x_re = tl.zeros((BLOCK,), tl.float32)
    x_im = tl.zeros((BLOCK,), tl.float32)
    if INITIAL:
        first = inside & (c == (chunks - 1 if REVERSE else 0))
        x_re = tl.load(initial + b * 2 * HALF + p, mask=first, other=0.0)
        x_im = tl.load(initial + b * 2 * HALF + HALF + p, mask=first, other=0.0)
    passes = 1.0
    tokens = tl.minimum(T, L - c * T)
    for start in range(0, tokens, UNROLL):
        for k in tl.static_range(UNROLL):
            here = start + k < tokens
            t = b * L + c * T + (tokens - 1 - start - k if REVERSE else start + k)
            row = u + t * 2 * HALF + p
            v_re = tl.load(row, mask=inside & here, other=0.0).to(tl.float32)
            v_im = tl.load(row + HALF, mask=inside & here, other=0.0).to(tl.float32)
            begun = False
            if RESETS:
                begun = tl.load(begins + t, mask=here, other=0) != 0
                passes = tl.where(begun, 0.0, passes)
            if REVERSE:
                next_re, next_im = times(l_re, -l_im, x_re + v_re, x_im + v_im)
                next_re, next_im = tl.where(begun, 0.0, next_re), tl.where(begun, 0.0, next_im)
            else:
                next_re, next_im = times(l_re, l_im, x_re, x_im)
                next_re, next_im = tl.where(begun, 0.0, next_re) + v_re, tl.where(begun, 0.0, next_im) + v_im
            x_re, x_im = tl.where(here, next_re, x_re), tl.where(here, next_im, x_im)
    out = ends + (b * chunks + c) * 2 * HALF + p
    tl.store(out, x_re, mask=inside)
    tl.store(out + HALF, x_im, mask=inside)
    if RESETS:
        tl.store(kept + b * chunks + c, passes, mask=tl.program_id(1) == 0)


@triton.jit
def carry_kernel(
    ends,
    kept,
    power,
    initial,
    chunks,
    HALF,
    REVERSE: tl.constexpr,
    RESETS: tl.constexpr,
    INITIAL: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Put the state that a chunk starts from in the place of what it hands on, which is in `ends` (B, chunks, P):

        s_(c+1) = power s_c + end_c, without the first term where a document begins in chunk c;  power = Lambda^T

    The chunk where the scan begins has its start in its end already. Grid: (B, blocks of states).
    """
    b = tl.program_id(0).to(tl.int64)
    p = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = p < HALF
    l_re = tl.load(power + p, mask=inside, other=0.0)
    l_im = tl.load(power + HALF + p, mask=inside, other=0.0)
    if REVERSE:
        l_im = -l_im
    s_re = tl.zeros((BLOCK,), tl.float32)
    s_im = tl.zeros((BLOCK,), tl.float32)
    if INITIAL:
        s_re = tl.load(initial + b * 2 * HALF + p, mask=inside, other=0.0)
        s_im = tl.load(initial + b * 2 * HALF + HALF + p, mask=inside, other=0.0)
    for start in range(0, chunks, UNROLL):
        loaded = ()
        for k in tl.static_range(UNROLL):
            here = start + k < chunks
            c = b * chunks + (chunks - 1 - start - k if REVERSE else start + k)
            passes = 1.0
            if RESETS:
                passes = tl.load(kept + c, mask=here, other=0.0)
            e_re = tl.load(ends + c * 2 * HALF + p, mask=inside & here, other=0.0)
            e_im = tl.load(ends + c * 2 * HALF + HALF + p, mask=inside & here, other=0.0)
            loaded = loaded + (e_re, e_im, passes)  # noqa: RUF005  (Triton has no starred tuples)
        for k in tl.static_range(UNROLL):
            here = start + k < chunks
            c = b * chunks + (chunks - 1 - start - k if REVERSE else start + k)
            tl.store(ends + c * 2 * HALF + p, s_re, mask=inside & here)
            tl.store(ends + c * 2 * HALF + HALF + p, s_im, mask=inside & here)
            # the first chunk's end holds what its initial state became, by tokens of which there may be fewer than T
            through = (loaded[3 * k + 2] != 0.0) & (start + k > 0)
            next_re, next_im = times(l_re, l_im, s_re, s_im)
            s_re = tl.where(through, next_re, 0.0) + loaded[3 * k]
            s_im = tl.where(through, next_im, 0.0) + loaded[3 * k + 1]


@triton.jit
def emit_kernel(
    u,
    Lambda,
    begins,
    starts,
    x,
    final,
    L,
    T,
    chunks,
    HALF,
    RESETS: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x (B, L, P) from every chunk's start; the last chunk writes final (B, P). Grid: as `ends_kernel`."""
    b = (tl.program_id(0) // chunks).to(tl.int64)
    c = tl.program_id(0) % chunks
    p = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = p < HALF
    l_re = tl.load(Lambda + p, mask=inside, other=0.0)
    l_im = tl.load(Lambda + HALF + p, mask=inside, other=0.0)
    x_re = tl.load(starts + (b * chunks + c) * 2 * HALF + p, mask=inside, other=0.0)
    x_im = tl.load(starts + (b * chunks + c) * 2 * HALF + HALF + p, mask=inside, other=0.0)
    tokens = tl.minimum(T, L - c * T)
    for start in range(0, tokens, UNROLL):
        loaded = ()
        for k in tl.static_range(UNROLL):
            here = start + k < tokens
            t = b * L + c * T + start + k
            begun = False
            if RESETS:
                begun = tl.load(begins + t, mask=here, other=0) != 0
            v_re = tl.load(u + t * 2 * HALF + p, mask=inside & here, other=0.0).to(tl.float32)
            v_im = tl.load(u + t * 2 * HALF + HALF + p, mask=inside & here, other=0.0).to(tl.float32)
            loaded = loaded + (v_re, v_im, begun)  # noqa: RUF005  (Triton has no starred tuples)
        for k in tl.static_range(UNROLL):
            here = start + k < tokens
            row = x + (b * L + c * T + start + k) * 2 * HALF + p
            next_re, next_im = times(l_re, l_im, x_re, x_im)
            next_re = tl.where(loaded[3 * k + 2], 0.0, next_re) + loaded[3 * k]
            next_im = tl.where(loaded[3 * k + 2], 0.0, next_im) + loaded[3 * k + 1]
            tl.store(row, next_re.to(x.dtype.element_ty), mask=inside & here)
            tl.store(row + HALF, next_im.to(x.dtype.element_ty), mask=inside & here)
            x_re, x_im = tl.where(here, next_re, x_re), tl.where(here, next_im, x_im)
    last = inside & (c == chunks - 1)
    tl.store(final + b * 2 * HALF + p, x_re, mask=last)
    tl.store(final + b * 2 * HALF + HALF + p, x_im, mask=last)


@triton.jit
def emit_reverse_kernel(
    g,
    x,
    Lambda,
    begins,
    starts,
    grad_u,
    grad_Lambda,
    grad_initial,
    L,
    T,
    chunks,
    HALF,
    RESETS: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """grad u_t = lambda_t = g_t + r, from the last token of a chunk to its first, with r what comes back from the next
    token; grad_Lambda (B, chunks, P): the chunk's part of the sum over t > 0 of lambda_t conj(x_(t-1)); the first chunk
    writes grad_initial (B, P). Grid: as `ends_kernel`.
    """
    b = (tl.program_id(0) // chunks).to(tl.int64)
    c = tl.program_id(0) % chunks
    p = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = p < HALF
    l_re = tl.load(Lambda + p, mask=inside, other=0.0)
    l_im = tl.load(Lambda + HALF + p, mask=inside, other=0.0)
    at_chunk = (b * chunks + c) * 2 * HALF + p
    r_re = tl.load(starts + at_chunk, mask=inside, other=0.0)
    r_im = tl.load(starts + at_chunk + HALF, mask=inside, other=0.0)
    sum_re = tl.zeros((BLOCK,), tl.float32)
    sum_im = tl.zeros((BLOCK,), tl.float32)
    tokens = tl.minimum(T, L - c * T)
    for start in range(0, tokens, UNROLL):
        loaded = ()
        for k in tl.static_range(UNROLL):
            here = start + k < tokens
            t = c * T + tokens - 1 - start - k
            before = here & (t > 0)
            row = (b * L + t) * 2 * HALF + p
            begun = False
            if RESETS:
                begun = tl.load(begins + b * L + t, mask=here, other=0) != 0
                before = before & (begun == 0)
            v_re = tl.load(g + row, mask=inside & here, other=0.0).to(tl.float32)
            v_im = tl.load(g + row + HALF, mask=inside & here, other=0.0).to(tl.float32)
            x_re = tl.load(x + row - 2 * HALF, mask=inside & before, other=0.0).to(tl.float32)
            x_im = tl.load(x + row - HALF, mask=inside & before, other=0.0).to(tl.float32)
            loaded = loaded + (v_re, v_im, x_re, x_im, begun)  # noqa: RUF005  (Triton has no starred tuples)
        for k in tl.static_range(UNROLL):
            here = start + k < tokens
            row = grad_u + (b * L + c * T + tokens - 1 - start - k) * 2 * HALF + p
            v_re, v_im = loaded[5 * k] + r_re, loaded[5 * k + 1] + r_im
            x_re, x_im = loaded[5 * k + 2], loaded[5 * k + 3]
            tl.store(row, v_re.to(grad_u.dtype.element_ty), mask=inside & here)
            tl.store(row + HALF, v_im.to(grad_u.dtype.element_ty), mask=inside & here)
            sum_re += v_re * x_re + v_im * x_im
            sum_im += v_im * x_re - v_re * x_im
            next_re, next_im = times(l_re, -l_im, v_re, v_im)
            next_re, next_im = tl.where(loaded[5 * k + 4], 0.0, next_re), tl.where(loaded[5 * k + 4], 0.0, next_im)
            r_re, r_im = tl.where(here, next_re, r_re), tl.where(here, next_im, r_im)
    tl.store(grad_Lambda + at_chunk, sum_re, mask=inside)
    tl.store(grad_Lambda + at_chunk + HALF, sum_im, mask=inside)
    tl.store(grad_initial + b * 2 * HALF + p, r_re, mask=inside & (c == 0))
    tl.store(grad_initial + b * 2 * HALF + HALF + p, r_im, mask=inside & (c == 0))


def state_blocks(half: int) -> dict[str, int]:
    """States a program, on one warp: of every launch."""
    return {"BLOCK": min(64, triton.next_power_of_2(half)), "num_warps": 1, "num_stages": 1}


def token_blocks(half: int) -> dict[str, int]:
    """The same of a launch that goes from token to token."""
    return {"UNROLL": UNROLL, **state_blocks(half)}


class _Launch:
    """What the launches of one scan share."""

    def __init__(self, shape, log_re, log_im, begins):
        self.B, self.L, P = shape
        self.half, self.T = P // 2, s5_chunk_length(self.L)
        self.chunks = triton.cdiv(self.L, self.T)
        self.begins = None if begins is None else begins.contiguous().view(torch.uint8)
        self.blocks = {"RESETS": begins is not None, **token_blocks(self.half)}
        self.columns = triton.cdiv(self.half, self.blocks["BLOCK"])
        powers = log_re.new_empty(2, P, dtype=torch.float32)
        with on_device(log_re.device):
            powers_kernel[self.columns,](
                log_re.contiguous(), log_im.contiguous(), powers, self.T, self.half, **state_blocks(self.half)
            )
        self.Lambda, self.power = powers

    def starts(self, u, initial, reverse) -> torch.Tensor:
        """(B, chunks, P): the first two launches."""
        switches = {"REVERSE": reverse, "INITIAL": initial is not None, **self.blocks}
        starts = u.new_empty(self.B, self.chunks, 2 * self.half, dtype=torch.float32)
        kept = None if self.begins is None else starts.new_empty(self.B, self.chunks)
        sizes = (self.L, self.T, self.chunks, self.half)
        with on_device(u.device):
            ends_kernel[self.B * self.chunks, self.columns](
                u, self.Lambda, self.begins, initial, starts, kept, *sizes, **switches
            )
            switches["UNROLL"] = CARRY_UNROLL
            carry_kernel[self.B, self.columns](starts, kept, self.power, initial, self.chunks, self.half, **switches)
        return starts


def _float32(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.float().contiguous()


@torch.library.custom_op(qualified("s5_scan"), mutates_args=())
def s5_scan(
    u: torch.Tensor,
    log_re: torch.Tensor,
    log_im: torch.Tensor,
    initial_state: torch.Tensor | None,
    begins: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x_t = Lambda x_(t-1) + u_t, differentiable in everything but `begins`.

    u (B, L, P) as [real | imaginary], float32, bfloat16 or float16; log_re, log_im (P/2,): log Lambda, float64.
    initial_state (B, P), None for zero; begins (B, L) bool, where the state before the token counts as zero.
    Returns x (B, L, P) in the dtype of u and the final state (B, P) in float32.
    """
    B, _, P = u.shape
    x = torch.empty_like(u, memory_format=torch.contiguous_format)
    final = u.new_empty(B, P, dtype=torch.float32)
    if not u.numel():
        return x, final.zero_() if initial_state is None else final.copy_(initial_state)
    u = u.contiguous()
    launch = _Launch(u.shape, log_re, log_im, begins)
    starts = launch.starts(u, _float32(initial_state), reverse=False)
    sizes = (launch.L, launch.T, launch.chunks, launch.half)
    with on_device(u.device):
        emit_kernel[B * launch.chunks, launch.columns](
            u, launch.Lambda, launch.begins, starts, x, final, *sizes, **launch.blocks
        )
    return x, final


@torch.library.custom_op(qualified("s5_scan_backward"), mutates_args=())
def s5_scan_backward(
    grad_x: torch.Tensor,
    grad_final: torch.Tensor,
    x: torch.Tensor,
    log_re: torch.Tensor,
    log_im: torch.Tensor,
    initial_state: torch.Tensor | None,
    begins: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of u (in its dtype), log_re, log_im (float64) and the initial state (float32)."""
    B, _, P = x.shape
    grad_u = torch.empty_like(x)
    grad_initial = x.new_empty(B, P, dtype=torch.float32)
    if not x.numel():
        return grad_u, torch.zeros_like(log_re), torch.zeros_like(log_im), grad_initial.copy_(grad_final)
    grad_x = grad_x.contiguous()
    launch = _Launch(x.shape, log_re, log_im, begins)
    starts = launch.starts(grad_x, _float32(grad_final), reverse=True)
    parts = torch.empty_like(starts)
    sizes = (launch.L, launch.T, launch.chunks, launch.half)
    with on_device(x.device):
        emit_reverse_kernel[B * launch.chunks, launch.columns](
            grad_x, x, launch.Lambda, launch.begins, starts, grad_u, parts, grad_initial, *sizes, **launch.blocks
        )
    grad_re, grad_im = gradient_of_logs(parts, launch.Lambda)
    if initial_state is not None:
        # the token 0 of the same sum: conj(Lambda) lambda_0 conj(initial) is grad_initial conj(initial)
        (i_re, i_im), (r_re, r_im) = (z.double().chunk(2, -1) for z in (initial_state, grad_initial))
        grad_re = grad_re + (r_re * i_re + r_im * i_im).sum(0)
        grad_im = grad_im + (r_im * i_re - r_re * i_im).sum(0)
    return grad_u, grad_re.to(log_re.dtype), grad_im.to(log_im.dtype), grad_initial


@s5_scan.register_fake
def _(u, log_re, log_im, initial_state, begins):
    x = torch.empty_like(u, memory_format=torch.contiguous_format)
    return x, u.new_empty(u.shape[0], u.shape[2], dtype=torch.float32)


@s5_scan_backward.register_fake
def _(grad_x, grad_final, x, log_re, log_im, initial_state, begins):
    grad_initial = x.new_empty(x.shape[0], x.shape[2], dtype=torch.float32)
    return torch.empty_like(x), torch.empty_like(log_re), torch.empty_like(log_im), grad_initial


def _save(ctx, inputs, output):
    _, log_re, log_im, initial_state, begins = inputs
    ctx.save_for_backward(output[0], log_re, log_im, initial_state, begins)


def _backward(ctx, grad_x, grad_final):
    x, log_re, log_im, initial_state, begins = ctx.saved_tensors
    grad_x = torch.zeros_like(x) if grad_x is None else grad_x
    grad_final = x.new_zeros(x.shape[0], x.shape[2], dtype=torch.float32) if grad_final is None else grad_final
    grad_u, grad_re, grad_im, grad_initial = s5_scan_backward(
        grad_x, grad_final, x, log_re, log_im, initial_state, begins
    )
    grad_initial = None if initial_state is None else grad_initial.to(initial_state.dtype)
    return grad_u, grad_re, grad_im, grad_initial, None


s5_scan.register_autograd(_backward, setup_context=_save)


# ---- what the registry asks for


def self_check_cases(device: torch.device) -> list[Case]:
    """Forward and backward: over two chunks with documents in float32, and of two blocks of states in bfloat16."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(device)

    def run(scan, inputs, begins, grads):
        inputs = [x.clone().requires_grad_() for x in inputs]
        outputs = scan(*inputs, begins)
        weights = [g.to(x.dtype) for g, x in zip(grads, outputs, strict=True)]
        return [x.detach() for x in (*outputs, *torch.autograd.grad(outputs, inputs, weights))]

    cases = []
    for dtype, tolerance, B, L, P in ((torch.float32, 1e-5, 2, 70, 6), (torch.bfloat16, 1e-2, 1, 20, 134)):
        # decays of 10 to 100 tokens
        log_re, log_im = -(10 ** (-1 - normal(P // 2).sigmoid().double())), normal(P // 2).double()
        inputs = [normal(B, L, P).to(dtype), log_re, log_im, normal(B, P)]
        begins = torch.zeros(B, L, dtype=torch.bool)
        begins[-1, [1, L - 5]] = True
        for label, resets in (("with documents", begins.to(device)), ("of one document", None)):
            arguments = resets, (normal(B, L, P), normal(B, P))
            kernel = partial(run, s5_scan, inputs, *arguments)
            twin = partial(run, complex_scan, [x.double() for x in inputs], *arguments)
            cases.append(Case(f"a scan in {dtype}, {label}", kernel, twin, tolerance))
    return cases
