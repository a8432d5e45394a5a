"""The configurations of SSD's decode step that are shipped, with what one launch of each moves and computes."""

from ...modeling.triton_ssd_step import ssd_blocks, ssd_step_kernel
from . import as_compiled

# a token of the 125M config for each of ROWS rows: 24 heads of 64 channels and states
ROWS, E, P, N = 32, 24, 64, 64


def compile_cases(target: str) -> list[dict]:
    """The configurations that are shipped for `target`; all of them on every GPU. Steps of the tokens' own, which add
    an exponential and a turn, are listed for one.
    """
    return [_case(selective) for selective in (False, True) if not selective or target == "sm_90"]


def _case(selective: bool) -> dict:
    blocks, width = ssd_blocks(P, N), E * P + 2 * N + E * selective
    tensors = {"x": "*bf16:16", "y": "*bf16:16"} | dict.fromkeys(
        ("state", "transition", "steps", "norms", "skip"), "*fp32:16"
    )
    return {
        "name": f"ssd_step {'selective' if selective else 'constant'} bf16 P={P} N={N}",
        "kernel": ssd_step_kernel,
        "arguments": tensors | {"B": "i32", "E": "i32", "P": "i32:16", "eps": "fp32"},
        **as_compiled(blocks, HALF=N // 2, SELECTIVE=selective, ACTIVATION="identity"),
        "work": {
            "tokens": ROWS,
            "bytes": 4 * (E * (N + 1) + 4 * N + E * P) + ROWS * (2 * width + 2 * E * P + 8 * E * P * N),
            "flops": ROWS * E * P * N * 7,
        },
    }
