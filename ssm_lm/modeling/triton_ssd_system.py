"""What SSD's scan reads, made on a GPU: b and c of the tokens, one launch forward and one back; the turns and decays of
a chunk, where the step is a parameter, the same.

    b, c    rms_norm(x) scale + bias                             a program holds whole rows, as in triton_rms_norm.py
    turns   cos and sin of s omega, s decay; s = dt, 2 dt, ...   a program a head

An angle of many turns is made in float64 and taken apart there: what is left of a turn has the digits of float32. Sums
over tokens are a program's each, and those are added up in a fixed order, no atomics. The twins are `norm_vectors` of
discrete.py and `since_start_of_chunks` of ssd_chunks.py. The turns have no operator: triton_ssd_scan.py launches them.
"""

from functools import partial

import torch

from .discrete import NORM_EPSILON, norm_vectors
from .kernel_launch import in_rows, on_device, qualified
from .kernel_limits import programs_of_a_norm
from .kernels_s4 import Case, gradient_case
from .ssd_chunks import since_start_of_chunks, turns_of_chunks
from .triton_rms_norm import FORWARD, TOLERANCES, read, tiles
from .triton_ssd_step import turn

try:
    import triton
    import triton.language as tl
except ImportError:  # `kernels_s4` asks for this module in a `try` of its own, and reports the cause
    raise


# ---- b and c


@triton.jit
def write_vectors(x, scale, bias, y, r, n, rows, N, row, eps):
    """y (rows, N) of x, whose rows lie `row` numbers apart."""
    inside = (r < rows)[:, None] & (n < N)[None, :]
    a = read(x, r, rows, row, n, N)
    factor = tl.rsqrt(tl.sum(a * a, 1) / N + eps)[:, None]
    w = tl.load(scale + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    b = tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(y + (r * N)[:, None] + n[None, :], (a * factor * w + b).to(y.dtype.element_ty), mask=inside)


# another batch or length compiles nothing new, nor what else stands in a row
@triton.jit(do_not_specialize=["rows", "row"])
def norms_kernel(
    x, b_scale, b_bias, c_scale, c_bias, b, c, rows, N, row, eps, ROWS: tl.constexpr, BLOCK_C: tl.constexpr
):
    """b and c (rows, N) of x (rows, 2 N). Grid: blocks of ROWS rows."""
    r, n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_C)
    write_vectors(x, b_scale, b_bias, b, r, n, rows, N, row, eps)
    write_vectors(x + N, c_scale, c_bias, c, r, n, rows, N, row, eps)


@triton.jit
def write_gradients(g, x, w, grad_x, r, n, rows, N, row, eps):
    """grad_x (rows, N), in rows of 2 N, of g, that of y; g, and g times the normed x, for bias and scale."""
    inside = (r < rows)[:, None] & (n < N)[None, :]
    s, a = read(g, r, rows, N, n, N), read(x, r, rows, row, n, N)
    factor = tl.rsqrt(tl.sum(a * a, 1) / N + eps)[:, None]
    normed = a * factor
    of_normed = s * w
    of_x = (of_normed - normed * (tl.sum(of_normed * normed, 1) / N)[:, None]) * factor
    tl.store(grad_x + (r * 2 * N)[:, None] + n[None, :], of_x.to(grad_x.dtype.element_ty), mask=inside)
    return s, s * normed


@triton.jit(do_not_specialize=["rows", "row"])
def norms_gradient_kernel(
    of_b,
    of_c,
    x,
    b_scale,
    c_scale,
    grad_x,
    grad_norms,
    rows,
    N,
    row,
    eps,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """grad_x (rows, 2 N); a program's part of grad_norms (programs, 4, N): of b's scale and bias, of c's.
    Grid: programs, each of which takes every so manieth block of ROWS rows.
    """
    n = tl.arange(0, BLOCK_C)
    b_w = tl.load(b_scale + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    c_w = tl.load(c_scale + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    b_bias = tl.zeros((ROWS, BLOCK_C), tl.float32)
    c_bias = tl.zeros((ROWS, BLOCK_C), tl.float32)
    b_total = tl.zeros((ROWS, BLOCK_C), tl.float32)
    c_total = tl.zeros((ROWS, BLOCK_C), tl.float32)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        r = first + tl.arange(0, ROWS).to(tl.int64)
        s, t = write_gradients(of_b, x, b_w, grad_x, r, n, rows, N, row, eps)
        b_bias, b_total = b_bias + s, b_total + t
        s, t = write_gradients(of_c, x + N, c_w, grad_x + N, r, n, rows, N, row, eps)
        c_bias, c_total = c_bias + s, c_total + t
    to = grad_norms + tl.program_id(0).to(tl.int64) * 4 * N + n
    tl.store(to, tl.sum(b_total, 0), mask=n < N)
    tl.store(to + N, tl.sum(b_bias, 0), mask=n < N)
    tl.store(to + 2 * N, tl.sum(c_total, 0), mask=n < N)
    tl.store(to + 3 * N, tl.sum(c_bias, 0), mask=n < N)


# ---- the turns of a chunk


@triton.jit(do_not_specialize=["T"])
def turns_kernel(
    omega, decay, dt, cos, sin, decays, steps, T, M, omega_row, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr
):
    """cos and sin (E, T, M), decays and steps (E, T) of omega, whose heads lie `omega_row` numbers apart, decay and dt
    (E,), all three in float64. Grid: heads.
    """
    e, t, m = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_M)
    step = tl.load(dt + e)
    since = (t + 1).to(tl.float64) * step
    turns = since[:, None] * tl.load(omega + e * omega_row + m, mask=m < M, other=0.0)[None, :] * 0.15915494309189535
    co, si = turn(((turns - tl.floor(turns + 0.5)) * 6.283185307179586).to(tl.float32))
    at, inside = ((e * T + t) * M)[:, None] + m[None, :], (t < T)[:, None] & (m < M)[None, :]
    tl.store(cos + at, co, mask=inside)
    tl.store(sin + at, si, mask=inside)
    tl.store(decays + e * T + t, (since * tl.load(decay + e)).to(tl.float32), mask=t < T)
    tl.store(steps + e * T + t, tl.zeros((BLOCK_T,), tl.float32) + step.to(tl.float32), mask=t < T)


@triton.jit(do_not_specialize=["T"])
def turns_gradient_kernel(
    of_angle,
    of_decay,
    of_step,
    omega,
    decay,
    dt,
    grad_omega,
    grad_decay,
    grad_dt,
    T,
    M,
    omega_row,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Of the gradients of s omega, summed over tokens with 1, 2, ... for weights (E, M), of s decay and of the steps
    (E, T), in float64, those of omega (E, M), decay and dt (E,). Grid: heads.
    """
    e, t, m = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_M)
    count, step = (t + 1).to(tl.float64), tl.load(dt + e)
    angles = tl.load(of_angle + e * M + m, mask=m < M, other=0.0)
    decays = tl.load(of_decay + e * T + t, mask=t < T, other=0.0)
    steps = tl.load(of_step + e * T + t, mask=t < T, other=0.0)
    frequencies = tl.load(omega + e * omega_row + m, mask=m < M, other=0.0)
    decays = tl.sum(decays * count, 0)
    tl.store(grad_dt + e, tl.sum(angles * frequencies, 0) + decays * tl.load(decay + e) + tl.sum(steps, 0))
    tl.store(grad_decay + e, decays * step)
    tl.store(grad_omega + e * M + m, angles * step, mask=m < M)


# ---- launches

BACKWARD = 4  # numbers a thread: half of what one norm has, for four sums of them are kept and not one


def run_turns(omega: torch.Tensor, decay: torch.Tensor, dt: torch.Tensor, T: int) -> tuple[torch.Tensor, ...]:
    """omega (E, M), decay and dt (E,), float64, of a chunk of T tokens -> cos, sin (E, T, M), s decay and dt (E, T),
    float32: what `turns_of_chunks` makes of them.
    """
    E, M = omega.shape
    outputs = tuple(omega.new_empty(shape, dtype=torch.float32) for shape in ((E, T, M), (E, T, M), (E, T), (E, T)))
    system, sizes, options = _of_turns(omega, decay, dt, T)
    with on_device(omega.device):
        turns_kernel[E,](*system, *outputs, *sizes, **options)
    return outputs


def run_turns_backward(of_angle, of_decay, of_step, omega, decay, dt) -> tuple[torch.Tensor, ...]:
    """The gradients of s omega, as `turns_gradient_kernel` takes them (E, M), of s decay and the steps (E, T) -> those
    of omega, decay and dt, float64.
    """
    E, M = omega.shape
    outputs = dt.new_empty(E, M), dt.new_empty(E), dt.new_empty(E)
    system, sizes, options = _of_turns(omega, decay, dt, of_step.shape[1])
    with on_device(omega.device):
        turns_gradient_kernel[E,](of_angle, of_decay, of_step, *system, *outputs, *sizes, **options)
    return outputs


def _of_turns(omega, decay, dt, T: int) -> tuple[tuple, tuple[int, int, int], dict]:
    """What both launches read; T, M and how far the heads of omega lie apart, 0 where they share it; tiles, options."""
    omega = omega if omega.stride(1) == 1 else omega.contiguous()
    system = omega, decay.contiguous(), dt.contiguous()
    return system, (T, omega.shape[1], omega.stride(0)), turns_tiles(T, omega.shape[1])


def turns_tiles(T: int, M: int) -> dict[str, int]:
    """Of a launch of the turns."""
    blocks = {"BLOCK_T": triton.next_power_of_2(T), "BLOCK_M": triton.next_power_of_2(M)}
    return blocks | {"num_warps": 4, "num_stages": 1}


def run_forward(
    x: torch.Tensor, b_scale: torch.Tensor, b_bias: torch.Tensor, c_scale: torch.Tensor, c_bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `norm_vectors`, in the dtype of x."""
    N = len(b_scale)
    b, c = (x.new_empty(*x.shape[:-1], N) for _ in range(2))
    if b.numel():
        (x, row), rows = in_rows(x), b.numel() // N
        options, norms = tiles(N, FORWARD), (part.contiguous() for part in (b_scale, b_bias, c_scale, c_bias))
        with on_device(x.device):
            norms_kernel[triton.cdiv(rows, options["ROWS"]),](x, *norms, b, c, rows, N, row, NORM_EPSILON, **options)
    return b, c


def run_backward(
    of_b: torch.Tensor, of_c: torch.Tensor, x: torch.Tensor, b_scale: torch.Tensor, c_scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x, in its dtype, and in float32 of b's scale and bias and of c's, (4, N)."""
    N = len(b_scale)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = of_b.numel() // N
    programs = programs_of_a_norm(rows, N)
    grad_norms = x.new_empty(programs, 4, N, dtype=torch.float32)
    if rows:
        x, row = in_rows(x)
        with on_device(x.device):
            norms_gradient_kernel[programs,](
                of_b.contiguous(),
                of_c.contiguous(),
                x,
                b_scale.contiguous(),
                c_scale.contiguous(),
                grad_x,
                grad_norms,
                rows,
                N,
                row,
                NORM_EPSILON,
                **tiles(N, BACKWARD),
            )
    return grad_x, grad_norms.sum(0)


# what the compiler and autograd see
make_vectors = torch.library.custom_op(qualified("ssd_vectors"), run_forward, mutates_args=())
make_vectors_backward = torch.library.custom_op(qualified("ssd_vectors_backward"), run_backward, mutates_args=())


@make_vectors.register_fake
def _(x, b_scale, b_bias, c_scale, c_bias):
    return tuple(x.new_empty(*x.shape[:-1], len(b_scale)) for _ in range(2))


@make_vectors_backward.register_fake
def _(of_b, of_c, x, b_scale, c_scale):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), x.new_empty(4, len(b_scale), dtype=torch.float32)


def save(ctx, inputs, output):
    """For `backward`, by autograd."""
    x, b_scale, _, c_scale, _ = inputs
    ctx.save_for_backward(x, b_scale, c_scale)


def backward(ctx, of_b, of_c, run=make_vectors_backward):
    """The gradients of all inputs of `make_vectors`."""
    x, b_scale, c_scale = ctx.saved_tensors
    grad_x, grad_norms = run(of_b, of_c, x, b_scale, c_scale)
    return grad_x, *grad_norms.to(b_scale.dtype)


make_vectors.register_autograd(backward, setup_context=save)


def ssd_vectors(x, b_scale, b_bias, c_scale, c_bias) -> tuple[torch.Tensor, torch.Tensor]:
    """`norm_vectors` by the kernel, in the dtype of x."""
    return make_vectors(x, b_scale, b_bias, c_scale, c_bias)


# ---- what the registry asks for


# what models have: the dtype of x, that of the parameters, N
PROBLEMS = [(torch.bfloat16, torch.float32, 64), (torch.float32, torch.float32, 128), (torch.float32, torch.float32, 6)]


def self_check_cases(device: torch.device, *problem) -> list[Case]:
    """Of one problem, as PROBLEMS lists them, or of all of these: b and c of several blocks of rows."""
    return [_vectors_case(device, *each) for each in ([problem] if problem else PROBLEMS)]


def _vectors_case(device, dtype, of_norms, N) -> Case:
    """Part of a wider tensor."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, dtype=torch.float32):
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(device, dtype)

    L = 2 * tiles(N, FORWARD)["ROWS"] + 1
    leaves = [normal(1, L, 3 * N, dtype=dtype), *(normal(N, dtype=of_norms) for _ in range(4))]
    gradients = [normal(1, L, N) for _ in range(2)]

    def run(function, wide, *norms):
        return function(wide[..., N:], *norms)

    label = f"vectors of {N} states in {dtype}".replace("torch.", "")
    tolerance = max(TOLERANCES[dtype], TOLERANCES[of_norms])
    return gradient_case(label, partial(run, ssd_vectors), partial(run, norm_vectors), leaves, gradients, tolerance)


def turns_case(device, N: int, T: int = 32) -> Case:
    """For the self-check of the scan, which launches the turns: of heads that turn often in a chunk."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.rand(shape, generator=generator, dtype=torch.float64) for shape in ((2,), (2,), (2, N // 2))]
    dt, decay, omega = (x.to(device) for x in (inputs[0], inputs[1], 1000 * inputs[2]))
    weights = [
        torch.randn(shape, generator=generator).to(device).double() for shape in ((2, T, N // 2), (2, T), (2, T))
    ]

    def ours():
        of_angle, *others = weights
        of_angle = (of_angle * torch.arange(1, T + 1, device=device)[:, None]).sum(1)
        return [*run_turns(omega, decay, dt, T), *run_turns_backward(of_angle, *others, omega, decay, dt)]

    def twin():
        leaves = [x.clone().requires_grad_() for x in (omega, decay, dt)]
        made = since_start_of_chunks(*reversed(leaves), T, T)
        return [*turns_of_chunks(*(x.detach() for x in made)), *torch.autograd.grad(made, leaves, weights)]

    return Case(f"turns of {N} states", ours, twin, 2e-5)
