"""What makes a run this run: two configs with the same identity may share an output folder."""

import json

# keys of the model that change how fast it is and not what it learns
SPEED_ONLY = ("mode", "kernels", "chunk_size", "loss_chunk_size")
# keys of the model that runs from before them did not record; what these were is the default
LATER = {"conv_size": 4, "expand": 2, "head_dim": None, "selective_dt": False}

# with another value of these it is another run, whatever is allowed
FIXED = ("sequence_length", "pack_documents", "carry_state", "seed", "init_from", "optim", "optim_args")
# what runs from before such a key did
BEFORE = {"pack_documents": False}

# what a run may change between two starts, with a word: `allow_changes`
CHANGEABLE = (
    "max_steps",
    "learning_rate",
    "ssm_learning_rate",
    "weight_decay",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "label_smoothing_factor",
    "neftune_noise_alpha",
    "bf16",
    "fp16",
    "reduce_dtype",
    "spike_threshold",
    "spike_window",
    "max_skipped_steps",
    "data_schedule",
)
# how windows are shuffled: see data/windows.py
KEYED, TABLES = "keyed", "tables"
ADAMW = ("adamw_torch", "adamw_torch_fused")  # the same mathematics and the same states


def run_identity(values: dict, task, global_batch_size: int) -> dict:
    """The identity of a run, as JSON has it.

    Not in it: what changes the speed and not the result, and what only says how often.
    """
    from ..config.arguments import S4TrainingArguments  # transformers, which takes seconds to import

    model = task.config.to_diff_dict()
    model.pop("transformers_version", None)
    training = {key: values.get(key, getattr(S4TrainingArguments, key)) for key in (*FIXED, *CHANGEABLE)}
    if training["optim"] in ADAMW:
        training["optim"] = "adamw"
    training["data_schedule"] = task.phases
    if task.phases is None:  # one text has no shares
        del training["data_schedule"]
    identity = {"model": model, "data": task.fingerprint, "global_batch_size": global_batch_size, **training}
    return without_speed(json.loads(json.dumps(identity), parse_constant=str))  # an infinity as its name


def order_of(before: dict) -> str:
    """How a run shuffles its windows: as it began. before: its run file or the mark of its checkpoint, {} if it is new.

    A run that does not say it began when there were tables alone. Up to 65,536 windows the two are one.
    """
    return before.get("identity", {}).get("order", TABLES) if before else KEYED


def without_speed(identity: dict) -> dict:
    """An identity less the keys of SPEED_ONLY, some of which older runs have recorded, and of LATER at their defaults,
    which older runs have not.
    """
    model = [item for item in identity.get("model", {}).items() if item not in LATER.items()]
    model = {key: value for key, value in model if key not in SPEED_ONLY}
    return identity | {"model": model}


def fixed_difference(theirs: dict, ours: dict) -> str | None:
    """The first of what no run can change that differs between two identities, in words; None where nothing does.

    A key that an older version did not record is taken to be as it is now.
    """
    theirs = without_speed(BEFORE | theirs)
    for key in ours:
        if key not in CHANGEABLE and key in theirs and theirs[key] != ours[key]:
            return difference(key, theirs[key], ours[key])
    return None


def difference(key, theirs, ours) -> str:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        inner = next(k for k in {**theirs, **ours} if theirs.get(k) != ours.get(k))
        return difference(f"{key}.{inner}", theirs.get(inner), ours.get(inner))
    return f"{key} is {theirs!r}, not {ours!r}"
