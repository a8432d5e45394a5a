"""The configurations of SSD's scan that are shipped, with what one launch of each moves and computes."""

import torch

from ...modeling.kernel_limits import LONGEST_SSD_CHUNK, limit_of_ssd_scan
from ...modeling.triton_ssd_scan import (
    CARRY_CHANNELS,
    CHANNELS,
    PRECISION,
    block,
    carry_kernel,
    emit_kernel,
    ends_kernel,
    gradient_kernel,
    options,
)

SIZES = {"L": "i32", "T": "i32:16", "chunks": "i32", "E": "i32:16", "P": "i32:16", "M": "i32:16"}


def compile_cases(arch: str) -> list[dict]:
    """The configurations that are shipped for `arch`. The work is that of B = 8, L = 8192, 16 heads of 64 channels, 64
    states, in float32, with documents.
    """
    if limit_of_ssd_scan(arch, torch.float32, 64):
        return []
    B, L, E, P, N, T = 8, 8192, 16, 64, 64, LONGEST_SSD_CHUNK
    elements, vectors, states = B * L * E * P, B * L * N, B * L // T * E * P * N
    f32, numbers = "*fp32:16", "*i32:16"
    cases = []

    def add(name, kernel, tensors, moved, products, tiles):
        tensors = dict.fromkeys(tensors.split(), f32) | {"numbers": numbers}
        work = {"bytes": 4 * moved, "flops": 8 * states if kernel is carry_kernel else 0}
        if products:  # multiplications and additions of matrix products, a token and head
            work["flops"] = 2 * products * B * L * E
        cases.append(
            {
                "name": f"ssd_scan {name}",
                "kernel": kernel,
                "arguments": tensors | SIZES,
                "constexprs": {"RESETS": True, "SHARED": True, **tiles},
                "options": options(kernel),
                "work": work,
            }
        )

    tiles = {"BLOCK_T": block(T), "BLOCK_P": CHANNELS, "BLOCK_M": block(N // 2), "PRECISION": PRECISION}
    ends = "v b cos sin decay step ends"
    for name, reverse in (("forward", False), ("reverse", True)):
        add(f"ends {name}", ends_kernel, ends, elements + vectors + states, P * N, {"REVERSE": reverse, **tiles})
        of_carry = {"REVERSE": reverse, "INITIAL": True, "BLOCK_P": CARRY_CHANNELS, "BLOCK_M": block(N // 2)}
        add(f"carry {name}", carry_kernel, "ends initial final cos sin decay", 2 * states, 0, of_carry)
    emit = "v b c cos sin decay step starts y"
    add("emit", emit_kernel, emit, 2 * elements + 2 * vectors + states, P * N + T * (N + P), tiles)
    gradient = "g v b c cos sin decay step starts asked grad_v grad_b grad_c grad_decay grad_step grad_turn"
    moved = 3 * elements + 2 * vectors + 2 * states + 2 * E * vectors
    add("gradient", gradient_kernel, gradient, moved, 3 * P * N + T * (3 * N + 2 * P), tiles)
    return cases
