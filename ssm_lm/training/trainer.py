"""The transformers Trainer with this project's parameter groups, data order, checkpoints and meters."""

import inspect
import math
import sys
import time
from pathlib import Path

import numpy as np
from torch.utils.data import ConcatDataset, Sampler, Subset
from tqdm.auto import tqdm
from transformers import default_data_collator
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerCallback

from ..data.recall import IGNORED, Recall
from ..data.sequences import SequenceTask
from ..data.sources import SourceWindows
from ..data.windows import TokenWindows, WindowSampler
from ..internals.deepspeed import keep_clipping, share_master_weights
from ..internals.transformers import EvaluationCut
from .carry import CarriedState, RowSampler
from .checkpointing import CheckpointedTrainer
from .early_stopping import EarlyStopping
from .epochs import Epochs, batch_of_step
from .faults import Faults
from .meters import CommunicationSample, Meters, MetricsFile, ProfileTrace
from .observation import Observation
from .param_groups import check_ssm_group, check_ssm_precision, parameter_groups
from .schedule import curve, schedule_settings
from .sequence_parallel import RepeatedBatches, SequenceParallel, SlicedWindows
from .stopping import RandomState


class RunSampler(Sampler):
    """The windows of a whole run in order, `total` of them: those that `order.at` names, batch after batch.

    To the Trainer a run is one long epoch, so that the sample at a place is a function of (seed, place) alone, whatever
    the number of ranks.
    order: a `WindowSampler` or a `Mixture`. batch_size, passed_over: batches, counted from 0 as the run would have seen
    them, that it does not see. Set `first_step` to begin there: what comes before is not gone through.
    """

    def __init__(self, order, total: int, batch_size: int = 1, passed_over: tuple[int, ...] = ()):
        self.order, self.total = order, total
        self.batch_size, self.passed_over = batch_size, frozenset(passed_over)
        self.first_step = 0

    def __len__(self):
        return self.total

    @property
    def samples_per_epoch(self) -> int:
        return len(self.order)

    def counts(self, step: int) -> np.ndarray:
        """Windows of each source of a `Mixture` in the first `step` steps, (sources,)."""
        size, batches = self.batch_size, batch_of_step(step - 1, self.passed_over) + 1 if step else 0
        counts = self.order.counts(batches * size)
        for batch in self.passed_over:
            if batch < batches:
                counts = counts - (self.order.counts((batch + 1) * size) - self.order.counts(batch * size))
        return counts

    def __iter__(self):
        for step in range(self.first_step, self.total // self.batch_size):
            first = batch_of_step(step, self.passed_over) * self.batch_size
            yield from self.order.at(np.arange(first, first + self.batch_size)).tolist()


class LossLines(TrainerCallback):
    """One readable line for every log entry, on a terminal and in a file alike."""

    UNITS = (
        ("loss", "loss {:.4f}"),
        ("grad_norm", "grad norm {:.2f}"),
        ("learning_rate", "lr {:.2e}"),
        ("tokens_per_second", "{:,.0f} tokens/s"),
        ("samples_per_second", "{:,.0f} samples/s"),
        ("mfu", "MFU {:.1%}"),
        ("eval_loss", "validation loss {:.4f}"),
        ("eval_perplexity", "perplexity {:.2f}"),
        ("eval_accuracy", "accuracy {:.2%}"),
    )

    def on_log(self, args, state, control, logs=None, **kwargs):
        parts = [text.format(logs[key]) for key, text in self.UNITS if key in logs]
        if parts and state.is_world_process_zero:
            tqdm.write(f"step {state.global_step}/{state.max_steps}  " + "  ".join(parts))
            sys.stdout.flush()


class Bars(ProgressCallback):
    """The progress bars, without the log entries that they would print."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        pass


class S4Trainer(CheckpointedTrainer):
    """What every task shares: parameter groups, whole checkpoints, guards, the meter.

    signals: what has asked the run to end, see `stopping.StopSignals`.
    """

    is_language_model = False

    def __init__(self, *args, signals=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.faults = Faults(self, signals)
        self.add_callback(self.faults)
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        if self.args.early_stopping_patience:
            self.add_callback(EarlyStopping(self.args.early_stopping_patience))
        self.add_callback(LossLines())
        if not self.args.disable_tqdm and sys.stderr.isatty():
            self.add_callback(Bars())
        self._meter = None
        self.meters = Meters(self.args, self.model.config, self.is_language_model)
        self.add_callback(MetricsFile())
        if self.args.profile:
            self.add_callback(ProfileTrace())
        elif self.args.world_size > 1 and self.args.communication_sample_steps:
            self.add_callback(CommunicationSample(self.meters))
        self.observation = None
        if "tensorboard" in self.args.report_to:
            self.observation = Observation(self)
            self.add_callback(self.observation)
        self._may_skip_logits = "skip_logits" in inspect.signature(self.model.forward).parameters

    # ---- loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Compute the loss without logits where nothing reads them: they would be the largest tensor of the step."""
        unread = self.label_smoother is None and (model.training or self.args.prediction_loss_only)
        if self._may_skip_logits and unread:
            inputs = {**inputs, "skip_logits": True}
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if model.training:
            self.faults.observe_loss(result[0] if return_outputs else result)
        return result

    def prediction_step(self, *args, **kwargs):
        """Evaluate by the plain loss, also where training smooths the labels: a perplexity is of the plain one."""
        smoother, self.label_smoother = self.label_smoother, None
        try:
            return super().prediction_step(*args, **kwargs)
        finally:
            self.label_smoother = smoother

    # ---- optimizer

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            model = self.model if model is None else model
            groups = parameter_groups(
                model, self.args.learning_rate, self.args.ssm_learning_rate, self.args.weight_decay
            )
            optimizer_class, kwargs = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = optimizer_class(groups, **kwargs)
            self._settings = {
                group["name"]: {key: group[key] for key in ("lr", "weight_decay", "betas", "eps") if key in group}
                for group in self.optimizer.param_groups
            }
            self.faults.attach(self.optimizer)
        return self.optimizer

    def taken_up(self, checkpoint):
        """Let the config win over what a checkpoint says of it: what is gone on from is weights and Adam's averages."""
        super().taken_up(checkpoint)
        step, factor = self.state.global_step, curve(schedule_settings(self.args))
        self.state.compute_steps(self.args, self.state.max_steps)  # logging_steps and the like
        keep_clipping(self.model_wrapped)
        groups = self.engine_optimizer().param_groups
        for group in groups:
            settings = self._settings[group["name"]]
            group |= settings | {"initial_lr": settings["lr"], "lr": settings["lr"] * factor(step)}
        schedule = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)  # without accelerate's wrapper
        rates = {"base_lrs": [g["initial_lr"] for g in groups], "_last_lr": [g["lr"] for g in groups]}
        schedule.load_state_dict(schedule.state_dict() | rates | {"last_epoch": step, "_step_count": step + 1})

    # ---- guards and meters

    def save_state(self, folder):
        if self.args.should_save:
            self.faults.save(folder)

    def load_state(self, folder):
        self.faults.load(folder)

    def before_the_end(self):
        super().before_the_end()
        if self.faults.stopped or self.faults.bad_steps:
            self.state.best_model_checkpoint = None  # nothing is final yet: no best model to load, none to clear for

    def moment(self) -> list:
        """What a batch changes, of what a checkpoint holds; `restore()` of each brings it back."""
        return [RandomState()]

    def train(self, *args, **kwargs):
        try:
            return super().train(*args, **kwargs)
        except EvaluationCut:  # before the first step: the checkpoint is there, and the evaluation is still due
            return None

    def write_checkpoint(self, model, trial):
        with self.meters.timing("checkpoint"):
            super().write_checkpoint(model, trial)

    def observe_gradient_norm(self, norm):
        self.faults.observe_norm(norm)  # before clipping, without DeepSpeed

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self._meter is None:
            check_ssm_precision(model)  # on the engine as it is, not on the config
            share_master_weights(model)
            check_ssm_group(self.model, self.engine_optimizer(), self.args.ssm_learning_rate)
            self._meter = (time.perf_counter(), self.state.global_step)
        self.meters.saw(inputs)
        if self.observation is not None:
            self.observation.saw(inputs)
        return super().training_step(model, inputs, num_items_in_batch)

    def get_batch_samples(self, *args, **kwargs):
        with self.meters.timing("data"):
            return super().get_batch_samples(*args, **kwargs)

    def speed(self, step: int, steps: int, seconds: float) -> dict:
        """Entries of the log, at `step`, about the last `steps` steps, which took `seconds`."""
        return {"samples_per_second": steps * self.args.global_batch_size / seconds}

    def log(self, logs, start_time=None):
        now, step = time.perf_counter(), self.state.global_step
        if "loss" in logs and self._meter is not None and step > self._meter[1]:
            logs |= self.speed(step, step - self._meter[1], now - self._meter[0])
            if self.faults.skipped:
                logs["skipped_steps"] = self.faults.skipped
            logs |= self.meters.entries(now - self._meter[0])
            logs |= self._state_space_rate(logs)
            self._meter = (now, step)
        super().log(logs, start_time)

    def _state_space_rate(self, logs: dict) -> dict:
        """ssm_learning_rate beside a log's learning_rate, where there are state spaces: one schedule has both."""
        if "learning_rate" not in logs or "ssm" not in self._settings or not self.args.learning_rate:
            return {}
        return {"ssm_learning_rate": logs["learning_rate"] * self.args.ssm_learning_rate / self.args.learning_rate}

    def evaluate(self, *args, **kwargs):
        metrics = super().evaluate(*args, **kwargs)
        if self.faults.evaluation_due:  # of the step that the checkpoint is of
            self.faults.evaluation_due = self.args.eval_on_start = False
            checkpoint = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            if checkpoint.is_dir() and self.judge_best(metrics):
                self.best_is_there(checkpoint)
        if self._meter is not None:
            self._meter = (time.perf_counter(), self.state.global_step)  # evaluation is not training time
            self.meters.reset()
        return metrics


class LanguageModelTrainer(S4Trainer):
    """Trainer over token streams.

    train_windows: one source or several; eval_windows: `TokenWindows` of each source, measured together. The order of
    training is that of `RunSampler` with args.seed, or of `RowSampler` where the state is carried. tables: as in
    `WindowSampler`.
    """

    is_language_model = True

    def __init__(
        self,
        model,
        args,
        train_windows: SourceWindows,
        eval_windows: list[TokenWindows] | None,
        passed_over: tuple[int, ...] = (),
        tables: bool = False,
        **kwargs,
    ):
        self.passed_over, self.sources = passed_over, train_windows
        self._order = self._all_windows(args, tables)
        train_dataset = train_windows.dataset
        if args.sequence_parallel_size > 1:
            parallel = SequenceParallel(args.sequence_parallel_size)
            parallel.attach(model)
            train_dataset = SlicedWindows(train_dataset, parallel)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=None if eval_windows is None else side_by_side(eval_windows),
            data_collator=default_data_collator,  # windows are of one length: there is nothing to pad
            callbacks=[Epochs(self._order.samples_per_epoch, args.global_batch_size, passed_over)],
            **kwargs,
        )
        self._carried = None
        if args.carry_state:
            per_row = self._order.windows_per_row
            self._carried = CarriedState(model.config, per_row, args.gradient_accumulation_steps)

    def _all_windows(self, args, tables: bool):
        """Where the windows of the run start, in their order."""
        rows = args.global_batch_size
        if args.carry_state:
            (windows,) = self.sources.windows
            return RowSampler(len(windows.stream), windows.sequence_length, rows, args.max_steps * rows)
        order = self.sources.order(args.seed, tables, rows)
        return RunSampler(order, args.max_steps * rows, rows, self.passed_over)

    def begin_data_at(self, step):
        self._order.first_step = step
        return True

    def train_sampler(self, dataset=None):
        sampler = self._order
        if self.args.sequence_parallel_size > 1:
            return RepeatedBatches(sampler, self.args.per_device_train_batch_size, self.args.sequence_parallel_size)
        return sampler

    def speed(self, step, steps, seconds):
        tokens = self.args.tokens_per_step
        said = {"tokens_per_second": steps * tokens / seconds, "tokens": step * tokens}
        return said | self._of_each_source(step) if len(self.sources.windows) > 1 else said

    def _of_each_source(self, step: int) -> dict:
        """tokens/NAME and epochs/NAME: what `step` steps have seen of each source, and how often they have seen all."""
        found = {}
        counts = self._order.counts(step)
        for name, windows, count in zip(self.sources.names, self.sources.windows, counts.tolist(), strict=True):
            found[f"tokens/{name}"] = count * self.args.sequence_length
            found[f"epochs/{name}"] = count / len(WindowSampler(windows))
        return found

    def log(self, logs, start_time=None):
        if "eval_loss" in logs:
            logs["eval_perplexity"] = math.exp(min(logs["eval_loss"], 100.0))
        super().log(logs, start_time)

    # ---- the state from window to window

    def compute_loss(self, model, inputs, *args, **kwargs):
        if self._carried is not None and model.training:
            inputs = inputs | {"past_key_values": self._carried.next_cache(), "use_cache": True}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def moment(self):
        return super().moment() + ([] if self._carried is None else [self._carried.moment()])

    def _carried_file(self, checkpoint) -> Path:
        return Path(checkpoint) / f"carried_state_{self.args.process_index}.safetensors"

    def save_state(self, folder):
        super().save_state(folder)
        if self._carried is not None:
            self._carried.save(self._carried_file(folder))

    def load_state(self, folder):
        super().load_state(folder)
        if self._carried is not None:
            self._carried.load(self._carried_file(folder), self.args.device)


class RecallTrainer(S4Trainer):
    """Trainer of a language model over the examples of data/recall.py; accuracy is of the tokens that are asked for."""

    is_language_model = True

    def __init__(self, model, args, task: Recall, **kwargs):
        self._length = task.length
        super().__init__(
            model=model,
            args=args,
            train_dataset=task.splits["train"],
            eval_dataset=task.splits["validation"],
            data_collator=default_data_collator,  # examples are of one length
            compute_metrics=recall_accuracy,
            preprocess_logits_for_metrics=most_likely,
            **kwargs,
        )

    def speed(self, step, steps, seconds):
        tokens = self.args.global_batch_size * self._length
        return {"tokens_per_second": steps * tokens / seconds, "tokens": step * tokens}


def side_by_side(windows: list[TokenWindows]) -> ConcatDataset:
    """The windows of each stream one after the other, without overlap; what is left at an end belongs to none."""
    parts = []
    for one in windows:
        length = one.sequence_length
        parts.append(Subset(one, range(0, len(one.stream.tokens) - length + 1, length)))
    return ConcatDataset(parts)


def most_likely(outputs, labels):
    """Token ids (B, L), of what a model gives beside the loss: the logits (B, L, V), and a cache after them."""
    logits = outputs[0] if isinstance(outputs, tuple) else outputs
    return logits.argmax(-1)


def recall_accuracy(prediction) -> dict:
    """Share of the labelled tokens that are the most likely ones at the place before."""
    asked = prediction.label_ids[:, 1:] != IGNORED
    right = prediction.predictions[:, :-1] == prediction.label_ids[:, 1:]
    return {"accuracy": float(right[asked].mean())}


class ClassificationTrainer(S4Trainer):
    """Trainer over a SequenceTask; evaluation is on its validation split, with accuracy."""

    def __init__(self, model, args, task: SequenceTask, **kwargs):
        super().__init__(
            model=model,
            args=args,
            train_dataset=task.splits["train"],
            eval_dataset=task.splits["validation"],
            data_collator=task.collate,
            compute_metrics=accuracy,
            **kwargs,
        )


def accuracy(prediction) -> dict:
    """Share of examples whose largest logit is that of their label."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}
