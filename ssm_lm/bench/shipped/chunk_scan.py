"""The configurations of the chunk scan that are shipped, with what one launch of each moves and computes."""

import torch

from ...modeling.kernel_launch import family
from ...modeling.kernel_limits import largest_state, longest_chunk, segments
from ...modeling.triton_chunk_scan import (
    from_rows_kernel,
    gram_block,
    gram_configurations,
    gram_kernel,
    link_precision,
    power_of_two,
    precisions,
    scan_configurations,
    scan_kernel,
    to_rows_kernel,
)


def compile_cases(target: str) -> list[dict]:
    """The configurations that are shipped for `target`; what holds no more than another is listed for sm_90 alone."""
    kind, ways = family(target), _WAYS if target == "sm_90" else _HEAVIEST
    cases = [_turn_case("to rows", to_rows_kernel), _turn_case("from rows", from_rows_kernel)]
    for dtype in (torch.bfloat16, torch.float32):
        cases.append(_gram_case(kind, dtype))
        for dense in (False, True):
            default, *others = scan_configurations(kind, dtype, 64, dense)
            cases += [_scan_case(kind, dtype, dense, 64, default, *way) for way in ways]
            cases += [_scan_case(kind, dtype, dense, 64, other, "training") for other in others]
            if largest_state(target, dense) > 64:
                for large in scan_configurations(kind, dtype, 128, dense):
                    cases += [_scan_case(kind, dtype, dense, 128, large, *way) for way in _HEAVIEST[:2]]
    return cases


# of the roofline: B rows of L tokens, H channels, and what a number takes in memory and on tensor cores; as many rows
# as are FULL leave no room for segments
_B, _L, _H = 8, 8192, 1024
_FULL = 16
_TYPES = {torch.bfloat16: ("bf16", 2, 1), torch.float32: ("fp32", 4, 6)}

_HEAVIEST = (("training", "gelu"), ("reverse",), ("rest",))
_WAYS = (
    *(("forward",), ("training",), ("forward", "gelu"), *_HEAVIEST, ("ends",)),
    *(("forward", "identity", _FULL), ("training", "gelu", _FULL), ("reverse", "identity", _FULL)),
)


def _scan_case(kind, dtype, dense, N, launch, way, activation="identity", rows=_B):
    """forward: no gradient needed; training: what the backward reads is saved; reverse: the backward's scan; ends: the
    final state alone; rest: what is left of a sequence, a chunk of any length.
    """
    name, size, products = _TYPES[dtype]
    T, elements, activates = longest_chunk(dtype, N, dense), rows * _L * _H, activation != "identity"
    links = way != "rest" and segments(kind, rows, _L // T, N, dense) > 1
    trains, keeps_before = way in ("training", "reverse"), way == "training" and activates
    has_output, full = way != "ends", way != "rest"
    emitted = (T + T * N) * (way != "ends")
    operators = 4 * _H * (emitted + T * N + (N * N if dense else N))
    carried = 2 * N * N / T * (3 if dtype == torch.bfloat16 else 6) if dense else 0
    product, carry = precisions(kind, dtype)
    pointers = dict.fromkeys(("x", "y"), f"*{name}:16") | dict.fromkeys(
        ("taps", "emit", "inject", "carry", "first", "last"), "*fp32:16"
    )
    pointers |= {"states": f"*{name}:16", "keep": "*u8:16"} if trains else {}
    pointers |= {"before": f"*{name}:16"} if keeps_before else {}
    sizes = dict.fromkeys(("B", "H", "C", "T", "G", "has_first"), "i32") | {"N": "i32:16"}
    passes = 1 + (links and way != "ends")  # over what is scanned
    read = size * (passes + has_output + N / T * trains + keeps_before)
    return {
        "name": f"chunk_scan {way} {f'{activation} ' if activates else ''}{'dense' if dense else 'diagonal'} {name} "
        f"N={N}{' in segments' if links else ''} w{launch.num_warps}s{launch.num_stages}",
        "kernel": scan_kernel,
        "arguments": pointers | sizes,
        "constexprs": ({} if trains else {"states": None, "keep": None})
        | ({} if keeps_before else {"before": None})
        | {
            "REVERSE": way == "reverse",
            "DENSE": dense,
            "HAS_OUTPUT": has_output,
            "ACTIVATION": activation,
            "FULL": full,
            "LINKS": links,
            "TP": T,
            "NP": power_of_two(N if dense else N // 2),
            "M": launch.rows,
            "PRECISION": product,
            "CARRY_PRECISION": carry,
            "LINK_PRECISION": link_precision(kind),
        },
        "options": launch.options(kind),
        "tensor_cores": True,
        "work": {
            "bytes": elements * read + operators,
            "flops": elements * ((0 if dense else 4 * N / T) + (30 if activates else 0)),  # 30 or so
            "tensor_flops": elements * (2 * (T + N) * has_output * products + (2 * N * products + carried) * passes),
            "tensor_dtype": "bf16",
        },
    }


def _gram_case(kind, dtype):
    name, size, products = _TYPES[dtype]
    (launch,) = gram_configurations(kind, dtype)
    N, T, elements = 64, longest_chunk(dtype, 64, False), _B * _L * _H
    P = gram_block(kind, dtype, T, N)
    blocks = 1 + N // P
    return {
        "name": f"chunk_scan gradients of operators {name}",
        "kernel": gram_kernel,
        "arguments": dict.fromkeys(("grad_y", "driven", "u", "starts"), f"*{name}:16")
        | dict.fromkeys(("of_taps", "of_emit", "of_inject", "of_states"), "*fp32:16")
        | {"chunks": "i32", "T": "i32", "N": "i32:16"},
        "constexprs": {"FULL": True, "TP": T, "P": P, "R": launch.rows, "PRECISION": precisions(kind, dtype)[0]},
        "options": launch.options(kind),
        "tensor_cores": True,
        # every operand is read by several programs of a channel, from the cache but for once: they run side by side
        "work": {
            "bytes": elements * size * 2 * (1 + N / T) + 4 * _H * (T + 2 * T * N + N**2),
            "tensor_flops": blocks**2 * 2 * P * P * elements / T * products,
            "tensor_dtype": "bf16",
        },
    }


def _turn_case(name, kernel):
    return {
        "name": f"chunk_scan {name} bf16",
        "kernel": kernel,
        "arguments": {"x": "*bf16:16", "y": "*bf16:16", "H": "i32:16"} | dict.fromkeys(("L", "S", "pad", "B"), "i32"),
        "constexprs": {"UNIT": 16, "ROWS": 64, "COLUMNS": 64},
        "options": {"num_warps": 4, "num_stages": 1},
        "work": {"bytes": 4 * _B * _L * _H},
    }
