"""The configurations of the operators of S4D that are shipped, with what one launch of each moves and computes."""

from ...modeling.triton_diagonal_operators import STEPS, WARPS, power_gradient_kernel, power_kernel

H, T = 1024, 64

INPUT_TYPES = dict.fromkeys(("log_re", "log_im"), "*fp64:16") | dict.fromkeys(("CB_re", "CB_im"), "*fp32:16")


def compile_cases(target: str) -> list[dict]:
    """The configurations that are shipped for `target`, of twice 64 states and, listed for one, of 64; one for all."""
    return [case(N) for N in ((64, 128) if target == "sm_90" else (128,)) for case in (_forward, _backward)]


def _bytes(N) -> tuple[int, int]:
    """Of the operators; of log Lambda in float64 and C B."""
    return 4 * H * (2 * T * N + T + N), 12 * H * N


def _forward(N) -> dict:
    tensors = dict.fromkeys(("skip", "taps", "emit", "inject", "carry"), "*fp32:16") | {"has_skip": "i32"}
    work = {"bytes": sum(_bytes(N)) + 4 * H, "flops": 8 * H * T * N}
    return _case("forward", power_kernel, N, tensors, STEPS=STEPS) | {"work": work}


def _backward(N) -> dict:
    tensors = dict.fromkeys(("of_taps", "of_carry", "of_skip"), "*fp32:16") | dict.fromkeys(
        ("of_emit", "of_inject"), "*fp32"
    )
    tensors |= {f"of_{name}": kind for name, kind in INPUT_TYPES.items()}
    tensors |= dict.fromkeys(("emit_head", "emit_row", "inject_head", "inject_row"), "i32")
    operators, inputs = _bytes(N)
    work = {"bytes": operators + 2 * inputs + 4 * H, "flops": 20 * H * T * N}
    return _case("backward", power_gradient_kernel, N, tensors) | {"work": work}


def _case(way, kernel, N, tensors, **constants) -> dict:
    return {
        "name": f"diagonal_operators {way} N={N}",
        "kernel": kernel,
        "arguments": INPUT_TYPES | tensors | {"T": "i32", "half": "i32"},
        "constexprs": {"HALF": N // 2, **constants},
        "options": {"num_warps": WARPS[way], "num_stages": 1},
        "variant": N > 64,
    }
