"""The configurations of S5's scan that are shipped, with what one launch of each moves and computes."""

from ...modeling.kernel_limits import s5_chunk_length
from ...modeling.triton_s5_scan import (
    CARRY_UNROLL,
    carry_kernel,
    emit_kernel,
    emit_reverse_kernel,
    ends_kernel,
    powers_kernel,
    state_blocks,
    token_blocks,
)
from . import as_compiled

B, L, P = 8, 8192, 1024
ELEMENTS, CARRIED = B * L * P, B * L * P // s5_chunk_length(L)
F32 = "*fp32:16"

TYPES = {"fp32": 4, "bf16": 2}


def compile_cases(arch: str) -> list[dict]:
    """The configurations that are shipped for `arch`; one for all GPUs, of signals in float32 and in bfloat16. The work
    is that of B = 8, L = 8192, P = 1024, with documents.
    """
    ways = _ends, _emit, _emit_reverse
    return [case for way in ways for kind in TYPES for case in way(kind)] + [_carry(), _powers()]


def _ends(kind) -> list[dict]:
    tensors = {"u": f"*{kind}:16", "Lambda": F32, "begins": "*u8:16", "initial": F32, "ends": F32, "kept": F32}
    moved = ELEMENTS * TYPES[kind] + 4 * CARRIED
    ways = {"forward": False, "reverse": True}
    return [
        _case(f"ends {way}", kind, ends_kernel, tensors, moved, 4 * ELEMENTS, REVERSE=reverse, INITIAL=True)
        for way, reverse in ways.items()
    ]


def _carry() -> dict:
    tensors = {"ends": F32, "kept": F32, "power": F32, "initial": F32}
    switches = {"REVERSE": True, "INITIAL": True, "UNROLL": CARRY_UNROLL}
    return _case("carry", "fp32", carry_kernel, tensors, 8 * CARRIED, 4 * CARRIED, over_chunks=False, **switches)


def _powers() -> dict:
    return {
        "name": "s5_scan powers",
        "kernel": powers_kernel,
        "arguments": {"log_re": "*fp64:16", "log_im": "*fp64:16", "powers": F32, "T": "i32", "HALF": "i32"},
        **as_compiled(state_blocks(P // 2)),
        "work": {"bytes": 16 * P, "flops": 60 * P},
    }


def _emit(kind) -> list[dict]:
    signal = f"*{kind}:16"
    tensors = {"u": signal, "Lambda": F32, "begins": "*u8:16", "starts": F32, "x": signal, "final": F32}
    return [_case("emit forward", kind, emit_kernel, tensors, 2 * ELEMENTS * TYPES[kind] + 4 * CARRIED, 4 * ELEMENTS)]


def _emit_reverse(kind) -> list[dict]:
    tensors = {"g": f"*{kind}:16", "x": f"*{kind}:16", "Lambda": F32, "begins": "*u8:16", "starts": F32}
    tensors |= {"grad_u": f"*{kind}:16", "grad_Lambda": F32, "grad_initial": F32}
    moved = 3 * ELEMENTS * TYPES[kind] + 8 * CARRIED
    return [_case("emit reverse", kind, emit_reverse_kernel, tensors, moved, 8 * ELEMENTS)]


def _case(name, kind, kernel, tensors, moved, flops, over_chunks=True, **switches) -> dict:
    """flops: of a number half a complex product and sum; in reverse also its part of the gradient of Lambda."""
    numbers = {"chunks": "i32", "HALF": "i32:16"}
    return {
        "name": f"s5_scan {name}{'' if kind == 'fp32' else ' ' + kind}",
        "kernel": kernel,
        "arguments": tensors | ({"L": "i32", "T": "i32:16"} if over_chunks else {}) | numbers,
        **as_compiled(token_blocks(P // 2) | switches, RESETS=True),
        "work": {"bytes": moved, "flops": flops},
    }
