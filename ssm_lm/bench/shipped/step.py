"""The configurations of the decode step that are shipped, with what one launch of each moves and computes."""

from ...modeling.triton_step import (
    mimo_blocks,
    mimo_drive_kernel,
    mimo_read_kernel,
    siso_blocks,
    siso_step_kernel,
)
from . import as_compiled


def compile_cases(arch: str) -> list[dict]:
    """The configurations that are shipped for `arch`; all of them on every GPU. The work is
    that of a token of 1024 channels, N = 64, for as many rows as the name says.
    """
    H, N = 1024, 64
    f32, aligned = "*fp32:16", "i32:16"
    cases = []
    for K, name in ((2, "diagonal"), (5, "rank 1"), (7, "rank 2")):
        for B in (1, 1024) if K == 5 else (1024,):
            blocks = siso_blocks(B, N)
            cases.append(
                {
                    "name": f"siso_step {name} N={N} B={B}",
                    "kernel": siso_step_kernel,
                    "arguments": {
                        **{"u": "*bf16:16", "state": f32, "coefficients": f32, "skip": f32, "y": "*bf16:16"},
                        **{"B": "i32", "H": aligned},
                    },
                    **as_compiled(blocks, HALF=N // 2, RANK=(K - 2) // 2, ACTIVATION="gelu"),
                    "work": {
                        "tokens": B,
                        "bytes": 4 * H * (K * N + 1) + B * H * (8 * N + 4),
                        "flops": B * H * N * (6 + 4 * (K - 2) // 2),
                    },
                }
            )
    for B in (1, 64):
        drive, read = mimo_blocks(B)
        sizes = {"B": "i32", "H": aligned}
        for name, kernel, blocks, arguments, constexprs, moved in (
            (
                "drive",
                mimo_drive_kernel,
                drive,
                {"u": "*bf16:16", "state": f32, "Lambda": f32, "weight": f32, **sizes, "HALF": aligned},
                {},
                4 * N * (H + 1) + B * (2 * H + 8 * N),
            ),
            (
                "read",
                mimo_read_kernel,
                read,
                {"state": f32, "weight": f32, "u": "*bf16:16", "skip": f32, "y": "*bf16:16", **sizes, "P": aligned},
                {"ACTIVATION": "gelu"},
                4 * H * (N + 1) + B * (4 * H + 4 * N),
            ),
        ):
            cases.append(
                {
                    "name": f"mimo_step {name} N={N} B={B}",
                    "kernel": kernel,
                    "arguments": arguments,
                    **as_compiled(blocks, **constexprs),
                    "work": {"tokens": B, "bytes": moved, "flops": 2 * B * H * N},
                }
            )
    return cases
