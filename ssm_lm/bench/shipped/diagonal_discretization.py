"""The configurations of S4D's discretisation that are shipped, with what one launch of each moves and computes."""

from ...modeling.triton_diagonal_discretization import zoh_gradient_kernel, zoh_kernel
from ...modeling.triton_dplr_discretization import over_channels
from . import as_compiled

H = 1024  # a system a channel

PARAMETERS = "log_dt", "Lambda_log_re", "Lambda_im", "B", "C"
SYSTEM = {"log_re": "*fp64:16", "log_im": "*fp64:16", "CB_re": "*fp32:16", "CB_im": "*fp32:16"}


def compile_cases(target: str) -> list[dict]:
    """The configurations that are shipped for `target`, of twice 64 states and, listed for one, of 64; one for all."""
    return [case(N) for N in ((64, 128) if target == "sm_90" else (128,)) for case in (_forward, _backward)]


def _bytes(N) -> tuple[int, int]:
    """Of the parameters; of log Lambda_bar in float64 and C B_bar."""
    return 4 * H * (1 + 3 * N), 12 * H * N


def _forward(N) -> dict:
    return _case("forward", zoh_kernel, N, SYSTEM) | {"work": {"bytes": sum(_bytes(N)), "flops": 70 * H * N}}


def _backward(N) -> dict:
    tensors = {f"of_{name}": kind for name, kind in SYSTEM.items()}
    tensors |= dict.fromkeys(("of_log_dt", "of_log_rate", "of_im", "of_B", "of_C"), "*fp32:16")
    tensors |= dict.fromkeys(("half_row", "row"), "i32")
    parameters, system = _bytes(N)
    work = {"bytes": 2 * parameters + system, "flops": 110 * H * N}
    return _case("backward", zoh_gradient_kernel, N, tensors) | {"work": work}


def _case(way, kernel, N, tensors) -> dict:
    return {
        "name": f"diagonal_discretization {way} N={N}",
        "kernel": kernel,
        "arguments": dict.fromkeys(PARAMETERS, "*fp32:16") | tensors | {"S": "i32", "half": "i32"},
        **as_compiled(over_channels(H, H, N)[2]),
        "variant": N > 64,
    }
