"""One token of an SSD on a GPU: one launch, in which the states advance at their address.

A program owns some channels of a head for one row of the batch. It reads the token's b and c, which all of them share,
norms them (2N numbers beside the N a channel that it holds anyhow), turns, drives and reads its states, and adds D v.
With a step that the token chooses, the transition is made here too: over one token its angles are small, so that
float32 does.

Inference only, as triton_step.py: nothing waits for the device or depends on data, so a step can be captured.
"""

from functools import partial

import torch

from .activations import ACTIVATIONS
from .discrete import NORM_EPSILON, DiscreteSSD
from .kernel_launch import on_device, qualified
from .kernels_s4 import Case
from .triton_step import activate, check_step

try:
    import triton
    import triton.language as tl
except ImportError:  # `kernels_s4` asks for this module in a `try` of its own, and reports the cause
    raise


@triton.jit
def normed(x, scale, bias, n, is_state, HALF: tl.constexpr, eps):
    """RMSNorm(x) scale + bias of 2 HALF numbers, as its two halves."""
    re = tl.load(x + n, mask=is_state, other=0.0).to(tl.float32)
    im = tl.load(x + HALF + n, mask=is_state, other=0.0).to(tl.float32)
    factor = tl.rsqrt((tl.sum(re * re, 0) + tl.sum(im * im, 0)) / (2 * HALF) + eps)
    scale_re = tl.load(scale + n, mask=is_state, other=0.0)
    scale_im = tl.load(scale + HALF + n, mask=is_state, other=0.0)
    bias_re = tl.load(bias + n, mask=is_state, other=0.0)
    bias_im = tl.load(bias + HALF + n, mask=is_state, other=0.0)
    return re * factor * scale_re + bias_re, im * factor * scale_im + bias_im


@triton.jit
def turn(angle):
    """cos and sin of an angle below 1e5, to 1e-7: it is reduced to an eighth of a turn, pi / 2 being a sum of three
    numbers of few bits, and the polynomials are minimax there. libdevice's, for any angle, needs memory of its own.
    """
    quarters = tl.floor(angle * 0.6366197723675814 + 0.5)
    x = ((angle - quarters * 1.5703125) - quarters * 4.837512969970703e-4) - quarters * 7.549789954891882e-8
    z = x * x
    sine = x + x * z * (-1.6666654611e-1 + z * (8.3321608736e-3 - z * 1.9515295891e-4))
    cosine = 1 - z * 0.5 + z * z * (4.166664568298827e-2 + z * (-1.388731625493765e-3 + z * 2.443315711809948e-5))
    quadrant = quarters.to(tl.int32) & 3
    swaps = (quadrant & 1) == 1
    cos, sin = tl.where(swaps, sine, cosine), tl.where(swaps, cosine, sine)
    return tl.where((quadrant == 1) | (quadrant == 2), -cos, cos), tl.where(quadrant >= 2, -sin, sin)


@triton.jit(do_not_specialize=["B"])
def ssd_step_kernel(
    x,
    state,
    transition,
    steps,
    norms,
    skip,
    y,
    B,
    E,
    P,
    eps,
    HALF: tl.constexpr,
    SELECTIVE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """S <- a R S + dt v b^T;  y = act(S c + D v).

    x (B, [v (E P) | b | c (2 HALF each) | raw (E)]), raw with SELECTIVE alone; y (B, E P); state (B, E P, 2 HALF)
    float32; transition (E, 2 HALF): a R, or with SELECTIVE its rates [-decay | omega]; steps (E,): dt, or
    softplus^-1(dt); norms (4, 2 HALF): the scales of b and c, then their biases; skip D (E P,).
    Grid: (blocks of channels, heads, rows).
    """
    e, b, N = tl.program_id(1), tl.program_id(2).to(tl.int64), 2 * HALF
    p, n = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    is_channel, is_state = p < P, n < HALF
    H, h = E * P, e * P + p
    width = H + 2 * N + E if SELECTIVE else H + 2 * N
    token = x + b * width
    v = tl.load(token + h, mask=is_channel, other=0.0).to(tl.float32)
    b_re, b_im = normed(token + H, norms, norms + 2 * N, n, is_state, HALF, eps)
    c_re, c_im = normed(token + H + N, norms + N, norms + 3 * N, n, is_state, HALF, eps)
    l_re = tl.load(transition + e * N + n, mask=is_state, other=0.0)
    l_im = tl.load(transition + e * N + HALF + n, mask=is_state, other=0.0)
    dt = tl.load(steps + e)
    if SELECTIVE:
        raw = tl.load(token + H + 2 * N + e).to(tl.float32) + dt
        # softplus without an overflow, and exact where exp(raw) is small: a step is
        size = tl.exp(-tl.abs(raw))
        plus = 1 + size
        dt = tl.maximum(raw, 0.0) + tl.where(plus == 1, size, tl.log(plus) * (size / tl.where(plus == 1, 1, plus - 1)))
        decayed = tl.exp(dt * l_re)
        cos, sin = turn(dt * l_im)
        l_re, l_im = decayed * cos, decayed * sin
    inside = is_channel[:, None] & is_state[None, :]
    at = state + (b * H + h)[:, None] * N + n[None, :]
    s_re = tl.load(at, mask=inside, other=0.0)
    s_im = tl.load(at + HALF, mask=inside, other=0.0)
    drive = (v * dt)[:, None]
    next_re = l_re[None, :] * s_re - l_im[None, :] * s_im + drive * b_re[None, :]
    next_im = l_re[None, :] * s_im + l_im[None, :] * s_re + drive * b_im[None, :]
    tl.store(at, next_re, mask=inside)
    tl.store(at + HALF, next_im, mask=inside)
    d = tl.load(skip + h, mask=is_channel, other=0.0)
    out = activate(tl.sum(c_re[None, :] * next_re + c_im[None, :] * next_im, 1) + d * v, ACTIVATION)
    tl.store(y + b * H + h, out.to(y.dtype.element_ty), mask=is_channel)


def ssd_blocks(P: int, N: int) -> dict[str, int]:
    """The tile: 256 complex states, four a lane of two warps, so that a single row of a wide layer fills the GPU."""
    BLOCK_N = triton.next_power_of_2(N // 2)
    BLOCK_P = min(max(1, 256 // BLOCK_N), triton.next_power_of_2(P))
    warps = max(1, BLOCK_P * BLOCK_N // 128)
    return {"BLOCK_P": BLOCK_P, "BLOCK_N": BLOCK_N, "num_warps": warps, "num_stages": 1}


@torch.library.custom_op(qualified("ssd_step_"), mutates_args={"state"})
def ssd_step_(
    x: torch.Tensor,
    state: torch.Tensor,
    transition: torch.Tensor,
    steps: torch.Tensor,
    norms: torch.Tensor,
    skip: torch.Tensor,
    activation: str,
) -> torch.Tensor:
    """Advance the states of an SSD by one token, in place, and return y (B, H) in the dtype of x.

    x (B, H + 2N), or (B, H + 2N + E) where the token has a step of its own, floating; state (B, H, N) float32,
    contiguous; transition (E, N), steps (E,) and norms (4, N) float32, as `DiscreteSSD.coefficients` has them; skip D
    (H,) float32; activation: one of ACTIVATIONS.
    Raises ValueError for other shapes, a state of another dtype or with gaps, or another activation.
    """
    B, (E, N), H = len(x), transition.shape, len(skip)
    if steps.shape != (E,) or norms.shape != (4, N) or H % max(E, 1):
        raise ValueError(f"{E} heads of {N} states have as many steps and norms of (4, {N}), and parts of D alike")
    if x.shape[1] not in (H + 2 * N, H + 2 * N + E):
        raise ValueError(f"a token is {H + 2 * N} numbers or {H + 2 * N + E}, not {x.shape[1]}")
    check_step(B, state, (H, N), activation)
    x, transition, steps, norms, skip = (part.contiguous() for part in (x, transition, steps, norms, skip))
    y = torch.empty((B, H), dtype=x.dtype, device=x.device)
    if y.numel():
        blocks = ssd_blocks(H // E, N)
        grid = (triton.cdiv(H // E, blocks["BLOCK_P"]), E, B)
        blocks |= {"HALF": N // 2, "SELECTIVE": x.shape[1] > H + 2 * N, "ACTIVATION": activation}
        with on_device(x.device):
            ssd_step_kernel[grid](x, state, transition, steps, norms, skip, y, B, E, H // E, NORM_EPSILON, **blocks)
    return y


@ssd_step_.register_fake
def _(x, state, transition, steps, norms, skip, activation):
    return x.new_empty((len(x), len(skip)))


# ---- what the registry asks for


def example(B: int, E: int, P: int, N: int, selective: bool, device="cpu") -> tuple[torch.Tensor, DiscreteSSD, tuple]:
    """A state (B, E P, N), a system, and the shape of its tokens."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, dtype=torch.float32):
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(device, dtype)

    dt, decay = (normal(E, dtype=torch.float64).exp() / 4 for _ in range(2))
    inverse = dt + torch.log(-torch.expm1(-dt)) if selective else None
    system = DiscreteSSD(dt, decay, normal(E, N // 2, dtype=torch.float64), normal(2, N), normal(2, N), inverse, None)
    if not selective:
        system = system._replace(Lambda_bar=system.over(dt).float())
    return normal(B, E * P, N), system, (B, E * P + 2 * N + (E if selective else 0))


def self_check_cases(device: torch.device) -> list[Case]:
    """Two tokens: constant and selective steps, ragged blocks, one row and several."""

    def case(dtype, tolerance, *sizes):
        state, system, shape = example(*sizes, device)
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randn((2, *shape), generator=generator, dtype=torch.float32).to(device, dtype)
        skip, exact = torch.ones(state.shape[1], device=device), system.in_double()

        def by_kernel(u, state):
            return ssd_step_(u, state, *system.coefficients(), skip, "silu"), state

        def by_twin(u, state):
            y, state = exact.step(u, state)
            return ACTIVATIONS["silu"].function(y + u[:, : len(skip)]), state

        def run(step, tokens, state):
            state, outputs = state.clone(), []
            for u in tokens:
                y, state = step(u, state)
                outputs.append(y.float())
            return [*outputs, state.float()]

        kernel, twin = partial(run, by_kernel, tokens, state), partial(run, by_twin, tokens.double(), state.double())
        return Case(f"{sizes}, {dtype}", kernel, twin, tolerance)

    return [
        case(torch.float32, 1e-5, 1, 3, 20, 34, False),
        case(torch.bfloat16, 1e-2, 3, 2, 64, 64, False),
        case(torch.bfloat16, 1e-2, 2, 3, 5, 16, True),
    ]
