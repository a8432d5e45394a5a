"""Faults that a run survives: steps that must not be taken, and signals that ask it to end.

All ranks decide alike: the loss and the signals are reduced over them once a step, the gradient norm already is.
Signals are looked at between the batches that a step accumulates and in evaluations too: a scheduler waits for minutes.
"""

import json
import math
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from ..files import write_json
from ..internals.deepspeed import before_clipping, gradient_norm
from ..internals.torch import guard_step, limit_waiting
from ..internals.transformers import EvaluationCut
from .guard import StepGuard
from .stopping import StopSignals

GUARD_FILE = "guard.json"
LOOK_EVERY = 8  # batches of an evaluation: ranks that ask each other wait for the device


class Faults(TrainerCallback):
    """Skips steps, counts them, and ends training early: to roll back, or because a signal asked for it.

    After training: `stopped` is True where a signal ended it, `bad_steps` the steps in a row that ask for a rollback.
    """

    def __init__(self, trainer, signals: StopSignals | None):
        args = trainer.args
        self.trainer, self.signals = trainer, signals or StopSignals()
        self.guard = StepGuard(args.spike_threshold, args.spike_window)
        self.most_in_a_row = args.max_skipped_steps
        self.skipped = 0  # since the process began
        self.in_a_row: list[int] = []  # numbers of the steps
        self.stopped, self.bad_steps = False, []
        self.evaluation_due = False  # one was cut short: it comes first when the run goes on
        self._step_start = []  # what the trainer remembers of it, where a step accumulates batches
        self._cut_step = False  # the run ended in the middle of a step
        self._saved_step = 0  # which the newest checkpoint is of
        self._training, self._batches_evaluated = False, 0
        self._loss = None  # of the step so far, this rank's share
        self._norm = None  # of the gradient before clipping, where the engine does not tell
        self._reason, self._judged, self._stop = None, False, False

    # ---- what the trainer tells

    def observe_loss(self, loss: torch.Tensor) -> None:
        """One of the losses that make up the step."""
        loss = loss.detach().double()
        self._loss = loss if self._loss is None else self._loss + loss

    def observe_norm(self, norm) -> None:
        self._norm = norm

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Make `optimizer.step` do nothing in a step that is skipped."""
        guard_step(optimizer, self.may_step)

    # ---- the decision

    def may_step(self) -> bool:
        """Whether the optimizer takes this step."""
        self.judge()
        return self._reason is None

    def judge(self) -> None:
        """Decide about this step, once: ZeRO 3 calls the optimizer for every group of parameters."""
        if self._judged:
            return
        device = self.trainer.args.device
        loss = torch.zeros((), dtype=torch.float64) if self._loss is None else self._loss
        numbers = torch.stack([loss.to(device), torch.tensor(float(self.signals.received is not None)).to(loss)])
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(numbers)
            numbers[0] /= dist.get_world_size()
        loss, stop = numbers.tolist()
        self._stop = stop > 0
        self._reason = self.guard.verdict(loss, self._gradient_norm())
        self._judged = True

    def _is_asked_to_stop(self) -> bool:
        """Whether a signal has reached any rank. A collective: all ranks call it."""
        asked = torch.tensor(float(self.signals.received is not None), device=self.trainer.args.device)
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(asked)
        return bool(asked > 0)

    def _gradient_norm(self) -> float:
        norm = gradient_norm(self.trainer.model_wrapped)
        if norm is None:
            norm = self._norm
        if norm is None:
            gradients = [p.grad for p in self.trainer.model.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
        return float(norm)

    # ---- what transformers' Trainer calls

    def on_train_begin(self, args, state, control, **kwargs):
        limit_waiting(args.ddp_timeout)
        before_clipping(self.trainer.model_wrapped, self.observe_norm)
        self._training, self._saved_step = True, state.global_step
        args.eval_on_start = args.eval_on_start or self.evaluation_due

    def on_train_end(self, args, state, control, **kwargs):
        self._training = False

    def on_step_begin(self, args, state, control, **kwargs):
        if args.gradient_accumulation_steps > 1:
            self._step_start = self.trainer.moment()

    def on_substep_end(self, args, state, control, **kwargs):
        if self._is_asked_to_stop():
            self.stopped = self._cut_step = control.should_training_stop = True

    def on_prediction_step(self, args, state, control, **kwargs):
        self._batches_evaluated += 1
        if self._training and self._batches_evaluated % LOOK_EVERY == 0 and self._is_asked_to_stop():
            self.stopped = self.evaluation_due = control.should_training_stop = True
            raise EvaluationCut

    def on_save(self, args, state, control, **kwargs):
        self._saved_step = state.global_step

    def on_step_end(self, args, state, control, **kwargs):
        if not self._judged:  # the engine found the gradient not finite, and did not come to the optimizer
            self._norm = math.inf
            self.judge()
            if self.trainer.accelerator.optimizer_step_was_skipped:
                self.trainer.lr_scheduler.step()  # the schedule is a function of the step, taken or not
        if args.scales_loss and (self._reason or "").startswith("gradient norm is"):
            self._reason = None  # how the scale of float16 finds its size; the optimizer has not stepped
        if self._reason:
            self.skipped += 1
            self.in_a_row.append(state.global_step - 1)
            if state.is_world_process_zero:
                print(f"step {state.global_step}: skipped, {self._reason}", flush=True)
        else:
            self.in_a_row = []
        if len(self.in_a_row) >= self.most_in_a_row:
            self.bad_steps = self.in_a_row
            control.should_training_stop, control.should_save, control.should_evaluate = True, False, False
        elif self._stop and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True
            control.should_evaluate = False
        elif self._reason:
            control.should_save = False  # the last checkpoint stays one from before the trouble, to go back to
        self._loss, self._norm, self._reason, self._judged = None, None, None, False

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.bad_steps or self.stopped:  # a strategy by epochs would save once more
            control.should_save = control.should_evaluate = False
        if self._cut_step and state.global_step > self._saved_step:
            for part in self._step_start:
                part.restore()  # the checkpoint is of the last whole step
            control.should_save = True

    # ---- checkpoints

    def save(self, folder: Path) -> None:
        write_json(folder / GUARD_FILE, self._state())

    def _state(self) -> dict:
        return self.guard.state() | {"in_a_row": self.in_a_row, "evaluation_due": self.evaluation_due}

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint's history; one from before there was a guard has none."""
        if (folder / GUARD_FILE).is_file():
            state = json.loads((folder / GUARD_FILE).read_text(encoding="utf-8"))
            self.in_a_row = state.pop("in_a_row")
            self.evaluation_due = state.pop("evaluation_due", False)
            self.guard.load_state(state)
