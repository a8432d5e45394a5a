"""bf16 and fp16 under DeepSpeed without rounding the state space parameters."""

import json
from pathlib import Path

from ..errors import UserError

REDUCE_DTYPES = ("float32", "bfloat16")


def deepspeed_config(
    source: dict | str | None, bf16: bool, fp16: bool, reduce_dtype: str = REDUCE_DTYPES[0]
) -> dict | None:
    """A DeepSpeed config in which `bf16: true` and `fp16: true` mean autocast.

    DeepSpeed's own bf16 and fp16 blocks cast every parameter, and make the float32 master copy from the rounded
    values: dt and Lambda lose two digits for good. Its torch_autocast block keeps parameters, master copies and
    checkpoints float32, computes in 16 bits, and, at stage 0, scales the loss for float16. A block `optimizer` would
    put all parameters in one group.
    reduce_dtype: of what the ranks of ZeRO 1 to 3 send each other of linear layers under bf16: gradients, and at stage
    3 weights. DeepSpeed's own choice is 16 bits. Everything else is always float32.
    Raises UserError for a file that cannot be read and for the blocks that break the above.
    """
    if source is None:
        return None
    if isinstance(source, dict):
        config, where = dict(source), "deepspeed"
    else:
        where = str(source)
        try:
            config = json.loads(Path(source).read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"cannot read {source}: {error.strerror}") from error
        except ValueError as error:
            raise UserError(f"{source}: not valid JSON: {error}") from error
        if not isinstance(config, dict):
            raise UserError(f"{source}: a DeepSpeed config is a JSON object, not a {type(config).__name__}")
    for block in ("bf16", "fp16"):
        if config.get(block, {}).get("enabled") not in (None, False, "auto"):
            raise UserError(
                f"{where}: the block {block!r} would cast the state space parameters; remove it and say `bf16: true` "
                "or `fp16: true` in the training config"
            )
        config.pop(block, None)
    if "optimizer" in config:
        raise UserError(
            f"{where}: the block 'optimizer' would undo the parameter groups; remove it and set `optim`, "
            "`learning_rate`, `weight_decay` in the training config"
        )
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if fp16 and stage:
        raise UserError(
            f"{where}: fp16 at ZeRO stage {stage}: DeepSpeed's autocast clips the gradients before it has unscaled "
            "them, and never lowers the scale; use `bf16: true`, or stage 0"
        )
    if config.get("zero_force_ds_cpu_optimizer"):
        raise UserError(
            f"{where}: zero_force_ds_cpu_optimizer would put another optimizer in the place of this project's; set it "
            "to false"
        )
    config["zero_force_ds_cpu_optimizer"] = False  # DeepSpeed's default is true
    if bf16 or fp16:
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16" if bf16 else "float16"}
        if reduce_dtype == "float32":  # this list is not of what computes in 16 bits, but of what travels in them
            config["torch_autocast"]["lower_precision_safe_modules"] = []
    return config
