"""The configurations of S4's discretisation that are shipped, with what one launch of each moves and computes."""

from ...modeling.triton_dplr_discretization import bilinear_gradient_kernel, bilinear_kernel

H, N = 1024, 64  # a system a channel
VECTOR = 4 * H * N  # bytes

PARAMETERS = "log_dt", "Lambda_log_re", "Lambda_im", "P", "B"


def compile_cases(target: str) -> list[dict]:
    """The configurations that are shipped for `target`; one for all GPUs. What holds less is listed for one."""
    return [case(rank) for rank in ((1, 2) if target == "sm_90" else (2,)) for case in (_forward, _backward)]


def _forward(rank) -> dict:
    tensors = (*PARAMETERS, "C", "E", "F", "G", "B_bar", "C_row")
    return _case("forward", bilinear_kernel, rank, tensors) | {
        "work": {"bytes": 4 * H + (6 + 3 * rank) * VECTOR, "flops": H * N * (16 + 14 * rank + 4 * rank**2)}
    }


def _backward(rank) -> dict:
    """What the forward made is made anew."""
    tensors = *PARAMETERS, "of_E", "of_F", "of_G", "of_B_bar", "of_C_row"
    tensors += "of_log_dt", "of_log_re", "of_im", "of_P", "of_B", "of_C"
    return _case("backward", bilinear_gradient_kernel, rank, tensors, "half_row", "row", "of_second") | {
        "work": {"bytes": 8 * H + (8 + 4 * rank) * VECTOR, "flops": H * N * (40 + 60 * rank + 12 * rank**2)}
    }


def _case(way, kernel, rank, tensors, *strides) -> dict:
    return {
        "name": f"dplr_discretization {way} rank {rank}",
        "kernel": kernel,
        "arguments": dict.fromkeys(tensors, "*fp32:16") | dict.fromkeys(("S", "half", *strides), "i32"),
        "constexprs": {"RANK": rank, "HALF": N // 2},
        "options": {"num_warps": 1},
    }
