"""What a training config may say: everything of transformers' TrainingArguments, and the keys below."""

import os
from dataclasses import dataclass, field

from transformers import TrainingArguments


@dataclass
class S4TrainingArguments(TrainingArguments):
    """TrainingArguments with this project's keys and defaults; `configs/train/` explains each in its place.

    model: the keys of S4Config, or with a `type` (gpt2, llama, mamba, mamba2) those of transformers' config, or the
        path of a YAML file with them; vocab_size and the special token ids come from the data where they are not given.
    init_from: a model folder to start from instead of fresh weights.
    data: a folder written by `ssm-lm prepare`, or a list of folders or `folder: weight` for a mixture of them, in which
        each has its share of the windows at every step (see data/sources.py).
    data_schedule: {step: [weights]}: from the step on, the folders of `data` have these weights, in their order.
    pack_documents: the states of the model begin anew at every document of a window (see data/windows.py).
    task: instead of `data`, a sequence classification task, as digits or imdb:FOLDER (see data/sequences.py), or a task
        of recall, as induction (see data/recall.py).
    sequence_length: tokens in a training window.
    carry_state: each window continues the one before it in its row, from that one's final state (see carry.py).
    sequence_parallel_size: consecutive ranks that share a sequence, a slice each (see sequence_parallel.py).
    train_batch_size_total: sequences an optimizer step sees, over all ranks; gradient_accumulation_steps follows from
        it and the number of ranks, so that a run may change that number and stay the same run. None: as the keys say.
    reduce_dtype: float32 or bfloat16, in which the gradients of linear layers are reduced over the ranks of ZeRO 1 to 3
        under bf16 (at ZeRO 3 their weights are gathered in it too); all else is float32.
    spike_threshold: a step whose loss or gradient norm lies further above the usual, in robust standard deviations of
        its logarithm, is not taken (see guard.py); 0: only what is not finite is skipped.
    spike_window: how many steps "the usual" is taken from.
    max_skipped_steps: after so many skipped steps in a row, training goes back to the last checkpoint and passes over
        the batches of those steps.
    early_stopping_patience: after so many evaluations in a row that were not better than the best one, the run is
        finished, with the best checkpoint's model; needs load_best_model_at_end. None: it goes on to max_steps.
    ssm_learning_rate: learning rate of the state space parameters (dt, Lambda, P, B, C, D); None: learning_rate.
    allow_changes: keys that this start may give other values than the run began with, as learning_rate,weight_decay;
        the new value, and the step from which it holds, go into run.json (see training/identity.py for which can).
    activation_checkpointing: computes activations again in the backward: a third more time, far less memory.
    profile: steps to trace with torch's profiler, into output_dir/profile; true: 3.
    peak_tflops: dense matmul peak of a device at the precision of the run, for the MFU; None: known GPUs by name. The
        environment variable SSM_LM_PEAK_TFLOPS says the same.
    communication_sample_steps: one step in so many is profiled for its share of communication; 0: none.
    observe_steps: at one step in so many TensorBoard gets histograms of dt and of the time constants, and norms of
        states and gradients by layer (see training/observation.py); 0: none.
    sample_text_steps: after so many steps, again and again, TensorBoard gets a text that the model draws; 0: none.
    sample_text_prompt: what such a text begins with.
    """

    model: dict | str | None = None
    init_from: str | None = None
    data: str | list | None = None
    data_schedule: dict | None = None
    pack_documents: bool = False
    task: str | None = None
    sequence_length: int = 1024
    carry_state: bool = False
    sequence_parallel_size: int = 1
    train_batch_size_total: int | None = None
    reduce_dtype: str = "float32"
    spike_threshold: float = 10.0
    spike_window: int = 128
    max_skipped_steps: int = 8
    early_stopping_patience: int | None = None
    ssm_learning_rate: float | None = None
    allow_changes: str | list[str] | None = None
    activation_checkpointing: bool | None = None
    profile: bool | int = 0
    peak_tflops: float | None = None
    communication_sample_steps: int = 500
    observe_steps: int = 100
    sample_text_steps: int = 0
    sample_text_prompt: str = ""

    # where language models differ from the defaults of TrainingArguments
    learning_rate: float = 1e-3
    lr_scheduler_type: str = "cosine"
    weight_decay: float = 0.1
    logging_steps: float = 10
    report_to: str | list[str] | None = field(default_factory=lambda: ["tensorboard"])
    save_total_limit: int | None = 2
    prediction_loss_only: bool = True
    remove_unused_columns: bool = False

    def __post_init__(self):
        if self.activation_checkpointing and "activation_checkpointing" not in TrainingArguments.__dataclass_fields__:
            self.gradient_checkpointing = True  # its name in transformers before 5.23
        super().__post_init__()
        if self.ssm_learning_rate is None:
            self.ssm_learning_rate = self.learning_rate
        if self.profile is True:
            self.profile = 3
        if self.peak_tflops is None and os.environ.get("SSM_LM_PEAK_TFLOPS"):
            self.peak_tflops = float(os.environ["SSM_LM_PEAK_TFLOPS"])

    @property
    def scales_loss(self) -> bool:
        """Whether the loss is scaled for float16; a step that overflows is then part of finding the scale."""
        autocast = (self.deepspeed or {}).get("torch_autocast", {})
        return self.fp16 or autocast.get("dtype") == "float16"

    @property
    def zero_stage(self) -> int | None:
        """Of DeepSpeed's ZeRO; None without DeepSpeed."""
        return self.deepspeed["zero_optimization"]["stage"] if self.deepspeed else None

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step sees, over all ranks and accumulated batches."""
        return self.sequence_length * self.global_batch_size

    @property
    def global_batch_size(self) -> int:
        """Sequences that one optimizer step sees; ranks that share a sequence count as one."""
        replicas = self.world_size // self.sequence_parallel_size
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * replicas
