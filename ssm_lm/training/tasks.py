"""What there is to learn: the next token of a stream, the class of a sequence, or a few tokens of one that is made up.

A task brings the data, the config of the model and the Trainer; `train.py` does the rest, which is the same for both.
Making one reads and checks everything and writes nothing.
"""

import math
from contextlib import nullcontext
from pathlib import Path

import torch

from ..config.arguments import S4TrainingArguments
from ..config.model import check_baseline, model_config, new_language_model
from ..data.recall import RECALL_TASKS
from ..data.sequences import load_task
from ..data.sources import SourceWindows, check_sources, open_sources, read_sources, validation_windows
from ..data.tokenizer import load_tokenizer
from ..data.windows import TokenWindows, WindowSampler
from ..errors import UserError
from ..files import write_json
from ..internals.deepspeed import built_in_parts
from ..loading.model import fill_parts, find_model, load_model
from .identity import KEYED, TABLES
from .trainer import ClassificationTrainer, LanguageModelTrainer, RecallTrainer


def number_of_parameters(task) -> int:
    """Of the model that a task brings; nothing is allocated."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in task.make_model().parameters())


def make_task(values: dict, where: str):
    """The task that a config asks for. Raises UserError for whatever its data or its model have wrong."""
    if values.get("task") in RECALL_TASKS:
        return Recalling(values, where)
    if values.get("task"):
        return Classification(values, where)
    return LanguageModelling(values, where)


class LanguageModelling:
    """The next token of the streams in `data`. Attributes: config (the model's), samples_per_epoch, fingerprint, order
    (how windows are shuffled; see `identity.order_of`), phases (which shares the sources have, from which step on; None
    for a single one).
    """

    def __init__(self, values: dict, where: str):
        self.sources = read_sources(values.get("data") or [], values.get("data_schedule"), where)
        folders = self.sources.folders
        if self.sources.are_several and values.get("carry_state"):
            raise UserError(f"{where}: carry_state goes through one text from its beginning; give one folder as data")
        self.streams = open_sources(folders)
        self.stream = self.streams[0]
        self.tokenizer = load_tokenizer(str(Path(folders[0]) / "tokenizer"))
        self.can_pass_over = not values.get("carry_state")  # which chains all batches
        self.init_from = values.get("init_from")
        if self.init_from:
            self._folder, self._class, self.config = find_model(self.init_from)
            self.config.dtype = torch.float32  # which it is loaded in
            self._check_tokenizer(folders[0])
        else:
            eos = self.stream.eos_token_id
            tokens = {"vocab_size": self.stream.vocab_size, "eos_token_id": eos, "bos_token_id": eos}
            tokens["pad_token_id"] = self.tokenizer.pad_token_id
            self.config = model_config(tokens | values["model"], where)
        length = values.get("sequence_length", S4TrainingArguments.sequence_length)
        check_baseline(self.config, values, length, where)
        self.packs = bool(values.get("pack_documents"))
        self.train_windows = [TokenWindows(stream, length, self.packs) for stream in self.streams]
        self.eval_windows = None
        if values.get("eval_strategy", "no") != "no":
            self.eval_windows = validation_windows(folders, length, self.packs)
        self.order = KEYED  # or TABLES, for a run that began so
        self.phases = self.sources.phases if self.sources.are_several else None
        self.samples_per_epoch = len(SourceWindows(self.train_windows, self.sources.phases))
        fingerprints = [stream.fingerprint for stream in self.streams]
        self.fingerprint = fingerprints if self.sources.are_several else fingerprints[0]

    def check_data(self) -> None:
        """What one rank finds out for all: whether every file is there, and every id one of the model's."""
        check_sources(self.streams, self.config.vocab_size)

    def steps(self, epochs: float, batch_per_device: int, replicas: int, accumulation: int) -> int:
        """Optimizer steps in so many epochs; a step may see the end of one and the beginning of the next."""
        return int(epochs * self.samples_per_epoch // (batch_per_device * replicas * accumulation))

    def epochs(self, args) -> float:
        """How often args.max_steps see the whole text; of several, as many windows as all of them have."""
        return args.max_steps * args.global_batch_size / self.samples_per_epoch

    def new_model(self, deepspeed: dict | None = None):
        """The model of `init_from`, or a fresh one. deepspeed: the config of an engine of ZeRO 3, under which a rank
        never holds all of it.
        """
        if deepspeed is not None:
            with built_in_parts(deepspeed):
                model = self.make_model()
            if self.init_from:
                fill_parts(model, self._folder)
            return model
        if not self.init_from:
            return self.make_model()
        with torch.random.fork_rng(devices=[]):  # how weights are read is to change no random number that follows
            # a step of training is smaller than the digits of half precision: the weights are held in float32
            return load_model(self.init_from, dtype="float32")

    def make_model(self):
        """A fresh model of the config."""
        return self._class(self.config) if self.init_from else new_language_model(self.config)

    def _check_tokenizer(self, data: str) -> None:
        from ..loading.tokenizer import is_tokenizer_of

        if not is_tokenizer_of(self.init_from, self.tokenizer):
            raise UserError(
                f"{data}: was prepared with another tokenizer than that of init_from, {self.init_from}; prepare the "
                f"text with `--tokenizer {self.init_from}`"
            )

    def describe(self, args) -> str:
        packed = ", documents packed" if self.packs else ""
        tokens = sum(len(stream) for stream in self.streams)
        lines = [f"data      {tokens:,} tokens, vocabulary {self.stream.vocab_size}{packed}"]
        if self.phases:
            lines += self._describe_sources(args)
        step = f"step      {args.global_batch_size} windows of {args.sequence_length} = {args.tokens_per_step:,} tokens"
        return "\n".join([*lines, step])

    def _describe_sources(self, args) -> list[str]:
        """A line a source: its shares of the windows, and how often the run sees it."""
        rows = args.global_batch_size
        counts = self.windows().order(args.seed, False, rows).counts(args.max_steps * rows)
        lines = []
        for number, (name, stream) in enumerate(zip(self.sources.names, self.streams, strict=True)):
            shares = [(step, parts[number] / sum(parts)) for step, parts in self.phases]
            said = ", ".join(f"{share:.2%}" + (f" from step {step} on" if step else "") for step, share in shares)
            epochs = counts[number] / len(WindowSampler(self.train_windows[number]))
            lines.append(f"          {name}: {len(stream):,} tokens, {said} of the windows, {epochs:.2f} epochs")
        return lines

    def windows(self) -> SourceWindows:
        """What is trained on, in the shares that hold."""
        return SourceWindows(self.train_windows, self.phases or self.sources.phases, self.sources.names)

    def trainer(self, model, args, signals, passed_over):
        return LanguageModelTrainer(
            model,
            args,
            self.windows(),
            self.eval_windows,
            passed_over,
            self.order == TABLES,
            signals=signals,
            processing_class=self.tokenizer,
        )

    def finish(self, trainer) -> None:
        """Nothing to add: `ssm-lm eval` measures a language model."""


class Classification:
    """The class of a sequence, of the `task` by name. Attributes as LanguageModelling's."""

    can_pass_over = False
    order = phases = None
    trainer_class = ClassificationTrainer

    def __init__(self, values: dict, where: str):
        if values.get("init_from"):
            raise UserError(f"{where}: init_from is for language models; leave it out")
        self.task = load_task(values["task"])
        self.config = self.make_config(values, where)
        self.samples_per_epoch = len(self.task.splits["train"])
        self.fingerprint = f"{self.task.name}: {', '.join(f'{k} {len(v)}' for k, v in self.task.splits.items())}"

    def check_data(self) -> None:
        """Reading them has checked the sequences."""

    def make_config(self, values: dict, where: str):
        if "type" in values["model"]:
            raise UserError(f"{where}: model.type is for language models; leave it out, or the task")
        return model_config(self.task.model_keys() | {"tie_word_embeddings": False} | values["model"], where)

    def steps(self, epochs: float, batch_per_device: int, replicas: int, accumulation: int) -> int:
        """Optimizer steps in so many epochs; the last of an epoch sees what is left."""
        batches = math.ceil(math.ceil(self.samples_per_epoch / batch_per_device) / replicas)
        return math.ceil(epochs * math.ceil(batches / accumulation))

    def epochs(self, args) -> float:
        """How often args.max_steps see every sequence."""
        replicas = args.world_size // args.sequence_parallel_size
        of_one = self.steps(1, args.per_device_train_batch_size, replicas, args.gradient_accumulation_steps)
        return args.max_steps / of_one

    def new_model(self, deepspeed: dict | None = None):
        with nullcontext() if deepspeed is None else built_in_parts(deepspeed):
            return self.make_model()

    def make_model(self):
        from ..modeling.modeling_s4 import S4ForSequenceClassification

        return S4ForSequenceClassification(self.config)

    def describe(self, args) -> str:
        return f"data      {self.fingerprint}\nstep      {args.global_batch_size} sequences"

    def trainer(self, model, args, signals, passed_over):
        if passed_over:
            raise UserError(
                f"{self.task.name}: steps that cannot be taken are passed over in a language model's stream only"
            )
        args.prediction_loss_only = False  # a language model's logits are too many to keep; these are few
        return self.trainer_class(model, args, self.task, signals=signals)

    def finish(self, trainer) -> None:
        """Measure the test split, print it and write it to test_results.json."""
        results = trainer.evaluate(self.task.splits["test"], metric_key_prefix="test")
        results = {key: results[key] for key in ("test_loss", "test_accuracy")}
        if trainer.is_world_process_zero():
            results |= {"task": self.task.name, "examples": len(self.task.splits["test"])}
            write_json(Path(trainer.args.output_dir) / "test_results.json", results)
            print(f"test      accuracy {results['test_accuracy']:.2%} of {results['examples']:,}")


class Recalling(Classification):
    """A few tokens of a sequence that is made up, predicted by a language model; see data/recall.py."""

    trainer_class = RecallTrainer

    def make_config(self, values: dict, where: str):
        config = model_config({"vocab_size": self.task.vocab_size} | values["model"], where)
        if config.vocab_size < self.task.vocab_size:
            least = self.task.vocab_size
            raise UserError(f"{where}: model.vocab_size must be {least} for {self.task.name}; leave it out")
        check_baseline(config, values, self.task.length, where)
        return config

    def make_model(self):
        return new_language_model(self.config)
