"""The Trainer's side of checkpoints: written beside their place, verified, published; taken up under any engine."""

import errno
import shutil
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME

from ..errors import UserError, one_line
from ..internals.deepspeed import known_objects, set_steps
from ..internals.transformers import OpenTrainer
from .checkpoints import PARTIAL, check_resumable, flush_own_files, last_complete_checkpoint, publish, read_mark, rotate
from .environment import agree, told
from .param_groups import parameter_groups
from .universal import adam_steps, convert, engine_name, is_native, needs_conversion, open_reader, put
from .waiting import first_rank_works

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
NO_BEST = (None, None, None)  # metric, step and place of the best checkpoint


class CheckpointedTrainer(OpenTrainer):
    """A Trainer whose checkpoints are there whole or not at all, and go on under another engine or number of ranks."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.checkpoint_facts = {}  # what else the marks of this run's checkpoints say
        self.given_mark = None  # of the checkpoint that is gone on from, where it was looked at already
        self._reshard = None  # (checkpoint, mark) where one is taken up that another engine or other ranks wrote
        self._best = NO_BEST

    def save_state(self, folder: Path) -> None:
        """What a subclass adds to a checkpoint; called on every rank."""

    def load_state(self, folder: Path) -> None:
        """The inverse of `save_state`."""

    def write_checkpoint(self, model, trial):
        output_dir, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        is_best = self.state.best_global_step == self.state.global_step
        if not is_best:
            self._best_is_published()
        self.writing_into = output_dir / PARTIAL
        try:
            super().write_checkpoint(model, trial)
            if is_best:
                self.best_is_there(output_dir / name)  # or will be: it is being written elsewhere
            self.save_state(self.writing_into / name)
            if self.args.should_save:
                self.state.save_to_json(str(self.writing_into / name / TRAINER_STATE_NAME))
            flush_own_files(self.writing_into / name, self.args.process_index)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                facts = self.checkpoint_facts | {
                    "step": self.state.global_step,
                    "world_size": self.args.world_size,
                    "engine": engine_name(self.args.zero_stage),
                    "optimizer_steps": adam_steps(self.engine_optimizer()),
                }
                publish(self.writing_into / name, output_dir / name, facts)
                rotate(output_dir, self.args.save_total_limit, self.state.best_model_checkpoint)
            self.accelerator.wait_for_everyone()
        except (OSError, SafetensorError, RuntimeError) as error:
            raise self._cannot_save(name, error) from error
        finally:
            self.writing_into = None

    # ---- the best checkpoint is one that is there: not a step that was measured and not saved

    def best_is_there(self, checkpoint: Path) -> None:
        """The best step that was measured has this checkpoint."""
        self.state.best_model_checkpoint = str(checkpoint)
        self._best = self.state.best_metric, self.state.best_global_step, str(checkpoint)

    def _best_is_published(self) -> None:
        """Forget a best step that has left no checkpoint. One that was just measured may yet be saved."""
        metric, step, checkpoint = self._best
        if self.state.best_global_step != step:
            self.state.best_global_step, self.state.best_model_checkpoint = step, checkpoint
            if self.args.load_best_model_at_end:  # without it, the metric is for early stopping
                self.state.best_metric = metric

    def evaluate(self, *args, **kwargs):
        self._best_is_published()
        return super().evaluate(*args, **kwargs)

    def taken_up(self, checkpoint):
        """Find the best checkpoint again, also in a folder that was moved."""
        state = self.state
        step, given = state.best_global_step, state.best_model_checkpoint
        places = [Path(given)] if given else []
        places += [folder / f"checkpoint-{step}" for folder in (Path(checkpoint).parent, Path(self.args.output_dir))]
        there = told(lambda: next((place for place in places if step and read_mark(place) is not None), None))
        self._best = NO_BEST if there is None else (state.best_metric, step, str(there))
        state.best_model_checkpoint = self._best[2]
        self._best_is_published()

    def before_the_end(self):
        self._best_is_published()
        best = self.state.best_model_checkpoint
        if best is not None and read_mark(Path(best)) is None:
            self.state.best_model_checkpoint = best = None
        if best is None and self.args.load_best_model_at_end and self.is_world_process_zero():
            print("best      no checkpoint that was measured is there; the model is that of the last step", flush=True)

    def _cannot_save(self, name: str, error: Exception) -> Exception:
        """What to raise for a checkpoint that could not be written: a UserError where the disk is to blame."""
        if isinstance(error, UserError) or not _is_disk_error(error):
            return error
        shutil.rmtree(Path(self.args.output_dir) / PARTIAL / name, ignore_errors=True)
        said = self._not_written(name, error)
        if self.args.local_process_index != 0:
            print(f"ssm-lm: {said}", file=sys.stderr, flush=True)  # the first rank's disk may be in order
        return said

    def _not_written(self, what: str, error: Exception) -> UserError:
        last = last_complete_checkpoint(Path(self.args.output_dir))
        left = "there is no checkpoint" if last is None else f"{last} is whole, and the same command goes on from it"
        return UserError(f"{what} could not be written to {self.args.output_dir} ({one_line(error)}); {left}")

    def engine_optimizer(self):
        """torch's optimizer or the ZeRO one, without accelerate's wrapper."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def train(self, resume_from_checkpoint=None, **kwargs):
        self._reshard = None
        if resume_from_checkpoint is not None:
            checkpoint = Path(resume_from_checkpoint)
            mark = self.given_mark or check_resumable(checkpoint)
            self.load_state(checkpoint)
            if not self._is_native(checkpoint, mark):
                self._reshard = (checkpoint, mark)
                self._convert(checkpoint, mark)
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise self._not_written("the log", error) from error  # of metrics.jsonl, or of what report_to names

    def _is_native(self, checkpoint: Path, mark: dict) -> bool:
        return is_native(checkpoint, mark, engine_name(self.args.zero_stage), self.args.world_size)

    def _convert(self, checkpoint: Path, mark: dict) -> None:
        problem, what = None, f"converts  {checkpoint}, which other ranks or another engine wrote, in one process"
        if needs_conversion(checkpoint, mark) and self.is_world_process_zero():
            print(what, flush=True)
        try:
            first_rank_works(lambda: convert(checkpoint, mark), what, self.args.device)
        except UserError as error:
            problem = str(error)
        except Exception as error:  # a full disk, a damaged shard: DeepSpeed raises anything
            problem = f"{checkpoint} could not be converted ({one_line(error)})"
        agree(problem)

    def take_up_best_model(self):
        best = Path(self.state.best_model_checkpoint)
        mark = read_mark(best)
        if not self.is_deepspeed_enabled or mark is None or self._is_native(best, mark):
            return super().take_up_best_model()
        self._convert(best, mark)
        self._put(best, mark)

    def reading(self, checkpoint):
        return known_objects(Path(checkpoint))

    def takes_up(self, checkpoint):
        return self._reshard is not None

    def take_up(self, checkpoint):
        folder, mark = self._reshard
        self.lr_scheduler.load_state_dict(torch.load(folder / SCHEDULER_NAME, weights_only=True))
        self._put(folder, mark)

    def _put(self, folder: Path, mark: dict) -> None:
        groups = parameter_groups(self.model, 0.0, 0.0, 0.0)
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        trained = [names[id(parameter)] for group in groups for parameter in group["params"]]
        optimizer, steps = self.engine_optimizer(), mark.get("optimizer_steps", mark["step"])
        put(self.model, optimizer, open_reader(folder, mark, trained), steps)
        for group, rate in zip(optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
        if self.is_deepspeed_enabled:
            set_steps(self.deepspeed, mark["step"])


def _is_disk_error(error: Exception) -> bool:
    """A full or failing disk, as the operating system says it, or as torch and safetensors pass it on."""
    words = ("no space left", "disk quota", "read-only file system", "permission denied", "writing", "os error")
    return (isinstance(error, OSError) and error.errno != errno.ENOENT) or any(
        word in str(error).lower() for word in words
    )
