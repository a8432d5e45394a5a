"""The operators of a chunk of S4D on a GPU: one launch forward, one back. The twin is diagonal_operators.py.

A channel's program makes Lambda_bar of its logarithm and walks the T tokens of the chunk with its powers, by one
float64 product a token: no phase leaves its digits, and no tensor of (H, N/2, T) is written but the operators. Sums are
float32, no atomics, and another T or H compiles nothing new. A vector of N is a pair of halves (re, im), (1, HALF).
"""

from functools import partial

import torch

from .chunked import ChunkOperators, operator_shapes
from .diagonal_operators import power_operators
from .kernel_launch import on_device, qualified
from .kernels_s4 import Case, gradient_case
from .triton_diagonal_discretization import complex_exponential
from .triton_dplr_discretization import times, times_conjugate
from .triton_dplr_operators import read_pair, write_columns, write_pair

try:
    import triton
    import triton.language as tl
except ImportError:  # `kernels_s4` asks for this module in a `try` of its own, and reports the cause
    raise


@triton.jit
def read_system(log_re, log_im, CB_re, CB_im, h, n, half):
    """Lambda_bar, float64, and C B_bar of a channel, each as two halves; 1 and 0 beyond them."""
    here, inside = h * half + n, n < half
    l_re, l_im = tl.load(log_re + here, mask=inside, other=0.0), tl.load(log_im + here, mask=inside, other=0.0)
    l_re, l_im = complex_exponential(l_re, l_im)
    c_re, c_im = tl.load(CB_re + here, mask=inside, other=0.0), tl.load(CB_im + here, mask=inside, other=0.0)
    return l_re, l_im, c_re, c_im


# lengths are no constants: another one compiles nothing new
@triton.jit(do_not_specialize=["T", "half", "has_skip"])
def power_kernel(
    log_re,
    log_im,
    CB_re,
    CB_im,
    skip,
    taps,
    emit,
    inject,
    carry,
    T,
    half,
    has_skip,
    HALF: tl.constexpr,
    STEPS: tl.constexpr,
):
    """taps (H, T), emit (H, T, N), inject (H, N, T), carry (H, N) of log Lambda_bar, float64, and C B_bar, (H, N/2);
    skip (H,) is added to the first tap, or is not read where has_skip is 0.
    """
    h, N = tl.program_id(0).to(tl.int64), 2 * half
    n = tl.arange(0, HALF)[None, :]
    l_re, l_im, c_re, c_im = read_system(log_re, log_im, CB_re, CB_im, h, n, half)
    d = tl.load(skip + h, mask=has_skip != 0, other=0.0)
    p_re, p_im = tl.where(n < half, 1.0, 0.0).to(tl.float64), tl.zeros((1, HALF), tl.float64)
    i = tl.arange(0, STEPS)[:, None]
    for first in range(0, T, STEPS):
        # columns, the last one first, as inject has them
        columns_re = tl.zeros((STEPS, HALF), tl.float32)
        columns_im = columns_re
        for step in range(tl.minimum(STEPS, T - first)):
            is_step = i == STEPS - 1 - step
            columns_re = tl.where(is_step, p_re.to(tl.float32), columns_re)
            columns_im = tl.where(is_step, p_im.to(tl.float32), columns_im)
            p_re, p_im = times(l_re, l_im, p_re, p_im)
            y_re, y_im = times(c_re, c_im, p_re.to(tl.float32), p_im.to(tl.float32))
            # always so; a solver of addresses takes the bounds of the two loops apart
            is_token = first + step < T
            write_pair(emit + (h * T + first + step) * N, 2.0 * y_re, -2.0 * y_im, n, tl.where(is_token, half, 0))
        at = T - STEPS - first + i  # of inject
        write_columns(inject + h * N * T, columns_re, columns_im, at, n, T, half)
        answer = tl.sum(2.0 * (c_re * columns_re - c_im * columns_im), 1, keep_dims=True)
        tl.store(taps + h * T + T - 1 - at, answer + tl.where(at == T - 1, d, 0.0), mask=at >= 0)
    write_pair(carry + h * N, p_re.to(tl.float32), p_im.to(tl.float32), n, half)


# the gradients of emit and inject are parts of one matrix, which begin anywhere
@triton.jit(
    do_not_specialize=["T", "half", "emit_head", "emit_row", "inject_head", "inject_row"],
    do_not_specialize_on_alignment=["of_emit", "of_inject"],
)
def power_gradient_kernel(
    log_re,
    log_im,
    CB_re,
    CB_im,
    of_taps,
    of_emit,
    of_inject,
    of_carry,
    of_log_re,
    of_log_im,
    of_CB_re,
    of_CB_im,
    of_skip,
    T,
    half,
    emit_head,
    emit_row,
    inject_head,
    inject_row,
    HALF: tl.constexpr,
):
    """The gradients of the inputs of `power_kernel`; heads and rows of of_emit and of_inject lie so many numbers apart.
    With p = Lambda^j and its slope d = j Lambda^(j-1), the gradient of Lambda sums conj(d) times those of all p.
    """
    h, N = tl.program_id(0).to(tl.int64), 2 * half
    n = tl.arange(0, HALF)[None, :]
    l_re, l_im, c_re, c_im = read_system(log_re, log_im, CB_re, CB_im, h, n, half)
    p_re, p_im = tl.where(n < half, 1.0, 0.0).to(tl.float64), tl.zeros((1, HALF), tl.float64)
    d_re, d_im = tl.zeros((1, HALF), tl.float64), tl.zeros((1, HALF), tl.float64)
    to_l_re, to_l_im = d_re, d_im
    to_c_re, to_c_im = tl.zeros((1, HALF), tl.float32), tl.zeros((1, HALF), tl.float32)
    for j in range(T + 1):
        # p drives as column j and is read by tap j and by row j - 1; as the last one it is the carry
        is_column, is_row = (n < half) & (j < T), (n < half) & (j > 0)
        at = of_inject + h * inject_head + n * inject_row + T - 1 - j
        g_re = tl.load(at, mask=is_column, other=0.0)
        g_im = tl.load(at + half * inject_row, mask=is_column, other=0.0)
        tap = tl.load(of_taps + h * T + j, mask=j < T, other=0.0)
        at = of_emit + h * emit_head + (j - 1) * emit_row + n
        r_re = 2.0 * (tl.load(at, mask=is_row, other=0.0) + tap)
        r_im = -2.0 * tl.load(at + half, mask=is_row, other=0.0)
        last_re, last_im = read_pair(of_carry + h * N, n, tl.where(j == T, half, 0))
        # times conj(c), and conj(p) for c
        g_re += last_re + c_re * r_re + c_im * r_im
        g_im += last_im + c_re * r_im - c_im * r_re
        q_re, q_im = p_re.to(tl.float32), p_im.to(tl.float32)
        to_c_re, to_c_im = to_c_re + q_re * r_re + q_im * r_im, to_c_im + q_re * r_im - q_im * r_re
        to_l_re, to_l_im = to_l_re + d_re * g_re + d_im * g_im, to_l_im + d_re * g_im - d_im * g_re
        d_re, d_im = times(l_re, l_im, d_re, d_im)
        d_re, d_im = d_re + p_re, d_im + p_im
        p_re, p_im = times(l_re, l_im, p_re, p_im)
    to_l_re, to_l_im = times_conjugate(l_re, l_im, to_l_re, to_l_im)  # of its logarithm
    here = h * half + n
    tl.store(of_log_re + here, to_l_re, mask=n < half)
    tl.store(of_log_im + here, to_l_im, mask=n < half)
    tl.store(of_CB_re + here, to_c_re, mask=n < half)
    tl.store(of_CB_im + here, to_c_im, mask=n < half)
    tl.store(of_skip + h, tl.load(of_taps + h * T))


# ---- launches

STEPS = 16  # tokens whose columns are written together
WARPS = {"forward": 4, "backward": 1}


def _launch(log_re, length: int) -> tuple[tuple[int], tuple[int, int], dict]:
    """The grid, (T, N/2), and what is constant."""
    H, half = log_re.shape
    return (H,), (length, half), {"HALF": max(16, triton.next_power_of_2(half)), "num_stages": 1}


def _empty(CB_re, T) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    H, half = CB_re.shape
    return tuple(CB_re.new_empty(shape) for shape in operator_shapes(H, T, 2 * half, dense=False))


def run_forward(
    log_re: torch.Tensor,
    log_im: torch.Tensor,
    CB_re: torch.Tensor,
    CB_im: torch.Tensor,
    length: int,
    skip: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """taps, emit, inject and carry; see `power_operators`."""
    inputs = [x.contiguous() for x in (log_re, log_im, CB_re, CB_im, CB_re if skip is None else skip)]
    outputs = _empty(CB_re, length)
    grid, sizes, options = _launch(log_re, length)
    if len(CB_re):
        with on_device(CB_re.device):
            power_kernel[grid](
                *(*inputs, *outputs, *sizes, int(skip is not None)), STEPS=STEPS, num_warps=WARPS["forward"], **options
            )
    return outputs


def run_backward(
    of_taps: torch.Tensor,
    of_emit: torch.Tensor,
    of_inject: torch.Tensor,
    of_carry: torch.Tensor,
    log_re: torch.Tensor,
    log_im: torch.Tensor,
    CB_re: torch.Tensor,
    CB_im: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of log Lambda_bar, float64, of C B_bar and of a skip."""
    of_emit, of_inject = (x if x.stride(2) == 1 else x.contiguous() for x in (of_emit, of_inject))
    inputs = [x.contiguous() for x in (log_re, log_im, CB_re, CB_im)]
    outputs = tuple(torch.empty_like(x) for x in (*inputs, CB_re[:, 0]))
    grid, sizes, options = _launch(log_re, of_taps.shape[1])
    if len(CB_re):
        with on_device(CB_re.device):
            power_gradient_kernel[grid](
                *inputs,
                of_taps.contiguous(),
                of_emit,
                of_inject,
                of_carry.contiguous(),
                *outputs,
                *sizes,
                *of_emit.stride()[:2],
                *of_inject.stride()[:2],
                num_warps=WARPS["backward"],
                **options,
            )
    return outputs


# what the compiler and autograd see
make_operators = torch.library.custom_op(qualified("diagonal_operators"), run_forward, mutates_args=())
make_operators_backward = torch.library.custom_op(
    qualified("diagonal_operators_backward"), run_backward, mutates_args=()
)


@make_operators.register_fake
def _(log_re, log_im, CB_re, CB_im, length, skip):
    return _empty(CB_re, length)


@make_operators_backward.register_fake
def _(of_taps, of_emit, of_inject, of_carry, log_re, log_im, CB_re, CB_im):
    return tuple(x.new_empty(x.shape) for x in (log_re, log_im, CB_re, CB_im, CB_re[:, 0]))


def save(ctx, inputs, output):
    """For `backward`, by autograd."""
    *tensors, _, skip = inputs
    ctx.save_for_backward(*tensors)
    ctx.has_skip = skip is not None


def backward(ctx, *gradients, run=make_operators_backward):
    """The gradients of all inputs of `make_operators`."""
    *found, of_skip = run(*gradients, *ctx.saved_tensors)
    return *found, None, of_skip if ctx.has_skip else None


make_operators.register_autograd(backward, setup_context=save)


def diagonal_operators(log_re, log_im, CB_re, CB_im, length: int, skip=None) -> ChunkOperators:
    """`power_operators` by the kernel."""
    return ChunkOperators(*make_operators(log_re, log_im, CB_re, CB_im, length, skip))


# ---- what the registry asks for


def example(H: int, N: int, device=None) -> list[torch.Tensor]:
    """log Lambda_bar, float64, and C B_bar of stable systems, whose phases are many turns."""
    generator = torch.Generator().manual_seed(0)
    rates, phases = (torch.rand(H, N // 2, generator=generator, dtype=torch.float64) for _ in range(2))
    CB = (torch.randn(H, N // 2, generator=generator).to(device) for _ in range(2))
    return [(-0.2 * rates).to(device), (100 * phases).to(device), *CB]


PROBLEMS = [(64,), (128,), (6,)]  # states a channel that models have


def self_check_cases(device: torch.device, *problem) -> list[Case]:
    """Of one number of states, or of those that models have: several channels; a tile of tokens and a part."""
    return [_case(device, *each, T=STEPS + 8) for each in ([problem] if problem else PROBLEMS)]


def _case(device, N, T) -> Case:
    generator = torch.Generator().manual_seed(1)
    leaves = [*example(3, N, device), torch.randn(3, generator=generator).to(device)]
    shapes = operator_shapes(3, T, N, dense=False)
    weights = [torch.randn(shape, generator=generator).to(device) for shape in shapes]

    def run(make, *system_and_skip):
        return make(*system_and_skip[:4], T, system_and_skip[4])

    ours, twin = partial(run, diagonal_operators), partial(run, power_operators)
    return gradient_case(f"operators of a diagonal, N = {N}", ours, twin, leaves, weights, 2e-5)
