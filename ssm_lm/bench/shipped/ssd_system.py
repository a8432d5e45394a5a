"""The configurations of what SSD's scan reads that are shipped, with what one launch of each moves and computes."""

import torch

from ...modeling.kernel_limits import NORM_PROGRAMS, longest_ssd_chunk
from ...modeling.triton_rms_norm import FORWARD, tiles
from ...modeling.triton_ssd_system import (
    BACKWARD,
    norms_gradient_kernel,
    norms_kernel,
    turns_gradient_kernel,
    turns_kernel,
    turns_tiles,
)
from . import as_compiled

# tokens; heads of as many states as models have
ROWS, E, STATES = 65536, 16, 64
TYPES = {"fp32": 4, "bf16": 2}
NORMS = "b_scale", "b_bias", "c_scale", "c_bias"


def compile_cases(target: str) -> list[dict]:
    """The configurations that are shipped for `target`, one for all GPUs; other states are listed for one."""
    cases = [case(kind, STATES) for kind in TYPES for case in (_forward, _backward)]
    T = longest_ssd_chunk(target, torch.bfloat16, STATES)
    cases += [_turns(STATES, T), _turns_gradient(STATES, T)]
    if target == "sm_90":
        cases += [_forward("bf16", 128), _backward("bf16", 128), _turns(128, 32), _turns_gradient(128, 32)]
    return cases


def _forward(kind: str, N: int) -> dict:
    tensors = dict.fromkeys(("x", "b", "c"), f"*{kind}:16") | dict.fromkeys(NORMS, "*fp32:16")
    work = {"bytes": 2 * 2 * N * ROWS * TYPES[kind], "flops": 6 * 2 * N * ROWS}
    return _of_vectors("forward", norms_kernel, kind, N, tensors, FORWARD) | {"work": work}


def _backward(kind: str, N: int) -> dict:
    tensors = dict.fromkeys(("of_b", "of_c", "x", "grad_x"), f"*{kind}:16")
    tensors |= dict.fromkeys(("b_scale", "c_scale", "grad_norms"), "*fp32:16")
    moved = 3 * 2 * N * ROWS * TYPES[kind] + 4 * 4 * N * NORM_PROGRAMS
    work = {"bytes": moved, "flops": 12 * 2 * N * ROWS}
    return _of_vectors("backward", norms_gradient_kernel, kind, N, tensors, BACKWARD) | {"work": work}


def _of_vectors(way, kernel, kind, N, tensors, numbers_a_thread) -> dict:
    arguments = tensors | {"rows": "i32", "row": "i32", "eps": "fp32", "N": "i32:16"}
    return _case(f"vectors {way} {kind}", kernel, N, arguments, tiles(N, numbers_a_thread))


def _turns(N: int, T: int) -> dict:
    tensors = dict.fromkeys(("cos", "sin", "decays", "steps"), "*fp32:16")
    work = {"bytes": 8 * E * (2 + N // 2) + 4 * E * T * (N + 2), "flops": 40 * E * T * N // 2}
    return _of_turns("", turns_kernel, N, T, tensors) | {"work": work}


def _turns_gradient(N: int, T: int) -> dict:
    tensors = dict.fromkeys(("of_angle", "of_decay", "of_step", "grad_dt", "grad_decay", "grad_omega"), "*fp64:16")
    work = {"bytes": 8 * E * (2 * (2 + N // 2) + N // 2 + 2 * T), "flops": 4 * E * (N // 2 + T)}
    return _of_turns(" gradient", turns_gradient_kernel, N, T, tensors) | {"work": work}


def _of_turns(way, kernel, N, T, tensors) -> dict:
    system = dict.fromkeys(("omega", "decay", "dt"), "*fp64:16")
    arguments = system | tensors | {"T": "i32", "M": "i32:16", "omega_row": "i32:16"}
    return _case(f"turns{way}", kernel, N, arguments, turns_tiles(T, N // 2))


def _case(name, kernel, N, arguments, chosen) -> dict:
    return {
        "name": f"ssd_system {name}{'' if N == STATES else f' N={N}'}",
        "kernel": kernel,
        "arguments": arguments,
        **as_compiled(chosen),
        "variant": N != STATES,
    }
