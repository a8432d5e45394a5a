"""The kernel of a diagonal system on a GPU, out[h, l] = 2 Re sum_n v w^l with w = exp(log w), forward and backward; the
twin is vandermonde.py.

A tile holds ROWS x COLUMNS taps, l = first + row COLUMNS + column, and w^l = w^(first + row COLUMNS) w^column, so that
it takes ROWS + COLUMNS powers of a pole and one matrix product. The powers are made where they are used: no tensor of
them is in memory, let alone (H, N, L).

Phases: an angle is kept as a 64-bit fraction of a turn. Multiplied by an exponent as an integer, it wraps around by
itself, which is the reduction to one turn, exact at every length; sin and cos are then polynomials on an eighth of a
turn. (A float32 angle would lose three digits at L = 16384, and sin of a large angle has a slow path that spills.)
"""

import math

import torch

from .kernel_launch import on_device, qualified
from .kernel_limits import VANDERMONDE_POLES
from .kernels_s4 import Case
from .vandermonde import vandermonde

try:
    import triton
    import triton.language as tl
except ImportError:  # raised again; standing in a `try`, it does not make Triton a requirement of a Hub repository
    raise

# rows and columns of a tile, warps; the same on every GPU. Larger tiles spill
FORWARD = (32, 64, 4)
BACKWARD = (16, 32, 4)
BLOCK_N = VANDERMONDE_POLES  # of a matrix product, real and imaginary part each
PROGRAMS, STEPS = 1024, 4  # how many the backward splits the taps for, where channels are few, and into what at least


@triton.jit
def turn(phase):
    """cos and sin of a phase in units of 2^-64 turns: Taylor polynomials around the nearest quarter."""
    quarter = (phase + (1 << 61)) >> 62  # the nearest: -2 .. 2
    x = ((phase - (quarter << 62)) >> 32).to(tl.float32) * 1.4629180792671596e-09  # 2 pi 2^-32: radians
    y = x * x
    sin = x + x * y * (-1.6666666666e-01 + y * (8.3333333e-03 + y * (-1.98412698e-04 + y * 2.7557319e-06)))
    cos = 1 - y * (0.5 - y * (4.16666667e-02 + y * (-1.38888889e-03 + y * 2.48015873e-05)))
    odd = (quarter & 1) == 1
    re = tl.where(odd, -sin, cos)
    im = tl.where(odd, cos, sin)
    back = (quarter & 2) == 2
    return tl.where(back, -re, re), tl.where(back, -im, im)


@triton.jit
def power(log_re, phase, exponent):
    """Re and Im of w^exponent."""
    size = tl.exp(log_re * exponent.to(tl.float32))
    re, im = turn(phase * exponent.to(tl.int64))
    return size * re, size * im


@triton.jit
def vandermonde_forward_kernel(
    v_re,
    v_im,
    log_re,
    phase,
    out,
    L,
    HALF,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out (H, L) from v, log_re and phase (H, HALF). Grid: (tiles of ROWS COLUMNS taps, H)."""
    h = tl.program_id(1).to(tl.int64)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)) * COLUMNS
    column = tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, HALF, BLOCK):
        n = start + tl.arange(0, BLOCK)
        exists = n < HALF
        at = h * HALF + n
        decay = tl.load(log_re + at, mask=exists, other=0.0)
        angle = tl.load(phase + at, mask=exists, other=0)
        a_re = tl.load(v_re + at, mask=exists, other=0.0)[None, :]
        a_im = tl.load(v_im + at, mask=exists, other=0.0)[None, :]
        w_re, w_im = power(decay[None, :], angle[None, :], row[:, None])
        left_re = a_re * w_re - a_im * w_im
        left_im = a_re * w_im + a_im * w_re
        w_re, w_im = power(decay[:, None], angle[:, None], column[None, :])
        total += tl.dot(left_re, w_re, input_precision="ieee")
        total -= tl.dot(left_im, w_im, input_precision="ieee")
    l = row[:, None] + column[None, :]
    tl.store(out + h * L + l, 2 * total, mask=l < L)


@triton.jit(do_not_specialize=["splits"])  # 1 for wide layers: the same code as for others
def vandermonde_backward_kernel(
    grad,
    log_re,
    phase,
    sums,
    L,
    H,
    HALF,
    splits,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """sums (splits, H, 4, HALF): Re and Im of sum_l g_l w^l, and of sum_l l g_l w^l. grad (H, L).

    A tile's columns are summed as a matrix product with w^column, its rows by their own powers.
    Grid: (splits, H, blocks of poles).
    """
    split = tl.program_id(0)
    h = tl.program_id(1).to(tl.int64)
    n = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    exists = n < HALF
    decay = tl.load(log_re + h * HALF + n, mask=exists, other=0.0)[None, :]
    angle = tl.load(phase + h * HALF + n, mask=exists, other=0)[None, :]
    column = tl.arange(0, COLUMNS)
    fine_re, fine_im = power(decay, angle, column[:, None])  # (COLUMNS, BLOCK)
    grad += h * L
    sum_re = tl.zeros((BLOCK,), tl.float32)
    sum_im = tl.zeros((BLOCK,), tl.float32)
    first_re = tl.zeros((BLOCK,), tl.float32)
    first_im = tl.zeros((BLOCK,), tl.float32)
    for start in range(split * ROWS * COLUMNS, L, splits * ROWS * COLUMNS):
        row = start + tl.arange(0, ROWS) * COLUMNS
        l = row[:, None] + column[None, :]
        g = tl.load(grad + l, mask=l < L, other=0.0)
        w_re, w_im = power(decay, angle, row[:, None])  # (ROWS, BLOCK)
        x_re = tl.dot(g, fine_re, input_precision="ieee")
        x_im = tl.dot(g, fine_im, input_precision="ieee")
        sum_re += tl.sum(w_re * x_re - w_im * x_im, 0)
        sum_im += tl.sum(w_re * x_im + w_im * x_re, 0)
        g *= l.to(tl.float32)
        x_re = tl.dot(g, fine_re, input_precision="ieee")
        x_im = tl.dot(g, fine_im, input_precision="ieee")
        first_re += tl.sum(w_re * x_re - w_im * x_im, 0)
        first_im += tl.sum(w_re * x_im + w_im * x_re, 0)
    sums += (split.to(tl.int64) * H + h) * 4 * HALF + n
    tl.store(sums, sum_re, mask=exists)
    tl.store(sums + HALF, sum_im, mask=exists)
    tl.store(sums + 2 * HALF, first_re, mask=exists)
    tl.store(sums + 3 * HALF, first_im, mask=exists)


# ---- the operator


def phases(log_im: torch.Tensor) -> torch.Tensor:
    """Angles in radians as 64-bit fractions of a turn, from float64: 2^63 and more wrap around."""
    turns = log_im.double() / (2 * math.pi)
    return ((turns - turns.round()) * 2.0**62).to(torch.int64) * 4


@torch.library.custom_op(qualified("vandermonde_forward"), mutates_args=())
def _forward(
    v_re: torch.Tensor, v_im: torch.Tensor, log_re: torch.Tensor, log_im: torch.Tensor, length: int
) -> torch.Tensor:
    out = _fake_forward(v_re, v_im, log_re, log_im, length)
    if out.numel():
        H, half = v_re.shape
        rows, columns, warps = FORWARD
        with on_device(v_re.device):
            vandermonde_forward_kernel[(triton.cdiv(length, rows * columns), H)](
                v_re.contiguous(), v_im.contiguous(), log_re.float().contiguous(), phases(log_im).contiguous(), out,
                length, half, ROWS=rows, COLUMNS=columns, BLOCK=BLOCK_N, num_warps=warps, num_stages=1,
            )  # fmt: skip
    return out


@_forward.register_fake
def _fake_forward(v_re, v_im, log_re, log_im, length):
    return v_re.new_empty(len(v_re), length)


@torch.library.custom_op(qualified("vandermonde_backward"), mutates_args=())
def _backward(
    grad: torch.Tensor, v_re: torch.Tensor, v_im: torch.Tensor, log_re: torch.Tensor, log_im: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of v_re, v_im, log_re and log_im."""
    (H, L), half = grad.shape, v_re.shape[1]
    rows, columns, warps = BACKWARD
    blocks = triton.cdiv(half, BLOCK_N)
    splits = max(1, min(triton.cdiv(L, rows * columns * STEPS), PROGRAMS // max(1, H * blocks)))
    sums = v_re.new_empty(splits, H, 4, half)
    if sums.numel():
        with on_device(v_re.device):
            vandermonde_backward_kernel[(splits, H, blocks)](
                grad.contiguous(), log_re.float().contiguous(), phases(log_im).contiguous(), sums, L, H, half, splits,
                ROWS=rows, COLUMNS=columns, BLOCK=BLOCK_N, num_warps=warps, num_stages=1,
            )  # fmt: skip
    sum_re, sum_im, first_re, first_im = (2 * sums.sum(0)).unbind(1)
    grad_re, grad_im = v_re * first_re - v_im * first_im, -(v_re * first_im + v_im * first_re)
    return sum_re.contiguous(), -sum_im, grad_re.to(log_re.dtype), grad_im.to(log_im.dtype)


@_backward.register_fake
def _fake_backward(grad, v_re, v_im, log_re, log_im):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (v_re, v_im, log_re, log_im))


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4])


def _gradients(ctx, grad):
    return *_backward(grad, *ctx.saved_tensors), None


_forward.register_autograd(_gradients, setup_context=_save)


def vandermonde_kernel(v_re, v_im, log_re, log_im, length: int) -> torch.Tensor:
    """`vandermonde` of vandermonde.py for a float32 v."""
    return _forward(v_re, v_im, log_re, log_im, length)


# ---- what proves them


def example(H: int, N: int, device="cpu", dtype=torch.float32) -> list[torch.Tensor]:
    """Inputs such as a layer has, from a fixed seed; the logarithms in float64, as a layer has them."""
    generator = torch.Generator().manual_seed(H + N)
    shape = H, N // 2
    v_re, v_im, angle = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    dt = 10 ** (-3 + 2 * torch.rand(H, 1, generator=generator, dtype=torch.float64))
    log_im = dt * (torch.pi * torch.arange(N // 2) + 0.1 * angle)
    return [v_re.to(device, dtype), v_im.to(device, dtype), (-0.5 * dt).expand(shape).to(device), log_im.to(device)]


def self_check_cases(device: torch.device) -> list[Case]:
    """A length of several tiles, forward and backward."""

    def run(function, dtype):
        inputs = [x.to(dtype) if i < 2 else x for i, x in enumerate(example(5, 20, device))]
        inputs = [x.requires_grad_() for x in inputs]
        with torch.enable_grad():
            out = function(*inputs, 9001)
            grads = torch.autograd.grad(out.square().mean(), inputs)
        return [out.detach(), *grads]

    return [
        Case(
            "length 9001",
            lambda: run(vandermonde_kernel, torch.float32),
            lambda: run(vandermonde, torch.float64),
            1e-4,
        )
    ]
