"""What is estimated: the model of a training config, its batch, its engine and its precision."""

from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..config.arguments import S4TrainingArguments
from ..config.batch import accumulation_steps
from ..config.deepspeed import deepspeed_config
from ..config.model import model_config
from ..errors import UserError


class Subject(NamedTuple):
    """A run, as far as its cost depends on its config."""

    config: Any  # S4Config
    task: str  # "lm" or "classification"
    length: int  # tokens a sequence
    samples: int | None  # sequences an epoch, where the data is there
    batch: int  # sequences a rank sees at once
    accumulation: int
    sequence_ranks: int  # that share a sequence
    max_steps: int  # -1: epochs say it
    epochs: float
    checkpointing: bool
    needs_state: bool  # carry_state
    autocast: torch.dtype | None  # of the matrix products outside the state spaces; None: as the parameters are
    tf32: bool
    stage: int | None  # of ZeRO; None: without DeepSpeed
    zero: dict  # DeepSpeed's zero_optimization

    @property
    def local_length(self) -> int:
        """Tokens of a sequence that a rank sees."""
        return self.length // self.sequence_ranks

    @property
    def precision(self) -> str:
        """Of the matrix products outside the state spaces."""
        return self.ssm_precision if self.autocast is None else "bf16"

    @property
    def ssm_precision(self) -> str:
        return "tf32" if self.tf32 else "fp32"

    @property
    def bucket(self) -> int:
        """Numbers of gradients that travel at once."""
        size = self.zero.get("reduce_bucket_size", "auto")
        return self.config.hidden_size**2 if size == "auto" else int(size)

    def global_batch(self, ranks: int) -> int:
        """Sequences of an optimizer step on so many ranks."""
        return self.batch * self.accumulation * ranks // self.sequence_ranks

    def steps(self, ranks: int) -> int | None:
        """Optimizer steps of the run; None where neither the config nor the data says it."""
        if self.max_steps > 0:
            return self.max_steps
        return max(1, int(self.epochs * self.samples // self.global_batch(ranks))) if self.samples else None


def read_subject(values: dict, ranks: int, sequence_ranks: int, where: str) -> Subject:
    """The subject of a config's values on so many ranks, sequence_ranks of them to a sequence.

    Raises UserError for a config that makes no model or no batch.
    """
    config, task, length, samples = what_is_trained(values, where)
    batch = values.get("per_device_train_batch_size", S4TrainingArguments.per_device_train_batch_size)
    for key, value in (
        ("per_device_train_batch_size", batch),
        ("gradient_accumulation_steps", values.get("gradient_accumulation_steps", 1)),
    ):
        if value < 1:
            raise UserError(f"{where}: {key} must be at least 1, not {value}")
    accumulation = accumulation_steps(values, max(1, batch * ranks // sequence_ranks), ranks, where)
    if length % sequence_ranks:
        raise UserError(f"--sequence-ranks {sequence_ranks} must divide the sequence of {length} tokens")
    engine = deepspeed_config(values.get("deepspeed"), bool(values.get("bf16")), bool(values.get("fp16")))
    zero = (engine or {}).get("zero_optimization", {})
    return Subject(
        config=config,
        task=task,
        length=length,
        samples=samples,
        batch=batch,
        accumulation=accumulation,
        sequence_ranks=sequence_ranks,
        max_steps=values.get("max_steps", -1),
        epochs=values.get("num_train_epochs", 3),
        checkpointing=bool(values.get("activation_checkpointing") or values.get("gradient_checkpointing")),
        needs_state=bool(values.get("carry_state")),
        autocast=torch.bfloat16 if values.get("bf16") else torch.float16 if values.get("fp16") else None,
        tf32=bool(values.get("tf32")),
        stage=zero.get("stage", 0) if engine else None,
        zero=zero,
    )


def what_is_trained(values: dict, where: str):
    """(S4Config, "lm" or "classification", tokens a sequence, sequences an epoch or None)."""
    if values.get("init_from"):
        raise UserError(f"{where}: init_from is not read by estimate; give the model's keys under `model`")
    if values.get("task"):
        from ..data.recall import RECALL_TASKS
        from ..data.sequences import load_task

        task = load_task(values["task"])
        if values["task"] in RECALL_TASKS:
            config = model_config({"vocab_size": task.vocab_size} | values["model"], where)
            return config, "lm", task.length, len(task.splits["train"])
        config = model_config(task.model_keys() | {"tie_word_embeddings": False} | values["model"], where)
        train = task.splits["train"]
        key = "inputs_embeds" if task.input_size is not None else "input_ids"
        longest = max(len(train[index][key]) for index in range(min(len(train), 256)))
        return config, "classification", longest, len(train)
    length = values.get("sequence_length", S4TrainingArguments.sequence_length)
    if length < 2:
        raise UserError(f"{where}: sequence_length must be at least 2, not {length}")
    keys, samples = dict(values["model"]), None
    from ..data.sources import open_sources, read_sources

    folders = read_sources(values["data"], values.get("data_schedule"), where).folders if values.get("data") else []
    if folders and all(Path(folder).expanduser().is_dir() for folder in folders):
        streams = open_sources(folders)
        keys = {"vocab_size": streams[0].vocab_size} | keys
        samples = sum(len(stream) // length for stream in streams)
    elif "vocab_size" not in keys:
        raise UserError(
            f"{where}: the vocabulary comes from the data, which is not there yet ({values.get('data')}); "
            "prepare it, or give --set model.vocab_size=N"
        )
    return model_config(keys, where), "lm", length, samples
