"""The layer norm before a residual connection, on a GPU: one launch forward, with the cast that follows it; one back,
and a sum, with the gradient of what goes past. The equation stands in layer_norm.py.

PyTorch takes two launches forward under autocast and four back: the cast, the norm, its parameters and the sum of the
two gradients, each over all tokens. A program holds whole rows, and what the backward needs of the norm it makes anew.
The parameters' gradients are sums a program over the rows that it takes, and those are added up in a fixed order, no
atomics. Everything is float32 between reading and writing.

Turned, y is written as the chunk scan reads it, (C, rows), and its gradient is read so: a program then holds 16 rows,
of which a channel's are 32 bytes in bfloat16, what memory moves at least. That saves the scan a launch each way, and 4
bytes a number.
"""

from functools import partial

import torch

from .first_order import first_order
from .kernel_launch import on_device, qualified
from .kernel_limits import programs_of_a_norm, rows_of_a_norm
from .kernels_s4 import Case, gradient_case
from .layer_norm import layer_norm as plain_layer_norm

try:
    import triton
    import triton.language as tl
except ImportError:  # `kernels_s4` asks for this module in a `try` of its own, and reports the cause
    raise


@triton.jit
def normed(x, at, inside, c, C, eps):
    """(x - mean) / deviation of whole rows, 0 beyond their channels, and 1 / deviation (rows, 1)."""
    a = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    a = tl.where((c < C)[None, :], a - (tl.sum(a, 1) / C)[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(a * a, 1) / C + eps)[:, None]
    return a * scale, scale


# another batch or length compiles nothing new
@triton.jit(do_not_specialize=["rows"])
def layer_norm_kernel(
    x, weight, bias, y, rows, C, eps, TURNED: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr
):
    """y (rows, C) of x, or TURNED, (C, rows), rows a multiple of ROWS. Grid: blocks of ROWS rows."""
    r, c = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_C)
    at = (r * C)[:, None] + c[None, :]
    of_y = at
    if TURNED:
        rows = rows // ROWS * ROWS  # which tells the compiler that vectors can be read
        of_y = (c.to(tl.int64) * rows)[None, :] + r[:, None]
    inside = (r < rows)[:, None] & (c < C)[None, :]
    a, _ = normed(x, at, inside, c, C, eps)
    w = tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)
    b = tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)
    tl.store(y + of_y, (a * w[None, :] + b[None, :]).to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def layer_norm_backward_kernel(
    g,
    past,
    x,
    weight,
    grad_x,
    grad_parameters,
    rows,
    C,
    eps,
    TURNED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """grad_x (rows, C): `past`, the gradient of what goes past, and what g, that of y, sends through the norm; a
    program's part of grad_parameters (programs, 2, C), of weight and bias. Grid: programs, each of which takes every so
    manieth block of ROWS rows.
    """
    # turned, a block's first part brings the sectors of g that its second one finds in the cache: 16 rows at once leave
    # the registers, as their sums would
    PART: tl.constexpr = ROWS // 2 if TURNED else ROWS
    c = tl.arange(0, BLOCK_C)
    w = tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    if TURNED:
        rows = rows // ROWS * ROWS
        of_weight, of_bias = tl.zeros((BLOCK_C,), tl.float32), tl.zeros((BLOCK_C,), tl.float32)
    else:
        of_weight, of_bias = tl.zeros((ROWS, BLOCK_C), tl.float32), tl.zeros((ROWS, BLOCK_C), tl.float32)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        for part in range(0, ROWS, PART):
            r = first + part + tl.arange(0, PART).to(tl.int64)
            at = (r * C)[:, None] + c[None, :]
            of_g = at
            if TURNED:
                of_g = (c.to(tl.int64) * rows)[None, :] + r[:, None]
            inside = (r < rows)[:, None] & (c < C)[None, :]
            a, scale = normed(x, at, inside, c, C, eps)
            s = tl.load(g + of_g, mask=inside, other=0.0).to(tl.float32)
            if TURNED:
                of_weight += tl.sum(s * a, 0)
                of_bias += tl.sum(s, 0)
            else:
                of_weight += s * a
                of_bias += s
            s *= w
            s = (s - (tl.sum(s, 1) / C)[:, None] - a * (tl.sum(s * a, 1) / C)[:, None]) * scale
            s += tl.load(past + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(grad_x + at, s.to(grad_x.dtype.element_ty), mask=inside)
    at = grad_parameters + tl.program_id(0).to(tl.int64) * 2 * C + c
    if not TURNED:
        of_weight, of_bias = tl.sum(of_weight, 0), tl.sum(of_bias, 0)
    tl.store(at, of_weight, mask=c < C)
    tl.store(at + C, of_bias, mask=c < C)


# ---- launches


NUMBERS = {False: 8, True: 32}  # a thread; turned, where a program holds more of them


def tiles(C: int, turned: bool = False) -> dict[str, int]:
    block, rows = triton.next_power_of_2(C), rows_of_a_norm(C, turned)
    warps = max(1, rows * block // (32 * NUMBERS[turned]))
    return {"TURNED": turned, "ROWS": rows, "BLOCK_C": block, "num_warps": warps, "num_stages": 1}


def run_forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, dtype: torch.dtype, turned: bool
) -> torch.Tensor:
    """y of `layer_norm.layer_norm`; turned, (C, ...) for x (..., C)."""
    C = x.shape[-1]
    y = torch.empty((C, *x.shape[:-1]) if turned else x.shape, dtype=dtype, device=x.device)
    if y.numel():
        options, rows = tiles(C, turned), y.numel() // C
        with on_device(x.device):
            layer_norm_kernel[triton.cdiv(rows, options["ROWS"]),](
                x.contiguous(), weight.contiguous(), bias.contiguous(), y, rows, C, eps, **options
            )
    return y


def run_backward(
    grad_y: torch.Tensor, grad_past: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float, turned: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of x and of both parameters (2, C), in their dtypes; grad_y lies as y of `run_forward` does."""
    C = x.shape[-1]
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = grad_x.numel() // max(C, 1)
    programs = programs_of_a_norm(rows, C, turned)
    found = x.new_empty(programs, 2, C, dtype=torch.float32)
    if grad_x.numel():
        read = (tensor.contiguous() for tensor in (grad_y, grad_past, x, weight))
        with on_device(x.device):
            layer_norm_backward_kernel[programs,](*read, grad_x, found, rows, C, eps, **tiles(C, turned))
    return grad_x, found.sum(0).to(weight.dtype)


# what the compiler sees
norm_rows = torch.library.custom_op(qualified("layer_norm"), run_forward, mutates_args=())
norm_rows_backward = torch.library.custom_op(qualified("layer_norm_backward"), run_backward, mutates_args=())


@norm_rows.register_fake
def _(x, weight, bias, eps, dtype, turned):
    return torch.empty((x.shape[-1], *x.shape[:-1]) if turned else x.shape, dtype=dtype, device=x.device)


@norm_rows_backward.register_fake
def _(grad_y, grad_past, x, weight, eps, turned):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), weight.new_empty(2, len(weight))


class _LayerNorm(torch.autograd.Function):
    """The input is an output too, so that both its gradients meet here, and not in a launch of their own."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps, dtype, turned):
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.turned = eps, turned
        y = norm_rows(x, weight, bias, eps, dtype, turned)
        return y.movedim(0, -1) if turned else y, x.view_as(x)

    @staticmethod
    @first_order
    def backward(ctx, grad_y, grad_past):
        grad_y = grad_y.movedim(-1, 0) if ctx.turned else grad_y
        grad_x, of_parameters = norm_rows_backward(grad_y, grad_past, *ctx.saved_tensors, ctx.eps, ctx.turned)
        return grad_x, *of_parameters, None, None, None


def layer_norm(x, weight, bias, eps, dtype=None, turned=False) -> tuple[torch.Tensor, torch.Tensor]:
    """`layer_norm.layer_norm` by the kernel. turned: y (..., C) is a view of (C, ...), and its gradient may be one."""
    return _LayerNorm.apply(x, weight, bias, eps, x.dtype if dtype is None else dtype, turned)


# ---- what the registry asks for


TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
# what models have: the dtype of inputs, of parameters and of what comes out, channels, whether it is turned
PROBLEMS = [
    (torch.float32, torch.float32, torch.float32, 144, False),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16, 144, False),
    (torch.float32, torch.float32, torch.bfloat16, 144, False),
    (torch.float32, torch.float32, torch.bfloat16, 144, True),
]


def self_check_cases(device: torch.device, *problem) -> list[Case]:
    """Of one problem, as PROBLEMS lists them, or of all of these."""
    return [_case(device, *each) for each in ([problem] if problem else PROBLEMS)]


def _case(device, of_x, of_weight, of_y, C, turned=False) -> Case:
    """Several rows a program, of a mean that is none of 0."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, dtype=torch.float32):
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(device, dtype)

    rows = 2 * rows_of_a_norm(C, turned) + (0 if turned else 1)
    leaves = [2 + normal(1, rows, C, dtype=of_x), normal(C, dtype=of_weight), normal(C, dtype=of_weight)]
    gradients = [normal(1, rows, C), normal(1, rows, C)]

    def run(norm, x, weight, bias):
        return norm(x, weight, bias, 1e-5)

    label = f"a layer norm from {of_x} to {of_y}{', turned' if turned else ''}".replace("torch.", "")
    ours, twin = partial(run, partial(layer_norm, dtype=of_y, turned=turned)), partial(run, plain_layer_norm)
    return gradient_case(label, ours, twin, leaves, gradients, max(TOLERANCES[of_x], TOLERANCES[of_y]))
