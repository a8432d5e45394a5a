"""What makes a run this run: two configs with the same identity may share an output folder."""

import json

# keys of the model that change how fast it is and not what it learns
SPEED_ONLY = ("mode", "kernels", "chunk_size", "loss_chunk_size")
TRAINING = ("sequence_length", "carry_state", "seed", "learning_rate", "ssm_learning_rate", "weight_decay", "init_from")


def run_identity(values: dict, task, global_batch_size: int) -> dict:
    """The identity of a run, as JSON has it.

    Not in it: what changes the speed and not the result, and what only says how long and how often.
    """
    from ..config.arguments import S4TrainingArguments  # transformers, which takes seconds to import

    model = json.loads(json.dumps(task.config.to_diff_dict()), parse_constant=str)  # an infinity as its name
    model.pop("transformers_version", None)
    training = {key: values.get(key, getattr(S4TrainingArguments, key)) for key in TRAINING}
    identity = {"model": model, "data": task.fingerprint, "global_batch_size": global_batch_size, **training}
    return without_speed(identity)


def without_speed(identity: dict) -> dict:
    """An identity less the keys of SPEED_ONLY, some of which older runs have recorded."""
    model = {key: value for key, value in identity.get("model", {}).items() if key not in SPEED_ONLY}
    return identity | {"model": model}
