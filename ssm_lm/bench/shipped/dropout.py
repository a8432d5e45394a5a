"""The configurations of dropout in a sublayer that are shipped, with what one launch of each moves and computes."""

from ...modeling.kernel_limits import NORM_PROGRAMS
from ...modeling.triton_dropout import (
    BLOCK,
    NUMBERS,
    activated_kernel,
    gated_backward_kernel,
    gated_kernel,
    tiles,
)

# rows of C channels in bfloat16, under autocast, beside a residual in float32
ROWS, C = 65536, 1024
DRAWN = 25  # operations an element: ten rounds of Philox for four
SCALARS = {"seed": "i32", "threshold": "i32", "scale": "fp32"}


def compile_cases(target: str) -> list[dict]:
    """The configurations that are shipped for `target`; one for all GPUs. What differs little is listed for one."""
    cases = [_gated("backward"), _gated("forward"), _activated("backward"), _activated("forward")]
    return cases if target == "sm_90" else cases[:1]


def _activated(way) -> dict:
    backward = way == "backward"
    tensors = dict.fromkeys(("x", "g", "y") if backward else ("x", "y"), "*bf16:16")
    return {
        "name": f"dropout activated {way} gelu bf16",
        "kernel": activated_kernel,
        "arguments": tensors | {"numbers": "i32"} | SCALARS,
        "constexprs": {"ACTIVATION": "gelu", "UNIT": 16, "BLOCK": BLOCK} | ({} if backward else {"g": None}),
        "options": {"num_warps": BLOCK // (32 * NUMBERS)},
        "work": {"bytes": (6 if backward else 4) * ROWS * C, "flops": (DRAWN + (30 if backward else 20)) * ROWS * C},
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
        "constexprs": {"DROPS": True, **{key: value for key, value in options.items() if key.isupper()}},
        "options": {key: value for key, value in options.items() if key.islower()},
        "work": {"bytes": moved * C, "flops": (DRAWN + (15 if backward else 9)) * ROWS * C},
    }
