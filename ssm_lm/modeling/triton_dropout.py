"""Dropout on a GPU with what stands beside it in a sublayer, one launch each way. The equations stand in dropped.py.

What is dropped is kept nowhere: the backward draws it anew from the seed, by Philox as Triton has it, four elements a
draw. The seed is drawn from PyTorch's generator of the CPU, which costs no launch and no waiting: a checkpoint of a run
holds that generator's state, and activation checkpointing restores it before it computes a forward once more. Numbers
are float32 between reading and writing. No atomics: the bias's gradient is a sum a program, added up in order.
"""

from functools import partial

import torch

from .dropped import drop_activated as plain_drop_activated
from .dropped import drop_added as plain_drop_added
from .dropped import drop_gated as plain_drop_gated
from .dropped import drop_swiglu as plain_drop_swiglu
from .kernel_launch import on_device, qualified
from .kernel_limits import NORM_PROGRAMS
from .kernels_s4 import Case, gradient_case
from .triton_step import activate

try:
    import triton
    import triton.language as tl
except ImportError:  # `kernels_s4` asks for this module in a `try` of its own, and reports the cause
    raise


@triton.jit
def factors(seed, quads, threshold, scale, SHAPE: tl.constexpr):
    """0 or `scale`, of four elements in a row for every one of `quads`, which numbers them; of SHAPE."""
    a, b, c, d = tl.randint4x(seed, quads)
    bits = tl.reshape(tl.join(tl.join(a, b), tl.join(c, d)), SHAPE)
    return tl.where((bits >> 1).to(tl.int32) >= threshold, scale, 0.0)


@triton.jit
def slope(x, ACTIVATION: tl.constexpr):
    """The derivative of `activate`."""
    if ACTIVATION == "gelu":
        return 0.5 * (1 + tl.erf(x * 0.7071067811865476)) + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    elif ACTIVATION == "silu":
        part = tl.sigmoid(x)
        return part * (1 + x * (1 - part))
    else:
        return 1.0


@triton.jit
def elements(numbers, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """The first element of a program, all of them, and which of these there are. numbers: how many, over UNIT."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = start + tl.arange(0, BLOCK)
    return start, at, at < numbers.to(tl.int64) * UNIT


@triton.jit
def factors_of_elements(seed, start, threshold, scale, BLOCK: tl.constexpr):
    return factors(seed, start // 4 + tl.arange(0, BLOCK // 4), threshold, scale, (BLOCK,))


# another length compiles nothing new
@triton.jit(do_not_specialize=["numbers", "seed", "threshold"])
def activated_kernel(
    x,
    g,  # None in the forward
    residual,  # None but at the end of a sublayer
    y,
    numbers,  # over UNIT
    seed,
    threshold,
    scale,
    ACTIVATION: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y = m act(x), or g times the derivative of that, and the residual, of tensors in one order of memory.
    Grid: blocks of BLOCK.
    """
    start, at, inside = elements(numbers, UNIT, BLOCK)
    m = factors_of_elements(seed, start, threshold, scale, BLOCK)
    a = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if g is None:
        out = activate(a, ACTIVATION)
    else:
        out = tl.load(g + at, mask=inside, other=0.0).to(tl.float32) * slope(a, ACTIVATION)
    out *= m
    if residual is not None:
        out += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, out.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["numbers", "seed", "threshold"])
def swiglu_kernel(
    gate,
    up,
    g,  # None in the forward, and grad_up
    y,
    grad_up,
    numbers,  # over UNIT
    seed,
    threshold,
    scale,
    DROPS: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y = m silu(gate) up; or of g, the gradient of that, those of gate, y, and of up. Grid: blocks of BLOCK."""
    start, at, inside = elements(numbers, UNIT, BLOCK)
    a = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    part = tl.sigmoid(a)
    if g is None:
        out = a * part * b
    else:
        out = tl.load(g + at, mask=inside, other=0.0).to(tl.float32)
    if DROPS:
        out *= factors_of_elements(seed, start, threshold, scale, BLOCK)
    if g is not None:
        tl.store(grad_up + at, (out * a * part).to(grad_up.dtype.element_ty), mask=inside)
        out *= b * part * (1 + a * (1 - part))
    tl.store(y + at, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def read_gated(x, bias, r, rows, c, C):
    """Both halves of x + bias (rows, 2 C), float32."""
    inside = (r < rows)[:, None] & (c < C)[None, :]
    at = x + (r * 2 * C)[:, None] + c[None, :]
    a = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    a += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    z = tl.load(at + C, mask=inside, other=0.0).to(tl.float32)
    z += tl.load(bias + C + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    return a, z


@triton.jit
def factors_of_rows(seed, r, C, threshold, scale, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    quads = (r * ((C + 3) // 4))[:, None] + tl.arange(0, BLOCK_C // 4)[None, :]
    return factors(seed, quads, threshold, scale, (ROWS, BLOCK_C))


@triton.jit(do_not_specialize=["rows", "seed", "threshold"])
def gated_kernel(
    residual,
    x,
    bias,
    y,
    rows,
    C,
    seed,
    threshold,
    scale,
    DROPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y (rows, C) = residual + m glu(x + bias). Grid: blocks of ROWS rows."""
    r, c = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_C)
    inside = (r < rows)[:, None] & (c < C)[None, :]
    at = (r * C)[:, None] + c[None, :]
    a, z = read_gated(x, bias, r, rows, c, C)
    a *= tl.sigmoid(z)
    if DROPS:
        a *= factors_of_rows(seed, r, C, threshold, scale, ROWS, BLOCK_C)
    a += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, a.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "seed", "threshold"])
def gated_backward_kernel(
    g,
    x,
    bias,
    grad_x,
    grad_bias,
    rows,
    C,
    seed,
    threshold,
    scale,
    DROPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """grad_x (rows, 2 C) of g, the gradient of y; a program's part of grad_bias (programs, 2 C). Grid: programs, each
    of which takes every so manieth block of ROWS rows.
    """
    c = tl.arange(0, BLOCK_C)
    of_a, of_z = tl.zeros((ROWS, BLOCK_C), tl.float32), tl.zeros((ROWS, BLOCK_C), tl.float32)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        r = first + tl.arange(0, ROWS).to(tl.int64)
        inside = (r < rows)[:, None] & (c < C)[None, :]
        s = tl.load(g + (r * C)[:, None] + c[None, :], mask=inside, other=0.0).to(tl.float32)
        if DROPS:
            s *= factors_of_rows(seed, r, C, threshold, scale, ROWS, BLOCK_C)
        a, z = read_gated(x, bias, r, rows, c, C)
        part = tl.sigmoid(z)
        s *= part
        t = s * a * (1 - part)
        of_a += s
        of_z += t
        at = grad_x + (r * 2 * C)[:, None] + c[None, :]
        tl.store(at, s.to(grad_x.dtype.element_ty), mask=inside)
        tl.store(at + C, t.to(grad_x.dtype.element_ty), mask=inside)
    at = grad_bias + tl.program_id(0).to(tl.int64) * 2 * C + c
    tl.store(at, tl.sum(of_a, 0), mask=c < C)
    tl.store(at + C, tl.sum(of_z, 0), mask=c < C)


# ---- launches

BLOCK, NUMBERS = 1024, 8  # elements of a program where no element's place matters; numbers a thread


def tiles(C: int) -> dict[str, int]:
    block = max(16, triton.next_power_of_2(C))
    rows = max(1, 2048 // block)
    return {"ROWS": rows, "BLOCK_C": block, "num_warps": rows * block // (32 * NUMBERS), "num_stages": 1}


def draw_seed() -> torch.Tensor:
    """Of the CPU's generator."""
    return torch.randint(2**31 - 1, (), device="cpu")


def scalars(p: float, seed: torch.Tensor) -> tuple[int, int, float]:
    """seed, threshold and scale of `factors`."""
    return int(seed), round(p * 2**31), 1 / (1 - p)


def _dense(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy in the same order of memory without gaps."""
    if torch.empty_like(x).stride() == x.stride():
        return x
    order = sorted(range(x.dim()), key=lambda i: -x.stride(i))
    return x.permute(order).contiguous().permute([order.index(i) for i in range(x.dim())])


def _launch_activated(x, g, activation, p, seed) -> torch.Tensor:
    x = _dense(x)
    if g is not None and g.stride() != x.stride():
        g = torch.empty_like(x).copy_(g)
    y = torch.empty_like(x)
    _launch_elements(activated_kernel, (x, g, None, y), p, seed, ACTIVATION=activation)
    return y


def _launch_elements(kernel, tensors, p, seed, **options) -> None:
    """A kernel of elements, as many as the first of the tensors has."""
    numbers, device = tensors[0].numel(), tensors[0].device
    unit = 16 if numbers % 16 == 0 else 1
    options |= {"UNIT": unit, "BLOCK": BLOCK, "num_warps": BLOCK // (32 * NUMBERS)}
    if numbers:
        with on_device(device):
            kernel[triton.cdiv(numbers, BLOCK),](*tensors, numbers // unit, *scalars(p, seed), **options)


def run_activated(x: torch.Tensor, activation: str, p: float, seed: torch.Tensor) -> torch.Tensor:
    """m act(x); see `dropped.drop_activated`."""
    return _launch_activated(x, None, activation, p, seed)


def run_activated_backward(
    grad_y: torch.Tensor, x: torch.Tensor, activation: str, p: float, seed: torch.Tensor
) -> torch.Tensor:
    """The gradient of x."""
    return _launch_activated(x, grad_y, activation, p, seed)


def run_gated(
    residual: torch.Tensor, x: torch.Tensor, bias: torch.Tensor, p: float, seed: torch.Tensor
) -> torch.Tensor:
    """residual + m glu(x + bias); see `dropped.drop_gated`."""
    C = residual.shape[-1]
    y = torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)
    if y.numel():
        options, rows = tiles(C), y.numel() // C
        read = (tensor.contiguous() for tensor in (residual, x, bias))
        with on_device(x.device):
            gated_kernel[triton.cdiv(rows, options["ROWS"]),](
                *read, y, rows, C, *scalars(p, seed), DROPS=p > 0, **options
            )
    return y


def run_gated_backward(
    grad_y: torch.Tensor, x: torch.Tensor, bias: torch.Tensor, p: float, seed: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of x and bias; that of the residual is grad_y."""
    C, options = grad_y.shape[-1], tiles(grad_y.shape[-1])
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = grad_y.numel() // max(C, 1)
    programs = min(triton.cdiv(rows, options["ROWS"]), NORM_PROGRAMS)
    found = x.new_empty(programs, 2 * C, dtype=torch.float32)
    if grad_x.numel():
        read = (tensor.contiguous() for tensor in (grad_y, x, bias))
        with on_device(x.device):
            gated_backward_kernel[programs,](*read, grad_x, found, rows, C, *scalars(p, seed), DROPS=p > 0, **options)
    return grad_x, found.sum(0).to(bias.dtype)


def run_added(residual: torch.Tensor, x: torch.Tensor, p: float, seed: torch.Tensor) -> torch.Tensor:
    """residual + m x; see `dropped.drop_added`."""
    residual, x = residual.contiguous(), x.contiguous()
    y = torch.empty_like(residual)
    _launch_elements(activated_kernel, (x, None, residual, y), p, seed, ACTIVATION="identity")
    return y


def run_added_backward(grad_y: torch.Tensor, dtype: torch.dtype, p: float, seed: torch.Tensor) -> torch.Tensor:
    """The gradient of x, in its dtype; that of the residual is grad_y."""
    grad_y = grad_y.contiguous()
    grad_x = torch.empty_like(grad_y, dtype=dtype)
    _launch_elements(activated_kernel, (grad_y, None, None, grad_x), p, seed, ACTIVATION="identity")
    return grad_x


def run_swiglu(gate: torch.Tensor, up: torch.Tensor, p: float, seed: torch.Tensor) -> torch.Tensor:
    """m silu(gate) up; see `dropped.drop_swiglu`."""
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate)
    _launch_elements(swiglu_kernel, (gate, up, None, y, None), p, seed, DROPS=p > 0)
    return y


def run_swiglu_backward(
    grad_y: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, p: float, seed: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of gate and up."""
    read = [x.contiguous() for x in (gate, up, grad_y)]
    found = torch.empty_like(read[0]), torch.empty_like(read[1])
    _launch_elements(swiglu_kernel, (*read, *found), p, seed, DROPS=p > 0)
    return found


# what the compiler and autograd see
def operator(name: str, run):
    """The compiler leaves it out of the graphs that it captures, which would launch with one seed for ever."""
    return torch.library.custom_op(qualified(name), run, mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))


activated = operator("drop_activated", run_activated)
activated_backward = operator("drop_activated_backward", run_activated_backward)
gated = operator("drop_gated", run_gated)
gated_backward = operator("drop_gated_backward", run_gated_backward)
added = operator("drop_added", run_added)
added_backward = operator("drop_added_backward", run_added_backward)
swiglu = operator("drop_swiglu", run_swiglu)
swiglu_backward = operator("drop_swiglu_backward", run_swiglu_backward)


@activated.register_fake
def _(x, activation, p, seed):
    return torch.empty_like(_dense(x))


@activated_backward.register_fake
def _(grad_y, x, activation, p, seed):
    return torch.empty_like(_dense(x))


@gated.register_fake
def _(residual, x, bias, p, seed):
    return torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)


@gated_backward.register_fake
def _(grad_y, x, bias, p, seed):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty_like(bias)


@added.register_fake
def _(residual, x, p, seed):
    return torch.empty_like(residual, memory_format=torch.contiguous_format)


@added_backward.register_fake
def _(grad_y, dtype, p, seed):
    return torch.empty_like(grad_y, dtype=dtype, memory_format=torch.contiguous_format)


@swiglu.register_fake
def _(gate, up, p, seed):
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


@swiglu_backward.register_fake
def _(grad_y, gate, up, p, seed):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (gate, up))


def save_activated(ctx, inputs, output):
    """For `backward_of_activated`, by autograd."""
    x, ctx.activation, ctx.p, seed = inputs
    ctx.save_for_backward(x, seed)


def backward_of_activated(ctx, grad_y, run=activated_backward):
    """The gradients of all inputs of `activated`."""
    x, seed = ctx.saved_tensors
    return run(grad_y, x, ctx.activation, ctx.p, seed), None, None, None


def save_gated(ctx, inputs, output):
    """For `backward_of_gated`, by autograd."""
    _, x, bias, ctx.p, seed = inputs
    ctx.save_for_backward(x, bias, seed)


def backward_of_gated(ctx, grad_y, run=gated_backward):
    """The gradients of all inputs of `gated`."""
    x, bias, seed = ctx.saved_tensors
    return grad_y, *run(grad_y, x, bias, ctx.p, seed), None, None


def save_added(ctx, inputs, output):
    """For `backward_of_added`, by autograd."""
    _, x, ctx.p, seed = inputs
    ctx.dtype = x.dtype
    ctx.save_for_backward(seed)


def backward_of_added(ctx, grad_y, run=added_backward):
    """The gradients of all inputs of `added`."""
    (seed,) = ctx.saved_tensors
    return grad_y, run(grad_y, ctx.dtype, ctx.p, seed), None, None


def save_swiglu(ctx, inputs, output):
    """For `backward_of_swiglu`, by autograd."""
    gate, up, ctx.p, seed = inputs
    ctx.save_for_backward(gate, up, seed)


def backward_of_swiglu(ctx, grad_y, run=swiglu_backward):
    """The gradients of all inputs of `swiglu`."""
    gate, up, seed = ctx.saved_tensors
    return *run(grad_y, gate, up, ctx.p, seed), None, None


activated.register_autograd(backward_of_activated, setup_context=save_activated)
gated.register_autograd(backward_of_gated, setup_context=save_gated)
added.register_autograd(backward_of_added, setup_context=save_added)
swiglu.register_autograd(backward_of_swiglu, setup_context=save_swiglu)


def drop_activated(x: torch.Tensor, activation: str, p: float) -> torch.Tensor:
    """`dropped.drop_activated` by the kernel, with factors of its own; y lies in memory as x does."""
    return activated(x, activation, p, draw_seed())


def drop_gated(residual: torch.Tensor, x: torch.Tensor, bias: torch.Tensor, p: float) -> torch.Tensor:
    """`dropped.drop_gated` by the kernel, with factors of its own."""
    return gated(residual, x, bias, p, draw_seed())


def drop_added(residual: torch.Tensor, x: torch.Tensor, p: float) -> torch.Tensor:
    """`dropped.drop_added` by the kernel, with factors of its own."""
    return added(residual, x, p, draw_seed())


def drop_swiglu(gate: torch.Tensor, up: torch.Tensor, p: float) -> torch.Tensor:
    """`dropped.drop_swiglu` by the kernel, with factors of its own."""
    return swiglu(gate, up, p, draw_seed() if p else torch.zeros((), dtype=torch.int64, device="cpu"))


# ---- what the registry asks for


TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
# what models have. activated: the dtype and the activation; gated: the dtype of the residual, of what is gated,
# channels, and whether any are dropped, the bias being as the residual; added: the dtype of the residual and of what is
# added; swiglu: the dtype, and whether any are dropped
PROBLEMS = [
    ("activated", torch.float32, "gelu"),
    ("activated", torch.bfloat16, "gelu"),
    ("activated", torch.bfloat16, "silu"),
    ("gated", torch.float32, torch.float32, 144, True),
    ("gated", torch.float32, torch.bfloat16, 144, True),
    ("gated", torch.float32, torch.bfloat16, 144, False),
    ("added", torch.float32, torch.float32),
    ("added", torch.float32, torch.bfloat16),
    ("swiglu", torch.float32, True),
    ("swiglu", torch.bfloat16, True),
    ("swiglu", torch.bfloat16, False),
]
P = 0.25


def self_check_cases(device: torch.device, *problem) -> list[Case]:
    """Of one problem, as PROBLEMS lists them, or of all of these."""
    cases = {"activated": _activated_cases, "gated": _gated_cases, "added": _added_cases, "swiglu": _swiglu_cases}
    return [case for kind, *rest in ([problem] if problem else PROBLEMS) for case in cases[kind](device, *rest)]


def _normal(device):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, dtype=torch.float32):
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(device, dtype)

    return normal


def _dropped_case(label, ours, plain, leaves, ones, gradient, p) -> Case:
    """ours beside its twin, which gets the kernel's factors: they are seen in what is left of `ones`, inputs of the
    same dtypes whose outputs are no zeros, by the same machine code.
    """

    def twin(*inputs):
        return plain(*inputs, factors=(ours(*ones) != 0).double() / (1 - p) if p else None)

    tolerance = max(TOLERANCES[x.dtype] for x in leaves)
    return gradient_case(label.replace("torch.", ""), ours, twin, leaves, [gradient], tolerance)


SIZES = (3, 80, 7), (3, 5, 7)  # a multiple of 16 elements, more than a block, and another number


def _activated_cases(device, dtype, activation) -> list[Case]:
    normal, cases = _normal(device), []
    ours = partial(activated, activation=activation, p=P, seed=torch.tensor(7))
    plain = partial(plain_drop_activated, activation=activation)
    for size in SIZES:
        x, gradient = normal(*size, dtype=dtype), normal(*size)
        label = f"dropout of {x.numel()} times {activation} in {dtype}"
        cases.append(_dropped_case(label, ours, plain, [x], [torch.ones_like(x)], gradient, P))
    return cases


def _gated_cases(device, of_residual, of_x, C, drops) -> list[Case]:
    """Several rows a program."""
    normal, p = _normal(device), P if drops else 0.0
    rows = 2 * tiles(C)["ROWS"] + 1
    leaves = [
        normal(1, rows, C, dtype=of_residual),
        normal(1, rows, 2 * C, dtype=of_x),
        normal(2 * C, dtype=of_residual),
    ]
    ones = [torch.zeros_like(leaves[0]), *map(torch.ones_like, leaves[1:])]
    ours = partial(gated, p=p, seed=torch.tensor(7))
    label = f"a gated end of {of_x} on {of_residual}{', dropped' * drops}"
    return [_dropped_case(label, ours, plain_drop_gated, leaves, ones, normal(1, rows, C), p)]


def _added_cases(device, of_residual, of_x) -> list[Case]:
    normal, cases = _normal(device), []
    ours = partial(added, p=P, seed=torch.tensor(7))
    for size in SIZES:
        leaves = [normal(*size, dtype=of_residual), normal(*size, dtype=of_x)]
        ones = [torch.zeros_like(leaves[0]), torch.ones_like(leaves[1])]
        label = f"dropout of {leaves[0].numel()} numbers in {of_x} on {of_residual}"
        cases.append(_dropped_case(label, ours, plain_drop_added, leaves, ones, normal(*size), P))
    return cases


def _swiglu_cases(device, dtype, drops) -> list[Case]:
    normal, p, cases = _normal(device), P if drops else 0.0, []
    ours = partial(swiglu, p=p, seed=torch.tensor(7))
    for size in SIZES:
        leaves = [normal(*size, dtype=dtype), normal(*size, dtype=dtype)]
        label = f"swiglu of {leaves[0].numel()} numbers in {dtype}{', dropped' * drops}"
        ones = [torch.ones_like(x) for x in leaves]
        cases.append(_dropped_case(label, ours, plain_drop_swiglu, leaves, ones, normal(*size), p))
    return cases
