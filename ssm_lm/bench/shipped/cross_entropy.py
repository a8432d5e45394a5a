"""The configurations of the loss of logits that are shipped, with what one launch of each moves and computes."""

from ...modeling.triton_cross_entropy import cross_entropy_kernel, tiles

# tokens, and GPT-2's vocabulary, no multiple of 16; a small one, which a program holds at once
N, V, SMALL = 65536, 50257, 256
TYPES = {"fp32": 4, "bf16": 2, "fp16": 2}


def compile_cases(target: str) -> list[dict]:
    """The configurations that are shipped for `target`; one for all GPUs. What differs little is listed for one."""
    ways = [("bf16", True, True, V)]
    if target == "sm_90":
        ways += [("bf16", False, True, V), ("fp32", False, True, V), ("bf16", False, False, V)]
        ways += [("fp16", False, True, V), ("fp32", True, True, SMALL)]
    return [_case(*way) for way in ways]


def _case(kind, bias, gradient, entries) -> dict:
    options = tiles(entries)
    name = f"cross_entropy {kind}{' bias' * bias}{'' if gradient else ' loss alone'}"
    return {
        "name": name + ("" if entries == V else f" V={entries}"),
        "kernel": cross_entropy_kernel,
        "arguments": {"z": f"*{kind}:16", "targets": "*i64:16", "nll": "*fp32:16"}
        | ({"bias": "*fp32:16"} if bias else {})
        | dict.fromkeys(("V", "row"), "i32" if entries % 16 else "i32:16"),
        "constexprs": {"BIAS": bias, "GRADIENT": gradient, "BLOCK": options["BLOCK"]}
        | ({} if bias else {"bias": None}),
        "options": {key: value for key, value in options.items() if key.islower()},
        "variant": entries != V or kind == "fp16" or not gradient,
        "work": {
            "bytes": (1 + 2 * gradient) * TYPES[kind] * N * entries,
            "flops": (6 + 4 * gradient) * N * entries,
        },
    }
