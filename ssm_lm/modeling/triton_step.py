"""One token of a state space on a GPU: the states advance at their address, and what is read out of them leaves with
the skip and the activation applied.

S4 and S4D take one launch a layer. A program owns a few channels for a few rows of the batch: it reads their
coefficients once, and every state once, which it writes back in place.

S5 takes two, for its states meet in C: one launch drives them, x <- Lambda_bar x + B_bar u, and one reads them,
y = act(C x + D u). In one launch every program would have to read all of B_bar (at H = 1024, P = 64 and one row: 256
KiB a program, where the two launches read 512 KiB together) and the old states while another writes the new ones; or
one program would do it all, on one of the GPU's 132 processors. Three cuBLAS calls and what stands between them would
move the same matrices and, beside them, the driven states and the outputs four times.

Inference only: where a gradient is needed, the recurrence in PyTorch runs. Nothing here waits for the device or
depends on data, so a step can be captured in a CUDA graph.
"""

from functools import partial

import torch

from .activations import ACTIVATIONS
from .discrete import DiscreteDiagonal, DiscreteDPLR, DiscreteMIMO
from .kernel_launch import on_device, qualified
from .kernels_s4 import Case

try:
    import triton
    import triton.language as tl
except ImportError:  # `kernels_s4` asks for this module in a `try` of its own, and reports the cause
    raise


@triton.jit
def activate(y, ACTIVATION: tl.constexpr):
    """One of ACTIVATIONS, of y in float32, before it is rounded."""
    if ACTIVATION == "gelu":
        return 0.5 * y * (1 + tl.erf(y * 0.7071067811865476))
    elif ACTIVATION == "silu":
        return y * tl.sigmoid(y)
    else:
        return y


@triton.jit
def siso_step_kernel(
    u,
    state,
    coefficients,
    skip,
    y,
    B,
    H,
    HALF: tl.constexpr,
    RANK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """h <- R(E) h - F G^T h + B_bar u (RANK > 0) or R(E) h + u (RANK 0, u on the real parts);  y = act(C h + D u).

    u, y (B, H); state (B, H, 2 HALF) float32; coefficients (K, H, 2 HALF): E, C and, for RANK > 0, B_bar, then F and G
    of every rank; skip D (H,). Grid: (blocks of channels, blocks of the batch).
    """
    h = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    n = tl.arange(0, BLOCK_N)
    is_channel = h < H
    inside = is_channel[:, None] & (n < HALF)[None, :]
    at = h[:, None] * (2 * HALF) + n[None, :]
    plane = H * 2 * HALF
    e_re = tl.load(coefficients + at, mask=inside, other=0.0)
    e_im = tl.load(coefficients + at + HALF, mask=inside, other=0.0)
    c_re = tl.load(coefficients + plane + at, mask=inside, other=0.0)
    c_im = tl.load(coefficients + plane + at + HALF, mask=inside, other=0.0)
    if RANK > 0:
        b_re = tl.load(coefficients + 2 * plane + at, mask=inside, other=0.0)
        b_im = tl.load(coefficients + 2 * plane + at + HALF, mask=inside, other=0.0)
        f_re = tl.load(coefficients + 3 * plane + at, mask=inside, other=0.0)
        f_im = tl.load(coefficients + 3 * plane + at + HALF, mask=inside, other=0.0)
        g_re = tl.load(coefficients + 4 * plane + at, mask=inside, other=0.0)
        g_im = tl.load(coefficients + 4 * plane + at + HALF, mask=inside, other=0.0)
    if RANK > 1:
        f2_re = tl.load(coefficients + 5 * plane + at, mask=inside, other=0.0)
        f2_im = tl.load(coefficients + 5 * plane + at + HALF, mask=inside, other=0.0)
        g2_re = tl.load(coefficients + 6 * plane + at, mask=inside, other=0.0)
        g2_im = tl.load(coefficients + 6 * plane + at + HALF, mask=inside, other=0.0)
    d = tl.load(skip + h, mask=is_channel, other=0.0)
    for i in range(BLOCK_B):
        b = tl.program_id(1).to(tl.int64) * BLOCK_B + i
        here = inside & (b < B)
        row = state + b * plane + at
        x_re = tl.load(row, mask=here, other=0.0)
        x_im = tl.load(row + HALF, mask=here, other=0.0)
        v = tl.load(u + b * H + h, mask=is_channel & (b < B), other=0.0).to(tl.float32)
        next_re = e_re * x_re - e_im * x_im
        next_im = e_re * x_im + e_im * x_re
        if RANK == 0:
            next_re += v[:, None]
        else:
            low = tl.sum(g_re * x_re + g_im * x_im, 1)[:, None]
            next_re += b_re * v[:, None] - f_re * low
            next_im += b_im * v[:, None] - f_im * low
        if RANK > 1:
            low = tl.sum(g2_re * x_re + g2_im * x_im, 1)[:, None]
            next_re -= f2_re * low
            next_im -= f2_im * low
        tl.store(row, next_re, mask=here)
        tl.store(row + HALF, next_im, mask=here)
        out = activate(tl.sum(c_re * next_re + c_im * next_im, 1) + d * v, ACTIVATION)
        tl.store(y + b * H + h, out.to(y.dtype.element_ty), mask=is_channel & (b < B))


@triton.jit
def mimo_drive_kernel(
    u,
    state,
    Lambda,
    weight,
    B,
    H,
    HALF,
    DOT: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """x <- Lambda x + weight u, complex: u (B, H), state (B, 2 HALF) float32, Lambda (2 HALF,), weight (2 HALF, H).

    A program owns BLOCK_P complex states of BLOCK_B rows (one without DOT, where the product is a matrix times a
    vector). Grid: (blocks of states, blocks of the batch).
    """
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    is_state = p < HALF
    l_re = tl.load(Lambda + p, mask=is_state, other=0.0)
    l_im = tl.load(Lambda + HALF + p, mask=is_state, other=0.0)
    columns = tl.arange(0, BLOCK_H)
    if DOT:
        b = tl.program_id(1).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
        d_re = tl.zeros((BLOCK_B, BLOCK_P), tl.float32)
        d_im = tl.zeros((BLOCK_B, BLOCK_P), tl.float32)
        for start in range(0, H, BLOCK_H):
            h = start + columns
            inside = (h < H)[:, None] & is_state[None, :]
            row = weight + p[None, :] * H + h[:, None]
            v = tl.load(u + b[:, None] * H + h[None, :], mask=(b < B)[:, None] & (h < H)[None, :], other=0.0)
            v = v.to(tl.float32)
            d_re += tl.dot(v, tl.load(row, mask=inside, other=0.0), input_precision="ieee")
            d_im += tl.dot(v, tl.load(row + HALF * H, mask=inside, other=0.0), input_precision="ieee")
        at = state + b[:, None] * (2 * HALF) + p[None, :]
        here = (b < B)[:, None] & is_state[None, :]
        l_re, l_im = l_re[None, :], l_im[None, :]
    else:
        b = tl.program_id(1).to(tl.int64)
        sum_re = tl.zeros((BLOCK_P, BLOCK_H), tl.float32)
        sum_im = tl.zeros((BLOCK_P, BLOCK_H), tl.float32)
        for start in range(0, H, BLOCK_H):
            h = start + columns
            inside = is_state[:, None] & (h < H)[None, :]
            row = weight + p[:, None] * H + h[None, :]
            v = tl.load(u + b * H + h, mask=h < H, other=0.0).to(tl.float32)[None, :]
            sum_re += v * tl.load(row, mask=inside, other=0.0)
            sum_im += v * tl.load(row + HALF * H, mask=inside, other=0.0)
        d_re, d_im = tl.sum(sum_re, 1), tl.sum(sum_im, 1)
        at = state + b * (2 * HALF) + p
        here = is_state
    x_re = tl.load(at, mask=here, other=0.0)
    x_im = tl.load(at + HALF, mask=here, other=0.0)
    tl.store(at, l_re * x_re - l_im * x_im + d_re, mask=here)
    tl.store(at + HALF, l_re * x_im + l_im * x_re + d_im, mask=here)


@triton.jit
def mimo_read_kernel(
    state,
    weight,
    u,
    skip,
    y,
    B,
    H,
    P,
    ACTIVATION: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """y = act(weight x + D u): state x (B, P) float32, weight (H, P), u and y (B, H), skip D (H,).

    A program owns BLOCK_H outputs of BLOCK_B rows, as in `mimo_drive_kernel`.
    """
    h = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    is_channel = h < H
    d = tl.load(skip + h, mask=is_channel, other=0.0)
    columns = tl.arange(0, BLOCK_P)
    if DOT:
        b = tl.program_id(1).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
        out = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
        for start in range(0, P, BLOCK_P):
            p = start + columns
            x = tl.load(state + b[:, None] * P + p[None, :], mask=(b < B)[:, None] & (p < P)[None, :], other=0.0)
            w = tl.load(weight + h[None, :] * P + p[:, None], mask=is_channel[None, :] & (p < P)[:, None], other=0.0)
            out += tl.dot(x, w, input_precision="ieee")
        at = b[:, None] * H + h[None, :]
        here = (b < B)[:, None] & is_channel[None, :]
        d = d[None, :]
    else:
        b = tl.program_id(1).to(tl.int64)
        products = tl.zeros((BLOCK_H, BLOCK_P), tl.float32)
        for start in range(0, P, BLOCK_P):
            p = start + columns
            x = tl.load(state + b * P + p, mask=p < P, other=0.0)[None, :]
            products += x * tl.load(
                weight + h[:, None] * P + p[None, :], mask=is_channel[:, None] & (p < P)[None, :], other=0.0
            )
        out = tl.sum(products, 1)
        at = b * H + h
        here = is_channel
    out = activate(out + d * tl.load(u + at, mask=here, other=0.0).to(tl.float32), ACTIVATION)
    tl.store(y + at, out.to(y.dtype.element_ty), mask=here)


def siso_blocks(B: int, N: int) -> dict[str, int]:
    """The tile of `siso_step_kernel`: 128 complex states, four a lane of one warp, so that a single row of a wide
    layer still fills the GPU; a large batch reads the coefficients once for eight rows.
    """
    BLOCK_N = triton.next_power_of_2(N // 2)
    return {
        "BLOCK_B": 8 if B >= 32 else 1,
        "BLOCK_H": max(1, 128 // BLOCK_N),
        "BLOCK_N": BLOCK_N,
        "num_warps": max(1, BLOCK_N // 128),
        "num_stages": 1,
    }


def mimo_blocks(B: int) -> tuple[dict[str, int], dict[str, int]]:
    """Of `mimo_drive_kernel` and `mimo_read_kernel`: a row a program, or a tile of rows when there are enough."""
    if B < 16:
        drive = {"DOT": False, "BLOCK_B": 1, "BLOCK_P": 2, "BLOCK_H": 512, "num_warps": 4, "num_stages": 1}
        return drive, {"DOT": False, "BLOCK_B": 1, "BLOCK_H": 16, "BLOCK_P": 64, "num_warps": 4, "num_stages": 1}
    drive = {"DOT": True, "BLOCK_B": 16, "BLOCK_P": 16, "BLOCK_H": 32, "num_warps": 4, "num_stages": 1}
    return drive, {"DOT": True, "BLOCK_B": 16, "BLOCK_H": 32, "BLOCK_P": 32, "num_warps": 4, "num_stages": 1}


def check_step(B: int, state: torch.Tensor, state_shape: tuple[int, int], activation: str) -> None:
    """ValueError where a state (B, *state_shape) cannot advance at its address, and for another activation."""
    if state.shape != (B, *state_shape):
        raise ValueError(f"for {B} rows the state is {(B, *state_shape)}, not {tuple(state.shape)}")
    if state.dtype != torch.float32 or not state.is_contiguous():
        raise ValueError(f"the state advances at its address: contiguous float32, not {state.dtype} {state.stride()}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is one of {', '.join(ACTIVATIONS)}, not {activation!r}")


def _check(u: torch.Tensor, state: torch.Tensor, state_shape: tuple[int, int], skip: torch.Tensor, activation: str):
    if skip.shape != u.shape[1:]:
        raise ValueError(f"for u {tuple(u.shape)} D is {tuple(u.shape[1:])}, not {tuple(skip.shape)}")
    check_step(len(u), state, state_shape, activation)


@torch.library.custom_op(qualified("siso_step_"), mutates_args={"state"})
def siso_step_(
    u: torch.Tensor, state: torch.Tensor, coefficients: torch.Tensor, skip: torch.Tensor, activation: str
) -> torch.Tensor:
    """Advance the states of S4 or S4D by one token, in place, and return y (B, H) in the dtype of u.

    u (B, H) floating; state (B, H, N) float32, contiguous; skip D (H,) float32; activation: one of ACTIVATIONS.
    coefficients (K, H, N) float32: [Lambda_bar, C] of a diagonal system whose B is folded into C, or
    [E, C, B_bar, F_1, G_1, F_2, G_2] of a diagonal plus low-rank one, with as many pairs as it has ranks, 1 or 2.
    Raises ValueError for other shapes, a state of another dtype or with gaps, or another activation.
    """
    (B, H), (K, _, N) = u.shape, coefficients.shape
    _check(u, state, coefficients.shape[1:], skip, activation)
    if K not in (2, 5, 7):
        raise ValueError(f"2, 5 or 7 coefficients make a system, not {K}")
    u, coefficients, skip = u.contiguous(), coefficients.contiguous(), skip.contiguous()
    y = torch.empty_like(u)
    if u.numel():
        blocks = siso_blocks(B, N)
        grid = (triton.cdiv(H, blocks["BLOCK_H"]), triton.cdiv(B, blocks["BLOCK_B"]))
        blocks |= {"HALF": N // 2, "RANK": (K - 2) // 2, "ACTIVATION": activation}
        with on_device(u.device):
            siso_step_kernel[grid](u, state, coefficients, skip, y, B, H, **blocks)
    return y


@siso_step_.register_fake
def _(u, state, coefficients, skip, activation):
    return torch.empty_like(u, memory_format=torch.contiguous_format)


@torch.library.custom_op(qualified("mimo_step_"), mutates_args={"state"})
def mimo_step_(
    u: torch.Tensor,
    state: torch.Tensor,
    Lambda: torch.Tensor,
    weight_in: torch.Tensor,
    weight_out: torch.Tensor,
    skip: torch.Tensor,
    activation: str,
) -> torch.Tensor:
    """The same for S5: x <- Lambda x + weight_in u, y = act(weight_out x + D u), with x as [real | imaginary].

    u (B, H) floating; state (B, 1, P) float32, contiguous; Lambda (P,), weight_in (P, H), weight_out (H, P), skip D
    (H,) float32. Returns y (B, H) in the dtype of u. Raises ValueError as `siso_step_` does.
    """
    (B, H), P = u.shape, len(Lambda)
    _check(u, state, (1, P), skip, activation)
    u, Lambda, skip, weight_in, weight_out = (x.contiguous() for x in (u, Lambda, skip, weight_in, weight_out))
    y = torch.empty_like(u)
    if u.numel():
        drive, read = mimo_blocks(B)
        rows = triton.cdiv(B, drive["BLOCK_B"])
        with on_device(u.device):
            grid = (triton.cdiv(P // 2, drive["BLOCK_P"]), rows)
            mimo_drive_kernel[grid](u, state, Lambda, weight_in, B, H, P // 2, **drive)
            grid = (triton.cdiv(H, read["BLOCK_H"]), rows)
            mimo_read_kernel[grid](state, weight_out, u, skip, y, B, H, P, ACTIVATION=activation, **read)
    return y


@mimo_step_.register_fake
def _(u, state, Lambda, weight_in, weight_out, skip, activation):
    return torch.empty_like(u, memory_format=torch.contiguous_format)


# ---- what the registry asks for


def self_check_cases(device: torch.device) -> list[Case]:
    """Two tokens of every kernel: diagonal and low-rank systems, one row and several, ragged blocks, and a state of
    several warps, whose sums cross them.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(device)

    def run(step, inputs, state, dtype):
        state, outputs = state.clone(), []
        for u in inputs.to(dtype):
            y, state = step(u, state)
            outputs.append(y.float())
        return [*outputs, state.float()]

    def siso(rank, B, H, N):
        """A system with its state: diagonal for rank 0."""
        E, C_row, B_bar = (normal(H, N) / N**0.5 for _ in range(3))
        if not rank:
            log = C_re = normal(H, N // 2)  # what a step does not read
            return DiscreteDiagonal(log, log, C_re, C_re, E, C_row), normal(B, H, N)
        return DiscreteDPLR(E, *(normal(H, N, rank) / N**0.5 for _ in range(2)), B_bar, C_row), normal(B, H, N)

    def mimo(B, H, P):
        log = normal(P // 2)
        return DiscreteMIMO(log, log, normal(P) / 2, normal(H, P) / H**0.5, normal(P, H) / P**0.5), normal(B, 1, P)

    def case(name, kernel, system, state, dtype, tolerance):
        B, H = len(state), 45 if kernel is mimo_step_ else state.shape[1]
        inputs, skip, coefficients = normal(2, B, H).to(dtype), normal(H), system.coefficients()
        exact, exact_skip = type(system)(*(x.double() for x in system)), skip.double()

        def by_kernel(u, state):
            return kernel(u, state, *coefficients, skip, "gelu"), state

        def by_twin(u, state):
            y, state = exact.step(u, state)
            return ACTIVATIONS["gelu"].function(y + exact_skip * u), state

        return Case(
            f"{name}, {dtype}",
            partial(run, by_kernel, inputs, state, dtype),
            partial(run, by_twin, inputs, state.double(), torch.float64),
            tolerance,
        )

    return [
        case("S4D", siso_step_, *siso(0, 2, 13, 34), torch.float32, 1e-5),
        case("S4", siso_step_, *siso(1, 33, 5, 64), torch.float32, 1e-5),
        case("S4 of rank 2", siso_step_, *siso(2, 2, 13, 64), torch.bfloat16, 1e-2),
        case("S4 of many states", siso_step_, *siso(1, 2, 3, 300), torch.float16, 1e-2),
        case("S5", mimo_step_, *mimo(2, 45, 70), torch.float32, 1e-5),
        case("S5, a batch", mimo_step_, *mimo(19, 45, 70), torch.bfloat16, 1e-2),
    ]
