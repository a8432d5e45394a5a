"""The configurations of the layer norm that are shipped, with what one launch of each moves and computes."""

from ...modeling.kernel_limits import NORM_PROGRAMS
from ...modeling.triton_layer_norm import layer_norm_backward_kernel, layer_norm_kernel, tiles
from . import as_compiled

# rows of C channels in float32, to bfloat16: as under autocast
ROWS, C = 65536, 1024


def compile_cases(target: str) -> list[dict]:
    """The configurations that are shipped for `target`; one for all GPUs. What holds less is listed for one."""
    tensors = {"x": "*fp32:16", "y": "*bf16:16"}
    back = {"x": "*fp32:16", "g": "*bf16:16"} | dict.fromkeys(("past", "grad_x", "grad_parameters"), "*fp32:16")
    forth = tensors | {"bias": "*fp32:16"}
    moved = 6 * ROWS * C, (14 * ROWS + 8 * NORM_PROGRAMS) * C
    cases = [
        _case("turned forward", layer_norm_kernel, forth, moved[0], 9),
        _case("turned backward", layer_norm_backward_kernel, back, moved[1], 18),
        _case("backward", layer_norm_backward_kernel, back, moved[1], 18),
        _case("forward", layer_norm_kernel, forth, moved[0], 9),
    ]
    return cases if target == "sm_90" else cases[:3]


def _case(way, kernel, tensors, moved, operations) -> dict:
    options = tiles(C, way.startswith("turned"))
    return {
        "name": f"layer_norm {way} fp32 to bf16",
        "kernel": kernel,
        "arguments": tensors | {"weight": "*fp32:16", "rows": "i32", "C": "i32:16", "eps": "fp32"},
        **as_compiled(options),
        "work": {"bytes": moved, "flops": operations * ROWS * C},
    }
