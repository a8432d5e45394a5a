"""The configurations of dropout in a sublayer that are shipped, with what one launch of each moves and computes."""

from ...modeling.kernel_limits import NORM_PROGRAMS
from ...modeling.triton_dropout import (
    BLOCK,
    NUMBERS,
    activated_kernel,
    gated_backward_kernel,
    gated_kernel,
    swiglu_kernel,
    tiles,
)
from . import as_compiled

# rows of C channels in bfloat16, under autocast, beside a residual in float32
ROWS, C = 65536, 1024
DRAWN = 25  # operations an element: ten rounds of Philox for four
SCALARS = {"seed": "i32", "threshold": "i32", "scale": "fp32"}


def compile_cases(target: str) -> list[dict]:
    """The configurations that are shipped for `target`; one for all GPUs. What differs little is listed for one."""
    kinds = _gated, _activated, _added, _swiglu
    cases = [kind(way) for kind in kinds for way in ("backward", "forward")]
    return cases if target == "sm_90" else cases[:1]


def _activated(way) -> dict:
    tensors = dict.fromkeys(("x", "g", "y") if way == "backward" else ("x", "y"), "*bf16:16")
    moved, flops = (6, 30) if way == "backward" else (4, 20)
    return _of_elements(f"activated {way} gelu bf16", activated_kernel, tensors, moved, flops, ACTIVATION="gelu")


def _added(way) -> dict:
    """The backward is that of no activation, with a gradient in float32."""
    if way == "backward":
        tensors, moved = {"x": "*fp32:16", "y": "*bf16:16"}, 6
    else:
        tensors, moved = {"x": "*bf16:16", "residual": "*fp32:16", "y": "*fp32:16"}, 10
    return _of_elements(f"added {way} bf16 on fp32", activated_kernel, tensors, moved, 2, ACTIVATION="identity")


def _swiglu(way) -> dict:
    read, moved, flops = (("g", "grad_up"), 10, 15) if way == "backward" else ((), 6, 8)
    tensors = dict.fromkeys(("gate", "up", *read, "y"), "*bf16:16")
    return _of_elements(f"swiglu {way} bf16", swiglu_kernel, tensors, moved, flops, DROPS=True)


def _of_elements(name, kernel, tensors, moved, flops, **constants) -> dict:
    absent = dict.fromkeys({"g", "residual", "grad_up"} & set(kernel.arg_names) - set(tensors))
    return {
        "name": f"dropout {name}",
        "kernel": kernel,
        "arguments": tensors | {"numbers": "i32"} | SCALARS,
        "constexprs": {**constants, "UNIT": 16, "BLOCK": BLOCK, **absent},
        "options": {"num_warps": BLOCK // (32 * NUMBERS)},
        "work": {"bytes": moved * ROWS * C, "flops": (DRAWN + flops) * ROWS * C},
    }


def _gated(way) -> dict:
    backward = way == "backward"
    tensors = {"x": "*bf16:16", "bias": "*fp32:16"}
    tensors |= (
        {"g": "*fp32:16", "grad_x": "*bf16:16", "grad_bias": "*fp32:16"}
        if backward
        else {"residual": "*fp32:16", "y": "*fp32:16"}
    )
    moved = 12 * ROWS + (8 * NORM_PROGRAMS if backward else 0)
    options = tiles(C)
    return {
        "name": f"dropout gated {way} bf16 on fp32",
        "kernel": gated_backward_kernel if backward else gated_kernel,
        "arguments": tensors | {"rows": "i32", "C": "i32:16"} | SCALARS,
        **as_compiled(options, DROPS=True),
        "work": {"bytes": moved * C, "flops": (DRAWN + (15 if backward else 9)) * ROWS * C},
    }
