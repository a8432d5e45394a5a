"""The configurations of S5's scan that are shipped, with what one launch of each moves and computes."""

from ...modeling.kernel_limits import s5_chunk_length
from ...modeling.triton_s5_scan import (
    CARRY_UNROLL,
    carry_kernel,
    emit_kernel,
    emit_reverse_kernel,
    ends_kernel,
    state_blocks,
)


def compile_cases(arch: str) -> list[dict]:
    """The configurations that are shipped for `arch`; one for all GPUs. The work is that of
    B = 8, L = 8192, P = 1024 in float32, with documents.
    """
    B, L, P = 8, 8192, 1024
    blocks = state_blocks(P // 2)
    options = {key: blocks.pop(key) for key in ("num_warps", "num_stages")}
    elements, carried = B * L * P, B * L * P // s5_chunk_length(L)
    f32 = "*fp32:16"
    sizes = {"L": "i32", "T": "i32:16", "chunks": "i32", "HALF": "i32:16"}
    cases = []

    # a number: half a complex product and sum; in reverse also its part of the gradient of Lambda
    operations = {ends_kernel: 4 * elements, carry_kernel: 4 * carried, emit_kernel: 4 * elements}
    operations[emit_reverse_kernel] = 8 * elements

    def add(name, kernel, tensors, numbers, moved, **switches):
        cases.append(
            {
                "name": f"s5_scan {name}",
                "kernel": kernel,
                "arguments": {**tensors, **numbers},
                "constexprs": {"RESETS": True, **blocks, **switches},
                "options": options,
                "work": {"bytes": 4 * moved, "flops": operations[kernel]},
            }
        )

    for reverse in (False, True):
        name, switches = "reverse" if reverse else "forward", {"REVERSE": reverse, "INITIAL": True}
        tensors = {"u": f32, "Lambda": f32, "begins": "*u8:16", "initial": f32, "ends": f32, "kept": f32}
        add(f"ends {name}", ends_kernel, tensors, sizes, elements + carried, **switches)
    tensors = {"ends": f32, "kept": f32, "power": f32, "initial": f32}
    sizes_of_carry = {"chunks": "i32", "HALF": "i32:16"}
    add("carry", carry_kernel, tensors, sizes_of_carry, 2 * carried, **switches, UNROLL=CARRY_UNROLL)
    tensors = {"u": f32, "Lambda": f32, "begins": "*u8:16", "starts": f32, "x": f32, "final": f32}
    add("emit forward", emit_kernel, tensors, sizes, 2 * elements + carried)
    tensors = {"g": f32, "x": f32, "Lambda": f32, "begins": "*u8:16", "starts": f32, "grad_u": f32}
    tensors |= {"grad_Lambda": f32, "grad_initial": f32}
    add("emit reverse", emit_reverse_kernel, tensors, sizes, 3 * elements + 2 * carried)
    return cases
