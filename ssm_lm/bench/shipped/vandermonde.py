"""The configurations of the Vandermonde product that are shipped, with what one launch of each moves and computes."""

from ...modeling.triton_vandermonde import (
    BACKWARD,
    BLOCK_N,
    FORWARD,
    vandermonde_backward_kernel,
    vandermonde_forward_kernel,
)


def compile_cases(target: str) -> list[dict]:
    """The configurations that are shipped for `target`."""
    H, half, L = 1024, 32, 8192  # of the roofline's shape

    def shipped(rows, columns, warps):
        # a tile of rows * columns taps takes rows + columns powers of a pole, 40 operations each
        return {
            "constexprs": {"ROWS": rows, "COLUMNS": columns, "BLOCK": BLOCK_N},
            "options": {"num_warps": warps, "num_stages": 1},
        }, 40 * (rows + columns) / (rows * columns)

    forward, forward_powers = shipped(*FORWARD)
    backward, backward_powers = shipped(*BACKWARD)
    coefficients = {"log_re": "*fp32:16", "phase": "*i64:16"}
    values = dict.fromkeys(("v_re", "v_im"), "*fp32:16")
    return [
        forward
        | {
            "name": "vandermonde_forward",
            "kernel": vandermonde_forward_kernel,
            "arguments": values | coefficients | {"out": "*fp32:16", "L": "i32:16", "HALF": "i32:16"},
            "work": {"bytes": 4 * H * L + 20 * H * half, "flops": int(H * L * half * (4 + forward_powers))},
        },
        backward
        | {
            "name": "vandermonde_backward",
            "kernel": vandermonde_backward_kernel,
            "arguments": {"grad": "*fp32:16", "sums": "*fp32:16"}
            | coefficients
            | {"L": "i32:16", "H": "i32:16", "HALF": "i32:16", "splits": "i32"},
            # every block of poles reads the gradient
            "work": {
                "bytes": 4 * H * L * half // BLOCK_N + 28 * H * half,
                "flops": int(H * L * half * (8 + backward_powers)),
            },
        },
    ]
