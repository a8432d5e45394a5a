"""S4D's discretisation, zero-order hold, on a GPU: one launch, and one back. The twin is diagonal_discretization.py.

    z = dt Lambda,   log Lambda_bar = z,   C B_bar = dt phi(z) B C,   phi(z) = (exp(z) - 1) / z

A program is a channel, whose vectors of N are pairs of halves (re, im). All is float64, for z is many turns; near zero,
where exp(z) - 1 loses its digits, phi and its slope are their series.
"""

from functools import partial

import torch

from .diagonal_discretization import diagonal_system
from .kernel_launch import on_device, qualified
from .kernels_s4 import Case, gradient_case
from .triton_dplr_discretization import over_channels, sum_up_shared, times, times_conjugate
from .triton_dplr_operators import read_pair, write_pair

try:
    import triton
    import triton.language as tl
except ImportError:  # `kernels_s4` asks for this module in a `try` of its own, and reports the cause
    raise


@triton.jit
def complex_exponential(re, im):
    """exp(re + i im) in float64. The angle is reduced to an eighth of a turn, pi / 2 being a sum of two numbers, the
    first of few bits; there sine and cosine are their series. libdevice's, for any angle, needs memory of its own.
    """
    quarters = tl.floor(im * 0.6366197723675814 + 0.5)
    x = (im - quarters * 1.57079632673412561417) - quarters * 6.07710050650619224932e-11
    y = x * x
    sine, cosine = tl.zeros_like(x) + 1.0, tl.zeros_like(x) + 1.0
    for k in tl.static_range(18, 0, -2):  # by Horner's rule, to x^18 / 18!
        sine = 1.0 - sine * y * (1.0 / (k * (k + 1)))
        cosine = 1.0 - cosine * y * (1.0 / (k * (k - 1)))
    sine *= x
    quadrant = (quarters - 4.0 * tl.floor(0.25 * quarters)).to(tl.int32)
    swaps = (quadrant & 1) == 1
    cos, sin = tl.where(swaps, sine, cosine), tl.where(swaps, cosine, sine)
    modulus = tl.exp(re)
    cos = tl.where((quadrant == 1) | (quadrant == 2), -cos, cos)
    return modulus * cos, modulus * tl.where(quadrant >= 2, -sin, sin)


@triton.jit
def phi_and_slope(re, im, e_re, e_im):
    """phi(z) and phi'(z) of z = re + i im and exp(z)."""
    small = tl.abs(re) + tl.abs(im) < 0.02
    # phi = sum of z^k / (k + 1)!, its slope the sum of k z^(k-1) / (k + 1)!, by Horner's rule: one term of the next
    p_re, p_im = tl.zeros_like(re) + 1.0, tl.zeros_like(re)
    s_re, s_im = p_re, p_im
    for k in tl.static_range(7, 0, -1):
        p_re, p_im = times(p_re, p_im, re * (1.0 / (k + 1)), im * (1.0 / (k + 1)))
        s_re, s_im = times(s_re, s_im, re * ((k + 1) / (k * (k + 2))), im * ((k + 1) / (k * (k + 2))))
        p_re, s_re = p_re + 1.0, s_re + 1.0
    s_re, s_im = 0.5 * s_re, 0.5 * s_im
    # or (exp(z) - 1) / z, and (exp(z) - phi) / z
    scale = 1.0 / tl.where(small, 1.0, re * re + im * im)
    f_re, f_im = times_conjugate(re * scale, im * scale, e_re - 1.0, e_im)
    g_re, g_im = times_conjugate(re * scale, im * scale, e_re - f_re, e_im - f_im)
    p_re, p_im = tl.where(small, p_re, f_re), tl.where(small, p_im, f_im)
    return p_re, p_im, tl.where(small, s_re, g_re), tl.where(small, s_im, g_im)


@triton.jit
def read_system(log_dt, Lambda_log_re, Lambda_im, B, C, h, s, n, half):
    """dt, z, and B and C as halves, of a channel, in float64."""
    dt = tl.exp(tl.load(log_dt + h).to(tl.float64))
    rate = tl.exp(tl.load(Lambda_log_re + s * half + n, mask=n < half, other=0.0).to(tl.float64))
    frequency = tl.load(Lambda_im + s * half + n, mask=n < half, other=0.0).to(tl.float64)
    b_re, b_im = read_pair(B + s * 2 * half, n, half)
    c_re, c_im = read_pair(C + h * 2 * half, n, half)
    b_re, b_im, c_re, c_im = b_re.to(tl.float64), b_im.to(tl.float64), c_re.to(tl.float64), c_im.to(tl.float64)
    return dt, -dt * rate, dt * frequency, b_re, b_im, c_re, c_im


# nothing but N is a constant: another width compiles nothing new
@triton.jit(do_not_specialize=["S", "half"])
def zoh_kernel(log_dt, Lambda_log_re, Lambda_im, B, C, log_re, log_im, CB_re, CB_im, S, half, HALF: tl.constexpr):
    """log Lambda_bar (re, im), float64, and C B_bar (re, im), (H, N/2). Grid: channels."""
    h, n = tl.program_id(0).to(tl.int64), tl.arange(0, HALF)
    dt, z_re, z_im, b_re, b_im, c_re, c_im = read_system(log_dt, Lambda_log_re, Lambda_im, B, C, h, h % S, n, half)
    e_re, e_im = complex_exponential(z_re, z_im)
    p_re, p_im, _, _ = phi_and_slope(z_re, z_im, e_re, e_im)
    b_re, b_im = times(dt * p_re, dt * p_im, b_re, b_im)
    c_re, c_im = times(c_re, c_im, b_re, b_im)
    tl.store(log_re + h * half + n, z_re, mask=n < half)
    tl.store(log_im + h * half + n, z_im, mask=n < half)
    tl.store(CB_re + h * half + n, c_re.to(tl.float32), mask=n < half)
    tl.store(CB_im + h * half + n, c_im.to(tl.float32), mask=n < half)


@triton.jit(do_not_specialize=["S", "half", "half_row", "row"])
def zoh_gradient_kernel(
    log_dt,
    Lambda_log_re,
    Lambda_im,
    B,
    C,
    of_log_re,
    of_log_im,
    of_CB_re,
    of_CB_im,
    of_log_dt,
    of_log_rate,
    of_im,
    of_B,
    of_C,
    S,
    half,
    half_row,
    row,
    HALF: tl.constexpr,
):
    """Each channel's part: of_log_dt (H,), of_C (H, N), and, of what channels share, of_log_rate and of_im (H, N/2),
    whose rows lie half_row numbers apart, and of_B (H, N), whose rows lie `row` apart.
    """
    h, N, n = tl.program_id(0).to(tl.int64), 2 * half, tl.arange(0, HALF)
    dt, z_re, z_im, b_re, b_im, c_re, c_im = read_system(log_dt, Lambda_log_re, Lambda_im, B, C, h, h % S, n, half)
    e_re, e_im = complex_exponential(z_re, z_im)
    p_re, p_im, s_re, s_im = phi_and_slope(z_re, z_im, e_re, e_im)
    here = h * half + n
    g_re = tl.load(of_CB_re + here, mask=n < half, other=0.0).to(tl.float64)
    g_im = tl.load(of_CB_im + here, mask=n < half, other=0.0).to(tl.float64)
    # C B_bar = dt phi B C, each factor's gradient the conjugate of the others times g
    x_re, x_im = times_conjugate(b_re, b_im, g_re, g_im)
    y_re, y_im = times_conjugate(dt * p_re, dt * p_im, x_re, x_im)
    write_pair(of_C + h * N, y_re.to(tl.float32), y_im.to(tl.float32), n, half)
    y_re, y_im = times_conjugate(c_re, c_im, g_re, g_im)
    y_re, y_im = times_conjugate(dt * p_re, dt * p_im, y_re, y_im)
    write_pair(of_B + h * row, y_re.to(tl.float32), y_im.to(tl.float32), n, half)
    x_re, x_im = times_conjugate(c_re, c_im, x_re, x_im)
    of_dt = tl.sum(x_re * p_re + x_im * p_im, 0)
    # z: of its slope, and itself an output
    w_re, w_im = times_conjugate(dt * s_re, dt * s_im, x_re, x_im)
    w_re += tl.load(of_log_re + here, mask=n < half, other=0.0)
    w_im += tl.load(of_log_im + here, mask=n < half, other=0.0)
    tl.store(of_log_rate + h * half_row + n, (w_re * z_re).to(tl.float32), mask=n < half)
    tl.store(of_im + h * half_row + n, (w_im * dt).to(tl.float32), mask=n < half)
    tl.store(of_log_dt + h, (dt * of_dt + tl.sum(w_re * z_re + w_im * z_im, 0)).to(tl.float32))


# ---- launches


def _empty(C) -> tuple[torch.Tensor, ...]:
    H, N = C.shape
    return tuple(C.new_empty(H, N // 2, dtype=dtype) for dtype in (torch.float64,) * 2 + (torch.float32,) * 2)


def run_forward(
    log_dt: torch.Tensor, Lambda_log_re: torch.Tensor, Lambda_im: torch.Tensor, B: torch.Tensor, C: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """log Lambda_bar and C B_bar, a pair each; see `diagonal_system`."""
    inputs = [x.contiguous() for x in (log_dt, Lambda_log_re, Lambda_im, B, C)]
    outputs = _empty(C)
    grid, sizes, options = over_channels(len(log_dt), *B.shape)
    if len(log_dt):
        with on_device(log_dt.device):
            zoh_kernel[grid](*inputs, *outputs, *sizes, **options)
    return outputs


def run_backward(
    of_log_re: torch.Tensor,
    of_log_im: torch.Tensor,
    of_CB_re: torch.Tensor,
    of_CB_im: torch.Tensor,
    log_dt: torch.Tensor,
    Lambda_log_re: torch.Tensor,
    Lambda_im: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
) -> list[torch.Tensor]:
    """The gradients of log_dt, of C and of Lambda_log_re, Lambda_im and B. What channels share is summed over them in
    order, in one launch: then the last three are one (S, N/2 + N/2 + N), see `parts`.
    """
    (H, N), S = C.shape, len(B)
    inputs = [x.contiguous() for x in (log_dt, Lambda_log_re, Lambda_im, B, C)]
    gradients = [x.contiguous() for x in (of_log_re, of_log_im, of_CB_re, of_CB_im)]
    of_log_dt, of_C = torch.empty_like(log_dt), C.new_empty(H, N)
    found = [C.new_empty(H, width) for width in ((N // 2, N // 2, N) if S == H else (2 * N,))]
    shared = found if S == H else parts(*found)
    strides = shared[0].stride(0), shared[2].stride(0)
    grid, sizes, options = over_channels(len(log_dt), *B.shape)
    if H:
        with on_device(log_dt.device):
            zoh_gradient_kernel[grid](*inputs, *gradients, of_log_dt, *shared, of_C, *sizes, *strides, **options)
    return [of_log_dt, of_C, *sum_up_shared(found, H, S)]


def parts(shared: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of Lambda_log_re and Lambda_im (S, N/2) and of B (S, N), of one tensor."""
    N = shared.shape[1] // 2
    return shared.split([N // 2, N // 2, N], 1)


# what the compiler and autograd see
discretize = torch.library.custom_op(qualified("diagonal_discretization"), run_forward, mutates_args=())
discretize_backward = torch.library.custom_op(
    qualified("diagonal_discretization_backward"), run_backward, mutates_args=()
)


@discretize.register_fake
def _(log_dt, Lambda_log_re, Lambda_im, B, C):
    return _empty(C)


@discretize_backward.register_fake
def _(of_log_re, of_log_im, of_CB_re, of_CB_im, log_dt, Lambda_log_re, Lambda_im, B, C):
    found = [x.new_empty(x.shape) for x in (log_dt, C)]
    if len(B) != len(C):
        return [*found, B.new_empty(len(B), 2 * B.shape[1])]
    return found + [x.new_empty(x.shape) for x in (Lambda_log_re, Lambda_im, B)]


def save(ctx, inputs, output):
    """For `backward`, by autograd."""
    ctx.save_for_backward(*inputs)


def backward(ctx, *gradients, run=discretize_backward):
    """The gradients of all inputs of `discretize`."""
    of_log_dt, of_C, *found = run(*gradients, *ctx.saved_tensors)
    return of_log_dt, *(parts(*found) if len(found) == 1 else found), of_C


discretize.register_autograd(backward, setup_context=save)


def diagonal_discretization(log_dt, Lambda_log_re, Lambda_im, B, C, method: str = "zoh") -> tuple[torch.Tensor, ...]:
    """`diagonal_system` by the kernel, which knows the zero-order hold alone."""
    assert method == "zoh", method
    return discretize(log_dt, Lambda_log_re, Lambda_im, B, C)


# ---- what the registry asks for


def example(H: int, S: int, N: int, device=None) -> list[torch.Tensor]:
    """log_dt, Lambda_log_re, Lambda_im, B and C of H channels that share S systems."""
    generator = torch.Generator().manual_seed(0)
    shapes = (H,), (S, N // 2), (S, N // 2), (S, N), (H, N)
    log_dt, log_re, im, *others = (torch.randn(shape, generator=generator) for shape in shapes)
    return [x.to(device) for x in (log_dt - 4, 0.5 * log_re - 0.5, 200 * im, *others)]


PROBLEMS = [(64,), (128,), (2,)]  # states a channel that models have; S5's, one by one


def self_check_cases(device: torch.device, *problem) -> list[Case]:
    """Of one number of states, or of those that models have: channels that share systems."""
    return [_case(device, *each) for each in ([problem] if problem else PROBLEMS)]


def _case(device, N) -> Case:
    leaves = example(6, 3, N, device)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(6, N // 2, generator=generator).to(device) for _ in range(4)]
    ours, twin = (partial(each, method="zoh") for each in (diagonal_discretization, diagonal_system))
    return gradient_case(f"discretisation of a diagonal, N = {N}", ours, twin, leaves, weights, 2e-5)
