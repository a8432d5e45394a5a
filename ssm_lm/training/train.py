"""`ssm-lm train CONFIG.yaml [--key value ...]`: from a config to a trained model.

The same command is one process, one rank under torchrun, and one rank under the deepspeed launcher. Called again with
the same config it goes on from the last whole checkpoint, or says that the run is finished.
"""

import argparse
import contextlib
import shlex
from collections.abc import Iterator
from pathlib import Path

from ..config.help import HelpKeys
from ..config.reading import parse_overrides, read_train_config
from ..errors import PREEMPTED, UserError
from ..files import write_json
from .checkpoints import RUN_FILE, check_resumable, last_complete_checkpoint, remove_partial
from .environment import (
    default_environment,
    dry_run,
    is_main_process,
    named_timeouts,
    release_trainer,
    set_threads,
    told,
    world_size,
)
from .lock import locked
from .plan import Plan, make_plan, print_plan
from .record import config_text, describe_start, resolved_settings, schedule_text, write_record

TRUST_AFTER = 2  # rollbacks: a level that is met again behind other batches is no fault of the model's
MAX_ROLLBACKS = 3  # in one start of the command; what does not help three times will not help the fourth


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--help-keys", action=HelpKeys, nargs="?", metavar="WORD", help="every key, its default, its line"
    )
    parser.add_argument("config", help="a YAML file; see configs/train/")
    parser.add_argument(
        "overrides",
        nargs=argparse.REMAINDER,
        help="--key value for any key of the config; --model.key value for a key of the model; --dry-run to print what "
        "would run on WORLD_SIZE ranks, and write nothing",
    )


def run(args: argparse.Namespace) -> None:
    overrides = parse_overrides(args.overrides)
    if not overrides.pop("dry_run", False):
        command = shlex.join(["ssm-lm", "train", args.config, *args.overrides])
        train(read_train_config(args.config, overrides), args.config, command=command, given=frozenset(overrides))
    elif is_main_process():  # which speaks for all
        with dry_run():
            train(read_train_config(args.config, overrides), args.config, plan_only=True, given=frozenset(overrides))


def train(
    values: dict, where: str = "config", plan_only: bool = False, command: str = "", given: frozenset = frozenset()
) -> Path:
    """Train as a checked config says (see `reading.read_train_config`); returns the folder of the finished model.

    The folder holds the model and its tokenizer, checkpoint-N folders, TensorBoard files in runs/ and the log in
    metrics.jsonl (see meters.py), config.yaml and starts.jsonl (see record.py). given: the keys of the command line.
    Raises UserError, before anything is written, for whatever the config or the folders have wrong, and
    SystemExit(75), after a checkpoint, where SIGTERM, SIGUSR1 or Ctrl-C asked the run to end; `command` is then said to
    be what goes on. With `plan_only` (see `environment.dry_run`) it prints the whole config and the plan instead, and
    writes nothing.
    """
    plan = make_plan(values, where, alone=plan_only)
    if plan.finished_step is not None:
        if is_main_process():
            print(f"{plan.output_dir}: this run is finished ({plan.finished_step} steps); nothing to do")
    elif plan_only:
        print(config_text(resolved_settings(values, plan, given), where))
        print_plan(plan)
        print(schedule_text(plan.identity))
        if plan.checkpoint is None:
            print(f"begins    a new run in {plan.output_dir}")
    else:
        with hold(plan.output_dir):
            begin(plan, config_text(resolved_settings(values, plan, given), where), command)
            trainer, signal = train_to_the_end(plan)
            if trainer.faults.stopped:
                stop(plan, trainer, signal, command)
            finish(plan, trainer)
    return plan.output_dir


# ---- plan: make_plan, and what it writes first


@contextlib.contextmanager
def hold(output_dir: Path) -> Iterator[None]:
    """Let no other process write into the output folder meanwhile; it is made if need be. Raises UserError."""
    if not is_main_process():  # which speaks for all
        yield
        return
    with contextlib.ExitStack() as held:
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(output_dir))
        except OSError as error:
            raise cannot_be_written(output_dir, error) from error
        yield


def cannot_be_written(output_dir: Path, error: OSError) -> UserError:
    return UserError(f"output_dir {output_dir} cannot be written to ({error.strerror or error})")


def begin(plan: Plan, config: str, command: str) -> None:
    """Write the run file, the resolved config and how the run is started; clear what one that was killed left half
    written. Raises UserError.
    """
    if not is_main_process():
        return
    try:
        remove_partial(plan.output_dir)
        write_json(plan.output_dir / RUN_FILE, plan.record)
        write_record(plan.output_dir, config, describe_start(plan, command))
    except OSError as error:
        raise cannot_be_written(plan.output_dir, error) from error


# ---- loop


def train_to_the_end(plan: Plan):
    """(the trainer that took the last step, the signal that ended the training early or None).

    Training begins again from the last checkpoint, past the batches that spoilt it, where steps were skipped in a row.
    """
    from .stopping import StopSignals

    set_threads()
    rollbacks = 0
    with StopSignals(talks=is_main_process()) as signals:
        while True:
            trainer = train_once(plan, signals, rollbacks)
            if not trainer.faults.bad_steps:
                return trainer, signals.received
            rollbacks += 1
            go_back(plan, trainer, rollbacks)
            del trainer
            release_trainer()


def train_once(plan: Plan, signals, rollbacks: int):
    """Train from the plan's checkpoint to the last step, to a signal, or to too many steps that cannot be taken."""
    from transformers import set_seed

    set_seed(plan.args.seed)
    if rollbacks == 0 and is_main_process():
        print_plan(plan)
    model = plan.task.new_model(plan.args.hf_deepspeed_config.config if plan.args.zero_stage == 3 else None)
    # transformers' own default is a new folder at every start, which would cut a resumed curve in two
    with default_environment("TENSORBOARD_LOGGING_DIR", str(plan.output_dir / "runs")) as plan.tensorboard_folder:
        trainer = plan.task.trainer(model, plan.args, signals, tuple(plan.passed_over))
    trainer.checkpoint_facts, trainer.given_mark = plan.record, plan.mark
    trainer.faults.guard.trusts_levels = rollbacks >= TRUST_AFTER
    with named_timeouts(plan.args):
        trainer.train(resume_from_checkpoint=None if plan.checkpoint is None else str(plan.checkpoint))
    return trainer


def go_back(plan: Plan, trainer, rollbacks: int) -> None:
    """Let the plan go on from the last checkpoint and pass over the batches of the bad steps. Raises UserError."""
    from .epochs import batch_of_step

    bad_steps = trainer.faults.bad_steps
    could_not = f"{plan.output_dir}: {len(bad_steps)} steps in a row could not be taken, and"
    if rollbacks > MAX_ROLLBACKS:
        raise UserError(
            f"{could_not} going back {MAX_ROLLBACKS} times did not help; a lower learning rate or a longer warm-up may "
            "(--learning_rate X --allow_changes learning_rate)"
        )
    if not plan.task.can_pass_over:
        raise UserError(
            f"{could_not} only a language model without carry_state can pass over their batches; a lower learning "
            "rate or a longer warm-up may help"
        )
    plan.record["passed_over"] += [batch_of_step(step, plan.passed_over) for step in bad_steps]
    plan.checkpoint, plan.mark = told(lambda: last_resumable(plan))
    if is_main_process():
        write_json(plan.output_dir / RUN_FILE, plan.record)
        print(
            f"step {trainer.state.global_step}: {len(bad_steps)} steps in a row were skipped; back to "
            f"{plan.checkpoint or 'the beginning'}, passing over their batches",
            flush=True,
        )


def last_resumable(plan: Plan) -> tuple[Path | None, dict]:
    """The newest checkpoint of the run, or the one that it began from, and its mark."""
    newest = last_complete_checkpoint(plan.output_dir) or plan.given
    return (None, {}) if newest is None else (Path(newest), check_resumable(Path(newest)))


# ---- finish


def stop(plan: Plan, trainer, signal: str | None, command: str) -> None:
    """Say that the run can go on, and with what, and end the process: SystemExit(75)."""

    if is_main_process():
        signal = signal or "another rank was signalled"
        last = last_complete_checkpoint(plan.output_dir) or plan.given
        left = f"{last} is whole, and the same command goes on from it" if last else "the same command begins again"
        print(f"stopped   {signal} at step {trainer.state.global_step}; {left}", flush=True)
        if command and world_size() == 1:
            print(f"          {command}", flush=True)
    trainer.accelerator.end_training()
    raise SystemExit(PREEMPTED)


def finish(plan: Plan, trainer) -> None:
    """Write the model, what the task adds, and that the run is finished."""
    trainer.save_model(str(plan.output_dir))
    plan.task.finish(trainer)
    trainer.accelerator.wait_for_everyone()
    if is_main_process():
        trainer.state.save_to_json(str(plan.output_dir / "trainer_state.json"))
        step, last = trainer.state.global_step, plan.args.max_steps
        early = {"stopped_early": True} if plan.args.early_stopping_patience and step < last else {}
        write_json(plan.output_dir / RUN_FILE, plan.record | {"finished_step": step} | early)
        if early:
            print(f"early end    step {step} of {last}: the last evaluations were not better than the best one")
        print(f"model        {plan.output_dir}")
        if "tensorboard" in plan.args.report_to:
            print(f"tensorboard  tensorboard --logdir {plan.tensorboard_folder}")
    trainer.accelerator.end_training()
