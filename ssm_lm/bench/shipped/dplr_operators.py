"""The configurations of the operators of S4 that are shipped, with what one launch of each moves and computes."""

from ...modeling.triton_dplr_operators import (
    STEPS,
    WARPS,
    carry_gradient_kernel,
    chain_gradient_kernel,
    operators_kernel,
)

H, N, T = 1024, 64, 64
MATRIX, VECTOR = 4 * H * N * N, 4 * H * N  # bytes: T = N, so that emit, inject and carry are alike


def compile_cases(target: str) -> list[dict]:
    """The configurations that are shipped for `target`; one for all GPUs. What holds less is listed for one."""
    ranks = (1, 2) if target == "sm_90" else (2,)
    return [case(rank) for rank in ranks for case in (_forward, _of_carry, _of_chains)]


# of a token: a product with A takes 8 N + 4 N rank operations; A^j, or a sum like it, 8 N^2


def _forward(rank) -> dict:
    tensors = ("E", "F", "G", "B", "C", "skip", "taps", "emit", "inject", "carry")
    return _case("forward", operators_kernel, rank, "operators", tensors, ("has_skip",), STEPS=STEPS) | {
        "work": {
            "bytes": (3 + 2 * rank) * VECTOR + 4 * H * (T + 1) + 3 * MATRIX,
            "flops": H * T * ((6 + 2 * rank) * N * N + (2 + rank) * (8 + 4 * rank) * N),
        }
    }


def _of_carry(rank) -> dict:
    tensors = ("E", "F", "G", "of_carry", "rows", "of_rows", "of_E", "of_F")
    return _case("gradients of the carry", carry_gradient_kernel, rank, "carry", tensors, ("head", "row")) | {
        "work": {
            "bytes": (2 + 3 * rank) * VECTOR + (1 + 2 * rank) * MATRIX,
            "flops": H * T * (6 + 15 * rank) * N * N,
        }
    }


def _of_chains(rank) -> dict:
    tensors = ("E", "F", "G", "B", "C", "emit", "inject", "rows", "of_rows", "of_taps", "of_emit", "of_inject")
    tensors += ("of_E", "of_F", "of_G", "of_B", "of_C", "of_skip")
    strides = ("emit_head", "emit_row", "inject_head", "inject_row")
    return _case("gradients of the chains", chain_gradient_kernel, rank, "chain", tensors, strides) | {
        "work": {
            # E and F's gradients are read and written
            "bytes": (7 + 5 * rank) * VECTOR + 4 * H * (T + 1) + (4 + 2 * rank) * MATRIX,
            "flops": H * T * (2 + rank) * (16 + 16 * rank) * N,
        }
    }


def _case(way, kernel, rank, warps, tensors, strides, **constants) -> dict:
    anywhere = ("of_emit", "of_inject", "of_carry")  # parts of one matrix
    return {
        "name": f"dplr_operators {way} rank {rank}",
        "kernel": kernel,
        "arguments": {name: "*fp32" if name in anywhere else "*fp32:16" for name in tensors}
        | dict.fromkeys(("T", "half", *strides), "i32"),
        "constexprs": {"RANK": rank, "HALF": N // 2, **constants},
        "options": {"num_warps": WARPS[warps], "num_stages": 1},
    }
