"""What reaches into transformers' Trainer."""

import contextlib
from pathlib import Path

from transformers import Trainer

from . import Part


class EvaluationCut(Exception):
    """Raised by a callback in an evaluation that is not to go on; the step is saved."""


class OpenTrainer(Trainer):
    """transformers' Trainer with a public name for each of its private moments that this project steps into.

    A subclass overrides the public names and calls them through super(); the private ones stand here alone.
    """

    # where a checkpoint is being written, a folder beside the finished ones; None: output_dir
    writing_into: Path | None = None
    # the checkpoint whose random numbers the first step goes on with, where the data began at its step
    _random_numbers_of: str | None = None

    def write_checkpoint(self, model, trial) -> None:
        """Write the checkpoint of this step, on every rank."""
        super()._save_checkpoint(model, trial)

    def takes_up(self, checkpoint: str) -> bool:
        """Whether `take_up` restores the weights and the optimizer from a checkpoint, and not the Trainer."""
        return False

    def take_up(self, checkpoint: str) -> None:
        """Restore weights, optimizer and schedule, once the engine is made; every rank calls it."""
        raise NotImplementedError

    def taken_up(self, checkpoint: str) -> None:
        """Called when a checkpoint is in the engine, before the first step."""

    def reading(self, checkpoint: str) -> contextlib.AbstractContextManager:
        """Within it the Trainer or its engine reads a checkpoint."""
        return contextlib.nullcontext()

    def take_up_best_model(self) -> None:
        """Load the weights of the best checkpoint, at the end of the training."""
        super()._load_best_model()

    def before_the_end(self) -> None:
        """Called when the last step is taken, before the best model is loaded."""

    def observe_gradient_norm(self, norm) -> None:
        """Called with the norm before clipping in every step; with DeepSpeed, once the engine has clipped."""

    def train_sampler(self, dataset=None):
        """The order of the training examples."""
        return super()._get_train_sampler(dataset)

    def begin_data_at(self, step: int) -> bool:
        """Let the training data begin at `step` of itself; whether they do. If not, what comes before is read and
        passed over.
        """
        return False

    def get_batch_samples(self, *args, **kwargs):
        found = super().get_batch_samples(*args, **kwargs)
        if self._random_numbers_of is not None:  # of which beginning to read the data has drawn one
            self._load_rng_state(self._random_numbers_of)
            self._random_numbers_of = None
        return found

    def judge_best(self, metrics: dict[str, float]) -> bool:
        """Take the model of this step for the best one, if these metrics say so; whether they did."""
        return super()._determine_best_metric(metrics=metrics, trial=None)

    # ---- the Trainer's own names

    def _get_output_dir(self, trial):
        return super()._get_output_dir(trial) if self.writing_into is None else str(self.writing_into)

    def _save_checkpoint(self, model, trial):
        self.write_checkpoint(model, trial)

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        try:
            super()._maybe_log_save_evaluate(*args, **kwargs)
        except EvaluationCut:
            self.control.should_evaluate, self.control.should_save = False, True
            super()._maybe_log_save_evaluate(*args, **kwargs)  # what was logged is not logged again

    def _init_training_state(self, max_steps, steps_an_epoch, epochs, resume_from_checkpoint, trial):
        begun = super()._init_training_state(max_steps, steps_an_epoch, epochs, resume_from_checkpoint, trial)
        self._random_numbers_of = None
        if resume_from_checkpoint is None or not self.begin_data_at(self.state.global_step):
            return begun
        self._random_numbers_of = resume_from_checkpoint
        return begun[0], 0  # batches to pass over

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        if resume_from_checkpoint is None:
            return super()._prepare_for_training(max_steps, train_dataloader, None)
        with self.reading(resume_from_checkpoint):
            if self.takes_up(resume_from_checkpoint):
                # as if there were none: the engine is made, and nothing of the checkpoint is read into it
                prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
                self.take_up(resume_from_checkpoint)
                self._load_scaler(resume_from_checkpoint)
            else:
                prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        self.taken_up(resume_from_checkpoint)
        return prepared

    def _load_best_model(self):
        with self.reading(self.state.best_model_checkpoint):
            self.take_up_best_model()

    def _finalize_training(self, *args, **kwargs):
        self.before_the_end()
        return super()._finalize_training(*args, **kwargs)

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        self.observe_gradient_norm(norm)
        return norm

    def _get_train_sampler(self, train_dataset=None):
        return self.train_sampler(train_dataset)


PARTS = (
    Part(
        "transformers.Trainer._get_output_dir",
        "overridden: another folder while a checkpoint is written",
        "a checkpoint is written beside its place and renamed when it is whole",
        "the Trainer writes checkpoints under another name first",
    ),
    Part(
        "transformers.Trainer._save_checkpoint",
        "overridden: what else a checkpoint holds, its mark, its rename, the time it took",
        "on_save comes after the old checkpoints were deleted, and cannot fail the save",
        "the same",
    ),
    Part(
        "transformers.Trainer._maybe_log_save_evaluate",
        "overridden: an evaluation that is cut short is followed by the step's checkpoint",
        "a run that is asked to end has no time for the rest of an evaluation, and callbacks cannot end one",
        "control has a flag that ends an evaluation",
    ),
    Part(
        "transformers.Trainer._determine_best_metric",
        "called for the evaluation of a step that was cut short before the run went on",
        "evaluations before the first step are not asked whether they are the best",
        "as above",
    ),
    Part(
        "transformers.Trainer._init_training_state",
        "overridden: no batch is passed over where the data begin at a step of themselves",
        "the Trainer goes through all samples before a step: minutes at the millionth one",
        "it asks the sampler to begin at a place",
    ),
    Part(
        "transformers.Trainer._load_rng_state",
        "called once the first batch is there, as where the Trainer passes over batches",
        "to begin to read data draws a random number, and the run that was not stopped drew it at its own beginning",
        "as above",
    ),
    Part(
        "transformers.Trainer._prepare_for_training",
        "overridden: a checkpoint of another engine or other ranks is put into the engine here",
        "the Trainer hands it to DeepSpeed, which refuses it; there is no hook between the engine and the first step",
        "DeepSpeed's universal checkpoints change the ZeRO stage and keep the parameter groups",
    ),
    Part(
        "transformers.Trainer._load_scaler",
        "called, after such a checkpoint",
        "float16's scale goes on from the checkpoint, as where the Trainer reads it",
        "the same",
    ),
    Part(
        "transformers.Trainer._load_best_model",
        "overridden: a best checkpoint that other ranks wrote",
        "as above",
        "the same",
    ),
    Part(
        "transformers.Trainer._finalize_training",
        "overridden: no best model where the training is not over",
        "a run that was asked to end, or goes back, would load its best model and delete other checkpoints",
        "training that a callback stopped leaves the best model alone",
    ),
    Part(
        "transformers.Trainer._get_grad_norm",
        "overridden: the norm is kept for the guard",
        "without DeepSpeed, callbacks see the norm rounded to the log's steps alone",
        "callbacks are told the norm of each step",
    ),
    Part(
        "transformers.Trainer._get_train_sampler",
        "overridden: an order that is a function of the seed and the step",
        "the Trainer takes its sampler from this method alone",
        "it takes one as an argument",
    ),
)
