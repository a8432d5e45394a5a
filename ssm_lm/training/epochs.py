"""Epochs of a run that is one long epoch to the Trainer (see `trainer.RunSampler`)."""

from collections.abc import Iterable

from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy


def batch_of_step(step: int, passed_over: Iterable[int]) -> int:
    """The number of the batch that step `step` sees, both counted from 0."""
    for batch in sorted(passed_over):
        step += batch <= step
    return step


class Epochs(TrainerCallback):
    """Logs, evaluates and saves where an epoch of the data ends, for the strategies `epoch`.

    samples_per_epoch: windows that are the data once; batch_size: windows a step. The step that sees the last window of
    an epoch ends it, and may see the first ones of the next. passed_over: batches that are not seen.
    """

    def __init__(self, samples_per_epoch: int, batch_size: int, passed_over: tuple[int, ...] = ()):
        self.samples_per_epoch, self.batch_size, self.passed_over = samples_per_epoch, batch_size, passed_over

    def samples(self, step: int) -> int:
        """How many windows the first `step` steps have gone through."""
        return self.batch_size * (batch_of_step(step - 1, self.passed_over) + 1) if step else 0

    def on_step_end(self, args, state, control, **kwargs):
        before, now = self.samples(state.global_step - 1), self.samples(state.global_step)
        state.epoch = now / self.samples_per_epoch
        if before // self.samples_per_epoch == now // self.samples_per_epoch or state.global_step >= state.max_steps:
            return  # the last step ends the Trainer's own epoch
        control.should_log |= args.logging_strategy == IntervalStrategy.EPOCH
        control.should_evaluate |= args.eval_strategy == IntervalStrategy.EPOCH and args.eval_delay <= state.epoch
        control.should_save |= args.save_strategy == SaveStrategy.EPOCH
