"""The configurations of the RMS norm that are shipped, with what one launch of each moves and computes."""

from ...modeling.kernel_limits import MOST_NORMED, NORM_PROGRAMS
from ...modeling.triton_rms_norm import BACKWARD, FORWARD, norm_backward_kernel, norm_kernel, tiles
from . import as_compiled

# rows of C channels: the gate is part of a wider tensor, as in the block gated; weights in float32
ROWS, C = 65536, 1536
TYPES = {"fp32": 4, "bf16": 2, "fp16": 2}


def compile_cases(target: str) -> list[dict]:
    """The configurations that are shipped for `target`; one for all GPUs. What differs little is listed for one."""
    # the dtype of x and gate, that of y, whether there is a gate, channels
    ways = [("bf16", "bf16", True, C)]
    if target == "sm_90":
        ways += [("fp32", "bf16", False, C), ("fp32", "fp32", True, C)]
        ways += [("fp16", "fp16", True, C), ("fp32", "fp32", False, 768), ("bf16", "bf16", True, MOST_NORMED)]
    cases = [case(*way) for way in ways for case in (_forward, _backward)]
    return [*cases, _backward("fp32", "bf16", False, C, past=True)]


def _forward(of_x, of_y, gated, channels) -> dict:
    moved = (1 + gated) * TYPES[of_x] + TYPES[of_y]
    return _case("forward", norm_kernel, of_x, of_y, channels, GATED=gated) | {
        "arguments": {"x": f"*{of_x}:16", "gate": f"*{of_x}:16", "weight": "*fp32:16", "y": f"*{of_y}:16"}
        | {"rows": "i32", "eps": "fp32"}
        | dict.fromkeys(("C", "row", "gate_row"), "i32:16"),
        "work": {"bytes": moved * ROWS * channels, "flops": (4 + 5 * gated) * ROWS * channels},
    }


def _backward(of_x, of_y, gated, channels, past=False) -> dict:
    """past: with the gradient of what goes past, before a sublayer."""
    moved = TYPES[of_y] + (2 * (1 + gated) + past) * TYPES[of_x]
    tensors = dict.fromkeys(("x", "past", "gate", "grad_x", "grad_gate"), f"*{of_x}:16") | {"g": f"*{of_y}:16"}
    return _case("backward", norm_backward_kernel, of_x, of_y, channels, GATED=gated, PAST=past) | {
        "arguments": tensors
        | dict.fromkeys(("weight", "grad_weight"), "*fp32:16")
        | {"rows": "i32", "eps": "fp32"}
        | dict.fromkeys(("C", "g_row", "past_row", "row", "gate_row"), "i32:16"),
        "work": {
            "bytes": (moved * ROWS + 4 * NORM_PROGRAMS) * channels,
            "flops": (10 + 11 * gated + past) * ROWS * channels,
        },
    }


def _case(way, kernel, of_x, of_y, channels, **constants) -> dict:
    options = tiles(channels, FORWARD if way == "forward" else BACKWARD)
    gated, past = " gated" * constants["GATED"], " and past" * constants.get("PAST", False)
    return {
        "name": f"rms_norm {way} {of_x} to {of_y}{gated}{'' if channels == C else f' C={channels}'}{past}",
        "kernel": kernel,
        **as_compiled(options, **constants),
        "variant": channels != C or of_x == "fp16",
    }
