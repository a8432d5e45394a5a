"""The RMS norm on a GPU: one launch forward, with the gate and the cast that follows it; one launch back, before a
residual connection with the gradient of what goes past.

A program holds whole rows, channels and all: they are read once, and what the backward needs of the norm it makes anew.
The weight's gradient is a sum a program over the rows that it takes, and those are added up in a fixed order, no
atomics. Everything is float32 between reading and writing. The equation stands in rms_norm.py.
"""

from functools import partial

import torch

from .first_order import first_order
from .kernel_launch import in_rows, on_device, qualified
from .kernel_limits import programs_of_a_norm, rows_of_a_norm
from .kernels_s4 import Case, gradient_case
from .rms_norm import rms_norm as plain_rms_norm

try:
    import triton
    import triton.language as tl
except ImportError:  # `kernels_s4` asks for this module in a `try` of its own, and reports the cause
    raise


@triton.jit
def read(x, r, rows, row, c, C):
    """(rows, channels) of x, whose rows lie `row` numbers apart, float32; 0 where there is none."""
    inside = (r < rows)[:, None] & (c < C)[None, :]
    return tl.load(x + (r * row)[:, None] + c[None, :], mask=inside, other=0.0).to(tl.float32)


# another batch or length compiles nothing new
@triton.jit(do_not_specialize=["rows"])
def norm_kernel(
    x, gate, weight, y, rows, C, row, gate_row, eps, GATED: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr
):
    """y (rows, C) of x and gate. Grid: blocks of ROWS rows."""
    r, c = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_C)
    a = read(x, r, rows, row, c, C)
    if GATED:
        z = read(gate, r, rows, gate_row, c, C)
        a *= z * tl.sigmoid(z)
    scale = tl.rsqrt(tl.sum(a * a, 1) / C + eps)
    w = tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)
    inside = (r < rows)[:, None] & (c < C)[None, :]
    tl.store(y + (r * C)[:, None] + c[None, :], (a * scale[:, None] * w[None, :]).to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def norm_backward_kernel(
    g,
    past,
    x,
    gate,
    weight,
    grad_x,
    grad_gate,
    grad_weight,
    rows,
    C,
    g_row,
    past_row,
    row,
    gate_row,
    eps,
    GATED: tl.constexpr,
    PAST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """grad_x and grad_gate (rows, C) of g, that of y, and with PAST of what goes past the norm; a program's part of
    grad_weight (programs, C).
    Grid: programs, each of which takes every so manieth block of ROWS rows.
    """
    c = tl.arange(0, BLOCK_C)
    w = tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros((ROWS, BLOCK_C), tl.float32)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        r = first + tl.arange(0, ROWS).to(tl.int64)
        at = (r * C)[:, None] + c[None, :]
        inside = (r < rows)[:, None] & (c < C)[None, :]
        s = read(g, r, rows, g_row, c, C)
        a = read(x, r, rows, row, c, C)
        if GATED:
            z = read(gate, r, rows, gate_row, c, C)
            part = tl.sigmoid(z)
            open = z * part
            product = a * open
        else:
            product = a
        scale = tl.rsqrt(tl.sum(product * product, 1) / C + eps)[:, None]
        normed = product * scale
        total += s * normed
        s *= w
        s = (s - normed * (tl.sum(s * normed, 1) / C)[:, None]) * scale  # the gradient of the product
        if GATED:
            of_gate = s * a * part * (1 + z * (1 - part))
            tl.store(grad_gate + at, of_gate.to(grad_gate.dtype.element_ty), mask=inside)
            s *= open
        if PAST:
            s += read(past, r, rows, past_row, c, C)
        tl.store(grad_x + at, s.to(grad_x.dtype.element_ty), mask=inside)
    tl.store(grad_weight + tl.program_id(0).to(tl.int64) * C + c, tl.sum(total, 0), mask=c < C)


# ---- launches


def tiles(C: int, numbers_a_thread: int) -> dict[str, int]:
    block, rows = triton.next_power_of_2(C), rows_of_a_norm(C)
    return {"ROWS": rows, "BLOCK_C": block, "num_warps": rows * block // (32 * numbers_a_thread), "num_stages": 1}


FORWARD, BACKWARD = 16, 8  # numbers a thread


def _rows(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """x (..., C) as (B, L, C), see `in_rows`."""
    return in_rows(x if x.dim() == 3 else x.reshape(1, -1, x.shape[-1]))


def run_forward(
    x: torch.Tensor, weight: torch.Tensor, eps: float, gate: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """As `rms_norm.rms_norm`."""
    C = x.shape[-1]
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    if y.numel():
        (x, row), rows = _rows(x), y.numel() // C
        gate, gate_row = (x, row) if gate is None else _rows(gate)
        options = {"GATED": gate is not x, **tiles(C, FORWARD)}
        with on_device(x.device):
            norm_kernel[triton.cdiv(rows, options["ROWS"]),](
                x, gate, weight.contiguous(), y, rows, C, row, gate_row, eps, **options
            )
    return y


def run_backward(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    gate: torch.Tensor | None,
    grad_past: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, weight and gate, each in its dtype; that of the gate is empty where there is none. grad_past: of
    x where it goes past the norm, a part of x's.
    """
    C = x.shape[-1]
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grad_gate = x.new_empty(0) if gate is None else torch.empty(x.shape, dtype=gate.dtype, device=x.device)
    rows = grad_x.numel() // max(C, 1)
    programs = programs_of_a_norm(rows, C)
    grad_weight = x.new_empty(programs, C, dtype=torch.float32)
    if grad_x.numel():
        (x, row), (grad_y, g_row) = _rows(x), _rows(grad_y)
        gate, gate_row = (x, row) if gate is None else _rows(gate)
        past, past_row = (x, row) if grad_past is None else _rows(grad_past)
        with on_device(x.device):
            norm_backward_kernel[programs,](
                grad_y,
                past,
                x,
                gate,
                weight.contiguous(),
                grad_x,
                grad_gate,
                grad_weight,
                rows,
                C,
                g_row,
                past_row,
                row,
                gate_row,
                eps,
                GATED=gate is not x,
                PAST=grad_past is not None,
                **tiles(C, BACKWARD),
            )
    return grad_x, grad_weight.sum(0).to(weight.dtype), grad_gate


# what the compiler and autograd see
norm_rows = torch.library.custom_op(qualified("rms_norm"), run_forward, mutates_args=())
norm_rows_backward = torch.library.custom_op(qualified("rms_norm_backward"), run_backward, mutates_args=())


@norm_rows.register_fake
def _(x, weight, eps, gate, dtype):
    return torch.empty(x.shape, dtype=dtype, device=x.device)


@norm_rows_backward.register_fake
def _(grad_y, x, weight, eps, gate, grad_past=None):
    of_gate = x.new_empty(0) if gate is None else torch.empty(x.shape, dtype=gate.dtype, device=x.device)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty_like(weight), of_gate


def save(ctx, inputs, output):
    """For `backward`, by autograd."""
    x, weight, ctx.eps, gate, _ = inputs
    ctx.save_for_backward(x, weight, gate)


def backward(ctx, grad_y, run=norm_rows_backward):
    """The gradients of all inputs of `norm_rows`."""
    x, weight, gate = ctx.saved_tensors
    grad_x, grad_weight, grad_gate = run(grad_y, x, weight, ctx.eps, gate)
    return grad_x, grad_weight, None, None if gate is None else grad_gate, None


norm_rows.register_autograd(backward, setup_context=save)


class _BeforeSublayer(torch.autograd.Function):
    """The input is an output too, so that both its gradients meet here, and not in a launch of their own."""

    @staticmethod
    def forward(ctx, x, weight, eps, dtype):
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return norm_rows(x, weight, eps, None, dtype), x.view_as(x)

    @staticmethod
    @first_order
    def backward(ctx, grad_y, grad_past):
        grad_x, grad_weight, _ = norm_rows_backward(grad_y, *ctx.saved_tensors, ctx.eps, None, grad_past)
        return grad_x, grad_weight, None, None


def rms_norm(x, weight, eps, gate=None, dtype=None, with_input=False):
    """`rms_norm.rms_norm` by the kernel."""
    dtype = x.dtype if dtype is None else dtype
    return _BeforeSublayer.apply(x, weight, eps, dtype) if with_input else norm_rows(x, weight, eps, gate, dtype)


# ---- what the registry asks for


TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
# what models have: the dtype of inputs, of weights and of what comes out, channels, whether there is a gate, whether
# the input goes past
PROBLEMS = [
    (torch.float32, torch.float32, torch.float32, 144, True, False),
    (torch.bfloat16, torch.float32, torch.bfloat16, 144, True, False),
    (torch.float32, torch.float32, torch.bfloat16, 144, False, False),
    (torch.float32, torch.float32, torch.bfloat16, 144, False, True),
]


def self_check_cases(device: torch.device, *problem) -> list[Case]:
    """Of one problem, as PROBLEMS lists them, or of all of these."""
    return [_case(device, *each) for each in ([problem] if problem else PROBLEMS)]


def _case(device, of_x, of_weight, of_y, C, gated, with_input) -> Case:
    """Several rows a program, the gate part of a wider tensor."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, dtype=torch.float32):
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(device, dtype)

    rows = 2 * rows_of_a_norm(C) + 1
    x, wide, weight = normal(1, rows, C, dtype=of_x), normal(1, rows, C + 16, dtype=of_x), normal(C, dtype=of_weight)
    leaves, gradients = [x, weight, *[wide] * gated], [normal(1, rows, C) for _ in range(1 + with_input)]

    def run(norm, dtype, x, weight, wide=None):
        return norm(x, weight, 1e-5, None if wide is None else wide[..., :C], dtype, with_input)

    label = f"a norm{' with a gate' * gated}{' before a sublayer' * with_input} from {of_x} to {of_y}"
    ours, twin = partial(run, rms_norm, of_y), partial(run, plain_rms_norm, None)
    tolerance = max(TOLERANCES[of_x], TOLERANCES[of_y])
    return gradient_case(label.replace("torch.", ""), ours, twin, leaves, gradients, tolerance)
