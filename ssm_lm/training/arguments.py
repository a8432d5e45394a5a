"""What a training config may say: everything of transformers' TrainingArguments, and the keys below."""

import os
from dataclasses import dataclass, field

from transformers import TrainingArguments


@dataclass
class S4TrainingArguments(TrainingArguments):
    """TrainingArguments with this project's keys and defaults; `configs/train/` explains each in its place.

    model: the keys of S4Config, or the path of a YAML file with them; vocab_size and the special token ids come from
        the data where they are not given.
    init_from: a model folder to start from instead of fresh weights.
    data: a folder written by `ssm-lm prepare`.
    task: a sequence classification task instead of `data`, as digits or imdb:FOLDER (see data/sequences.py).
    sequence_length: tokens in a training window.
    carry_state: each window continues the one before it in its row, from that one's final state (see carry.py).
    ssm_learning_rate: learning rate of the state space parameters (dt, Lambda, P, B, C, D); None: learning_rate.
    profile: steps to trace with torch's profiler, into output_dir/profile; true: 3.
    peak_tflops: dense matmul peak of a device at the precision of the run, for the MFU; None: known GPUs by name. The
        environment variable SSM_LM_PEAK_TFLOPS says the same.
    communication_sample_steps: one step in so many is profiled for its share of communication; 0: none.
    """

    model: dict | str | None = None
    init_from: str | None = None
    data: str | None = None
    task: str | None = None
    sequence_length: int = 1024
    carry_state: bool = False
    ssm_learning_rate: float | None = None
    profile: bool | int = 0
    peak_tflops: float | None = None
    communication_sample_steps: int = 500

    # where language models differ from the defaults of TrainingArguments
    learning_rate: float = 1e-3
    lr_scheduler_type: str = "cosine"
    weight_decay: float = 0.1
    logging_steps: float = 10
    logging_nan_inf_filter: bool = False  # a loss that is not a number must be seen
    report_to: str | list[str] | None = field(default_factory=lambda: ["tensorboard"])
    save_total_limit: int | None = 2
    prediction_loss_only: bool = True
    remove_unused_columns: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.ssm_learning_rate is None:
            self.ssm_learning_rate = self.learning_rate
        if self.profile is True:
            self.profile = 3
        if self.peak_tflops is None and os.environ.get("SSM_LM_PEAK_TFLOPS"):
            self.peak_tflops = float(os.environ["SSM_LM_PEAK_TFLOPS"])

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step sees, over all ranks and accumulated batches."""
        return self.sequence_length * self.global_batch_size

    @property
    def global_batch_size(self) -> int:
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size
