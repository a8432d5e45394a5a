"""The configurations of the short convolution that are shipped, with what one launch of each moves and computes."""

from ...modeling.kernel_limits import MOST_TAPS, convolved_tokens
from ...modeling.triton_short_convolution import TILES, convolve_backward_kernel, convolve_kernel
from . import as_compiled

# B rows of L tokens, C channels that are part of a wider tensor, as in the block gated; weights in float32
B, L, C, K = 8, 8192, 1024, MOST_TAPS
ELEMENTS, SUMS = B * L * C, B * convolved_tokens(B, L, C)[1] * C * (K + 1)
SIZES = dict.fromkeys(("L", "T"), "i32") | dict.fromkeys(("C", "row"), "i32:16")
TYPES = {"fp32": 4, "bf16": 2, "fp16": 2}


def compile_cases(target: str) -> list[dict]:
    """The configurations that are shipped for `target`; one for all GPUs. What differs little is listed for one."""
    ways = [("bf16", "silu"), ("bf16", "silu", "documents")]
    if target == "sm_90":
        ways += [("fp32", "silu"), ("bf16", "identity"), ("fp16", "silu")]
    return [case(*way) for way in ways for case in (_forward, _backward)]


def _forward(kind, activation, documents="") -> dict:
    return _case("forward", convolve_kernel, kind, activation, documents) | {
        "arguments": _inputs(kind, documents)
        | {"y": f"*{kind}:16", "tail": "*fp32:16", "has_initial": "i32", "has_tail": "i32"},
        "work": {"bytes": 2 * TYPES[kind] * ELEMENTS, "flops": (2 * K + (4 if activation == "silu" else 0)) * ELEMENTS},
    }


def _backward(kind, activation, documents="") -> dict:
    """With an activation, the output before it is made anew."""
    tensors = {"g": f"*{kind}:16", "grad_u": f"*{kind}:16"}
    tensors |= dict.fromkeys(("grad_tail", "grad_weight", "grad_bias", "grad_initial"), "*fp32:16")
    sizes = {"g_row": "i32:16", "has_initial": "i32", "has_grad_tail": "i32"}
    return _case("backward", convolve_backward_kernel, kind, activation, documents) | {
        "arguments": _inputs(kind, documents) | tensors | sizes,
        "work": {
            "bytes": 3 * TYPES[kind] * ELEMENTS + 4 * SUMS,
            "flops": (4 * K + (2 * K + 8 if activation == "silu" else 0)) * ELEMENTS,
        },
    }


def _inputs(kind, documents) -> dict:
    of_documents = {"begins": "*u8:16", "seq_idx": "*i64:16"} if documents else {}
    return {"u": f"*{kind}:16"} | dict.fromkeys(("weight", "bias", "initial"), "*fp32:16") | of_documents | SIZES


def _case(way, kernel, kind, activation, documents) -> dict:
    absent = {} if documents else {"begins": None, "seq_idx": None}
    return {
        "name": f"short_convolution {way} {activation} {kind}{' ' * bool(documents)}{documents}",
        "kernel": kernel,
        **as_compiled(TILES, K=K, ACTIVATION=activation, RESETS=bool(documents), **absent),
        "variant": bool(documents) or kind == "fp16" or activation == "identity",
    }
