"""What a training config may not say, key by key: values out of range, and keys that exclude each other."""

import os
import re

from ..config.deepspeed import REDUCE_DTYPES
from ..errors import UserError
from .environment import world_size


def check_values(values: dict, where: str) -> None:
    """Raise UserError for keys that are missing, out of range, or exclude each other."""
    if not values.get("output_dir"):
        raise UserError(f"{where}: the key 'output_dir' is needed")
    if bool(values["model"]) == bool(values.get("init_from")):
        raise UserError(f"{where}: exactly one of 'model' and 'init_from' is needed")
    for key, least in (
        ("sequence_length", 2),
        ("per_device_train_batch_size", 1),
        ("gradient_accumulation_steps", 1),
        ("sequence_parallel_size", 1),
    ):
        if values.get(key, least) < least:
            raise UserError(f"{where}: {key} must be at least {least}, not {values[key]}")
    check_sequence_parallel(values, where)
    if values.get("reduce_dtype", "float32") not in REDUCE_DTYPES:
        raise UserError(f"{where}: reduce_dtype is one of {', '.join(REDUCE_DTYPES)}, not {values['reduce_dtype']!r}")
    for key in ("profile", "peak_tflops", "communication_sample_steps", "observe_steps", "sample_text_steps"):
        if (values.get(key) or 0) < 0:
            raise UserError(f"{where}: {key} must not be negative, not {values[key]}")
    check_early_stopping(values, where)
    check_packed(values, where)
    given = os.environ.get("SSM_LM_PEAK_TFLOPS")
    if given and not re.fullmatch(r"\d+(\.\d*)?", given):
        raise UserError(f"SSM_LM_PEAK_TFLOPS must be a positive number of TFLOP/s, not {given!r}")
    if values.get("carry_state") and (values.get("activation_checkpointing") or values.get("gradient_checkpointing")):
        raise UserError(
            f"{where}: carry_state and activation_checkpointing exclude each other (the recomputed forward would go on "
            "from the state that it is to make); set one of them to false"
        )


def check_packed(values: dict, where: str) -> None:
    """Raise UserError where `pack_documents` does not go with another key."""
    if not values.get("pack_documents"):
        return
    for key, off in (("carry_state", False), ("sequence_parallel_size", 1), ("task", None)):
        if values.get(key, off) not in (off, None):
            raise UserError(f"{where}: pack_documents and {key} exclude each other; leave one of them out")
    if "type" in values["model"]:
        raise UserError(f"{where}: pack_documents is for models of this package, not for {values['model']['type']}")


def check_early_stopping(values: dict, where: str) -> None:
    """Raise UserError where `early_stopping_patience` has nothing to go by, or no best model to end with."""
    patience = values.get("early_stopping_patience")
    if patience is None:
        return
    if patience < 1:
        raise UserError(f"{where}: early_stopping_patience must be at least 1, not {patience}; null: no early stopping")
    if not values.get("load_best_model_at_end") or values.get("eval_strategy", "no") == "no":
        raise UserError(
            f"{where}: early_stopping_patience ends with the best model: it needs load_best_model_at_end: true, and "
            "eval_strategy and save_strategy epoch or steps"
        )


def check_sequence_parallel(values: dict, where: str) -> None:
    """Raise UserError where `sequence_parallel_size` does not go with the ranks, the length or another key."""
    from ..config.arguments import S4TrainingArguments

    size = values.get("sequence_parallel_size", 1)
    if size == 1:
        return
    for name, number in (
        ("the number of ranks", world_size()),
        ("sequence_length", values.get("sequence_length", S4TrainingArguments.sequence_length)),
    ):
        if number % size:
            raise UserError(f"{where}: sequence_parallel_size must divide {name} ({number}), and {size} does not")
    for key in ("carry_state", "task", "label_smoothing_factor"):
        if values.get(key):
            raise UserError(f"{where}: sequence_parallel_size and {key} exclude each other; leave one of them out")
    if values["model"].get("bidirectional"):
        raise UserError(f"{where}: sequence_parallel_size is for causal models; leave out model.bidirectional")
