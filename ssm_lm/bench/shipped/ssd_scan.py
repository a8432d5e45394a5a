"""The configurations of SSD's scan that are shipped, with what one launch of each moves and computes."""

import torch

from ...modeling.kernel_limits import LARGEST_SSD_STATE, limit_of_ssd_scan, longest_ssd_chunk
from ...modeling.triton_ssd_scan import (
    PRECISION,
    block,
    carry_kernel,
    channels,
    emit_kernel,
    ends_kernel,
    options,
    vectors_kernel,
)

SIZES = dict.fromkeys(("L", "T", "chunks", "E"), "i32") | {"P": "i32:16", "M": "i32:16"}
TYPES = {torch.float32: ("fp32", 4), torch.bfloat16: ("bf16", 2)}

# B rows of L tokens, E heads of P channels, as many states as models have
B, L, E, P, STATES = 8, 8192, 16, 64, 64


def states(N: int, T: int) -> int:
    """How many numbers the states of all chunks are."""
    return B * L // T * E * P * N


def kernels(N: int, T: int, shared: bool) -> dict[str, tuple]:
    """With N states, chunks of T tokens, and steps that are those of all or not: kernel, in reverse, tensors of the
    tokens' dtype, those of float32; numbers moved of either; products a token and head.
    """
    elements, vectors, stored = B * L * E * P, B * L * N, states(N, T)
    chosen = {}
    for name, reverse in (("ends forward", False), ("ends reverse", True)):
        chosen[name] = ends_kernel, reverse, "v b ends", "", elements + vectors + stored, 0, P * N
    for name, reverse in (("emit", False), ("gradient of v", True)):
        moved = 2 * elements + 2 * vectors + stored, 0
        chosen[name] = emit_kernel, reverse, "v b c starts y", "skip", *moved, P * N + T * (N + P)
    for name, reverse, read, pairs in (("gradient of c", False, 1, N), ("gradient of b", True, 2, 0)):
        of_float32 = "grad_decay grad_step grad_angle grad_skip"
        # a head's vectors, and in float32 angles, half as many, or of all tokens of a chunk, read before in reverse
        angles = E * vectors // (2 * T if shared else 2)
        moved = 2 * elements + (2 + E) * vectors + read * stored, angles * (2 if reverse else 1)
        products = P * N + T * (N + P + pairs)
        chosen[name] = vectors_kernel, reverse, "g v b c starts asked gradient", of_float32, *moved, products
    return chosen


def compile_cases(arch: str) -> list[dict]:
    """The configurations that are shipped for `arch`. The work is that of constant steps with documents. The other end
    of the switches, selective steps without documents, is listed for one target, and what holds most of the largest
    state for two; they are to spill nowhere too.
    """
    if limit_of_ssd_scan(arch, torch.float32, STATES):
        return []
    default = {"RESETS": True, "SHARED": True}
    switches = {"": default}
    if arch == "sm_90":
        switches[" selective, one document"] = {"RESETS": False, "SHARED": False}
    cases = []
    for label, switch in switches.items():
        for dtype in TYPES:
            T = longest_ssd_chunk(arch, dtype, STATES)
            cases += [_carry_case(label, switch, dtype, T, reverse) for reverse in (False, True)]
            cases += [_case(name, label, switch, dtype, T) for name in kernels(STATES, T, True)]
            if T > 32 and not label:  # as configs of shorter chunks have them
                cases += [_case(name, " of 32 tokens", switch, dtype, 32) for name in kernels(STATES, 32, True)]
    if arch in ("sm_90", "sm_100"):
        label, N = f" of {LARGEST_SSD_STATE} states", LARGEST_SSD_STATE
        for dtype in TYPES:
            T = longest_ssd_chunk(arch, dtype, N)
            largest = [name for name, (kernel, *_) in kernels(N, T, True).items() if kernel is not ends_kernel]
            cases += [_case(name, label, default, dtype, T, N) for name in largest]
    return cases


def _case(name, label, switch, dtype, T, N=STATES) -> dict:
    of_name = kernels(N, T, switch["SHARED"])[name]
    kernel, reverse, of_tokens, of_float32, moved, moved_in_float32, products = of_name
    kind, size = TYPES[dtype]
    on_tensor_cores = dtype == torch.bfloat16
    flops = 2 * products * B * L * E
    return {
        "name": f"ssd_scan {name} {kind}{label}",
        "kernel": kernel,
        "arguments": dict.fromkeys(of_tokens.split(), f"*{kind}:16")
        | dict.fromkeys(f"cos sin decay step {of_float32}".split(), "*fp32:16")
        | SIZES
        | {"stride": "i32:16"}
        | _numbers(switch),
        "constexprs": {
            "REVERSE": reverse,
            **_switches(switch),
            "BLOCK_T": block(T),
            "BLOCK_P": channels(kernel, dtype, P, N // 2),
            "BLOCK_M": block(N // 2),
            "PRECISION": PRECISION,
        },
        "options": options(kernel, dtype, N // 2, T),
        "tensor_cores": on_tensor_cores,
        "variant": bool(label),
        "work": {
            "bytes": size * moved + 4 * moved_in_float32,
            "flops": 0 if on_tensor_cores else flops,
            "tensor_flops": flops if on_tensor_cores else 0,
            "tensor_dtype": "bf16",
        },
    }


def _carry_case(label, switch, dtype, T, reverse, N=STATES) -> dict:
    """In float32, but for what lies in memory between the launches. A variant begins with a zero state."""
    pointers, (kind, size) = "final cos sin decay" + ("" if label else " initial"), TYPES[dtype]
    return {
        "name": f"ssd_scan carry {'reverse' if reverse else 'forward'} {kind}{label}",
        "kernel": carry_kernel,
        "arguments": {"ends": f"*{kind}:16"} | dict.fromkeys(pointers.split(), "*fp32:16") | SIZES | _numbers(switch),
        "constexprs": {
            "REVERSE": reverse,
            **_switches(switch),
            "INITIAL": not label,
            "KEEPS": True,
            "BLOCK_P": channels(carry_kernel, dtype, P, N // 2),
            "BLOCK_M": block(N // 2),
        }
        | ({"initial": None} if label else {}),
        "options": options(carry_kernel, dtype, N // 2, T),
        "variant": bool(label),
        "work": {"bytes": 2 * size * states(N, T), "flops": 8 * states(N, T)},
    }


def _numbers(switch) -> dict:
    return {"numbers": "*i32:16"} if switch["RESETS"] else {}


def _switches(switch) -> dict:
    return switch if switch["RESETS"] else {**switch, "numbers": None}
