"""`ssm-lm train CONFIG.yaml [--key value ...]`: from a config to a trained model.

The same command is one process, one rank under torchrun, and one rank under the deepspeed launcher. Called again with
the same config it goes on from the last whole checkpoint, or says that the run is finished.
"""

import argparse
import os
import re
from pathlib import Path

from ..config.reading import parse_overrides, read_train_config
from ..errors import UserError
from ..files import write_json
from .checkpoints import (
    RUN_FILE,
    check_resumable,
    claim,
    last_complete_checkpoint,
    remove_partial,
)
from .environment import (
    agree,
    default_environment,
    dry_run,
    is_main_process,
    named_timeouts,
    on_cpu,
    prepare_process,
    release_trainer,
    set_threads,
    world_size,
)

MAX_ROLLBACKS = 3  # in one start of the command; what does not help three times will not help the fourth


def add_arguments(parser: argparse.ArgumentParser) -> None:
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
        train(read_train_config(args.config, overrides), where=args.config)
    elif is_main_process():  # which speaks for all
        with dry_run():
            train(read_train_config(args.config, overrides), where=args.config, plan_only=True)


def train(values: dict, where: str = "config", plan_only: bool = False) -> Path:
    """Train as a checked config says (see `config.read_train_config`); returns the folder of the finished model.

    The folder holds the model and its tokenizer, checkpoint-N folders, TensorBoard files in runs/ and the log in
    metrics.jsonl (see meters.py).
    Raises UserError, before anything is written, for whatever the config or the folders have wrong, and
    SystemExit(75), after a checkpoint, where SIGTERM or SIGUSR1 asked the run to end. With `plan_only` (see
    `environment.dry_run`) it prints the plan instead, and writes nothing.
    """
    check_values(values, where)
    prepare_process(uses_deepspeed=values.get("deepspeed") is not None)

    from transformers import set_seed

    from ..config.arguments import S4TrainingArguments
    from ..config.deepspeed import deepspeed_config
    from .faults import PREEMPTED, StopSignals
    from .identity import run_identity
    from .tasks import make_task
    from .trainer import batch_of_step

    # ---- everything that can be wrong, before the first file is written
    task = make_task(values, where)
    output_dir = Path(values["output_dir"])
    arguments = {key: value for key, value in values.items() if key not in ("model", "init_from")}
    arguments["deepspeed"] = deepspeed_config(
        values.get("deepspeed"), values.get("bf16", False), values.get("fp16", False)
    )
    if arguments["deepspeed"]:
        arguments["bf16"] = arguments["fp16"] = False  # it is torch_autocast there
    if on_cpu():
        arguments["use_cpu"] = True
    arguments["gradient_accumulation_steps"] = accumulation(values, where)
    batch = values.get("per_device_train_batch_size", S4TrainingArguments.per_device_train_batch_size)
    replicas = world_size() // values.get("sequence_parallel_size", 1)
    identity = run_identity(values, task, batch * arguments["gradient_accumulation_steps"] * replicas)
    recorded = claim(output_dir, identity)
    checkpoint = choose_checkpoint(output_dir, values.get("resume_from_checkpoint"), recorded)
    if checkpoint is not None:
        check_resumable(checkpoint, identity)
    try:
        args = S4TrainingArguments(**arguments)
    except (ValueError, TypeError) as error:
        raise UserError(f"{where}: {str(error).splitlines()[0]}") from error
    apart = ("model", "data")  # in the identity: not where they are, but what they are
    agree(None, {k: v for k, v in values.items() if k not in apart} | identity | {"checkpoint": str(checkpoint)})
    if plan_only:
        args.distributed_state.num_processes = world_size()  # as if they were there
    if args.max_steps <= 0:
        args.max_steps = max(1, int(args.num_train_epochs * task.samples_per_epoch // args.global_batch_size))
    if recorded.get("finished_step", -1) >= args.max_steps:
        if is_main_process():
            print(f"{output_dir}: this run is finished ({recorded['finished_step']} steps); nothing to do")
        return output_dir
    if plan_only:
        print_plan(args, task.new_model(), task, checkpoint)
        return output_dir
    if is_main_process():
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            remove_partial(output_dir)
            recorded = recorded | {"identity": identity}
            if values.get("resume_from_checkpoint"):
                recorded["resumed_from"] = values["resume_from_checkpoint"]
            write_json(output_dir / RUN_FILE, recorded)
        except OSError as error:
            raise UserError(f"output_dir {output_dir} cannot be written to ({error.strerror or error})") from error

    # ---- train; again from the last checkpoint, past the batches that spoilt it, where steps were skipped in a row
    set_threads()
    passed_over, rollbacks = list(recorded.get("passed_over", [])), 0
    with StopSignals() as signals:
        while True:
            set_seed(args.seed)
            model = task.new_model()
            if is_main_process() and not rollbacks:
                print_plan(args, model, task, checkpoint)
            # transformers' own default is a new folder at every start, which would cut a resumed curve in two
            with default_environment("TENSORBOARD_LOGGING_DIR", str(output_dir / "runs")) as tensorboard_folder:
                trainer = task.trainer(model, args, signals, tuple(passed_over))
                trainer.checkpoint_facts = {"identity": identity, "passed_over": passed_over}
            with named_timeouts(args):
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            bad_steps = trainer.faults.bad_steps
            if not bad_steps:
                break
            rollbacks += 1
            if rollbacks > MAX_ROLLBACKS:
                raise UserError(
                    f"{output_dir}: {len(bad_steps)} steps in a row could not be taken, and going back {MAX_ROLLBACKS} "
                    "times did not help; a lower learning rate or a longer warm-up may"
                )
            if not task.can_pass_over:
                raise UserError(
                    f"{output_dir}: {len(bad_steps)} steps in a row could not be taken, and only a language model "
                    "without carry_state can pass over their batches; a lower learning rate or a longer warm-up may "
                    "help"
                )
            passed_over += [batch_of_step(step, passed_over) for step in bad_steps]
            checkpoint = last_complete_checkpoint(output_dir) or values.get("resume_from_checkpoint")
            if is_main_process():
                write_json(output_dir / RUN_FILE, recorded | {"identity": identity, "passed_over": passed_over})
                print(
                    f"step {trainer.state.global_step}: {len(bad_steps)} steps in a row were skipped; back to "
                    f"{checkpoint or 'the beginning'}, passing over their batches",
                    flush=True,
                )
            del trainer, model
            release_trainer()

    if trainer.faults.stopped:
        if is_main_process():
            print(
                f"stopped   {signals.received or 'another rank was signalled'} at step {trainer.state.global_step}; "
                f"{last_complete_checkpoint(output_dir)} is whole, and the same command goes on from it",
                flush=True,
            )
        trainer.accelerator.end_training()
        raise SystemExit(PREEMPTED)
    trainer.save_model(str(output_dir))
    task.finish(trainer)
    trainer.accelerator.wait_for_everyone()
    if is_main_process():
        trainer.state.save_to_json(str(output_dir / "trainer_state.json"))
        finished = {"identity": identity, "finished_step": trainer.state.global_step}
        write_json(output_dir / RUN_FILE, finished | ({"passed_over": passed_over} if passed_over else {}))
        print(f"model        {output_dir}\ntensorboard  tensorboard --logdir {tensorboard_folder}")
    trainer.accelerator.end_training()
    return output_dir


def choose_checkpoint(output_dir: Path, given: str | None, recorded: dict) -> Path | None:
    """Where to go on from: the checkpoint that was `given`, once, and the newest of the run itself after that.

    recorded: the run file. Raises UserError where going back to `given` would leave later checkpoints in the folder.
    """
    newest = last_complete_checkpoint(output_dir)
    if given is None or (newest is not None and recorded.get("resumed_from") == given):
        return newest
    place = Path(given)
    mark = check_resumable(place)
    if newest is not None and check_resumable(newest)["step"] > mark["step"]:
        raise UserError(
            f"output_dir {output_dir} holds {newest.name}, which is later than {place}; to go back, give another "
            "output_dir"
        )
    return place


def accumulation(values: dict, where: str) -> int:
    """gradient_accumulation_steps, from `train_batch_size_total` where that is given. Raises UserError."""
    from ..config.arguments import S4TrainingArguments

    total = values.get("train_batch_size_total")
    if total is None:
        return values.get("gradient_accumulation_steps", 1)
    if values.get("gradient_accumulation_steps", 1) != 1:
        raise UserError(
            f"{where}: gradient_accumulation_steps follows from train_batch_size_total; leave one of them out"
        )
    batch = values.get("per_device_train_batch_size", S4TrainingArguments.per_device_train_batch_size)
    at_once = batch * (world_size() // values.get("sequence_parallel_size", 1))
    if total < 1 or total % at_once:
        raise UserError(
            f"{where}: train_batch_size_total {total} is no multiple of the {at_once} sequences that {world_size()} "
            "ranks see at once; choose another per_device_train_batch_size or another number of ranks"
        )
    return total // at_once


def check_values(values: dict, where: str) -> None:
    """Raise UserError for keys that are missing, out of range, or exclude each other."""
    if not values.get("output_dir"):
        raise UserError(f"{where}: the key 'output_dir' is needed")
    if bool(values["model"]) == bool(values.get("init_from")):
        raise UserError(f"{where}: exactly one of 'model' and 'init_from' is needed")
    for key, least in (
        ("sequence_length", 2),
        ("per_device_train_batch_size", 1),
        ("gradient_accumulation_steps", 1),
        ("sequence_parallel_size", 1),
    ):
        if values.get(key, least) < least:
            raise UserError(f"{where}: {key} must be at least {least}, not {values[key]}")
    check_sequence_parallel(values, where)
    for key in ("profile", "peak_tflops", "communication_sample_steps"):
        if (values.get(key) or 0) < 0:
            raise UserError(f"{where}: {key} must not be negative, not {values[key]}")
    given = os.environ.get("SSM_LM_PEAK_TFLOPS")
    if given and not re.fullmatch(r"\d+(\.\d*)?", given):
        raise UserError(f"SSM_LM_PEAK_TFLOPS must be a positive number of TFLOP/s, not {given!r}")
    if values.get("carry_state") and (values.get("activation_checkpointing") or values.get("gradient_checkpointing")):
        raise UserError(
            f"{where}: carry_state and activation_checkpointing exclude each other (the recomputed forward would go on "
            "from the state that it is to make); set one of them to false"
        )


def check_sequence_parallel(values: dict, where: str) -> None:
    """Raise UserError where `sequence_parallel_size` does not go with the ranks, the length or another key."""
    from ..config.arguments import S4TrainingArguments

    size = values.get("sequence_parallel_size", 1)
    if size == 1:
        return
    for name, number in (
        ("the number of ranks", world_size()),
        ("sequence_length", values.get("sequence_length", S4TrainingArguments.sequence_length)),
    ):
        if number % size:
            raise UserError(f"{where}: sequence_parallel_size must divide {name} ({number}), and {size} does not")
    for key in ("carry_state", "task", "label_smoothing_factor"):
        if values.get(key):
            raise UserError(f"{where}: sequence_parallel_size and {key} exclude each other; leave one of them out")
    if values["model"].get("bidirectional"):
        raise UserError(f"{where}: sequence_parallel_size is for causal models; leave out model.bidirectional")


def print_plan(args, model, task, checkpoint) -> None:
    """What is about to run, resolved."""
    parameters = sum(p.numel() for p in model.parameters())
    config = model.config
    stage = args.deepspeed["zero_optimization"]["stage"] if args.deepspeed else None
    engine = "torch" if stage is None else f"DeepSpeed ZeRO {stage}"
    shared = f", {args.sequence_parallel_size} ranks a sequence" if args.sequence_parallel_size > 1 else ""
    half = (args.deepspeed or {}).get("torch_autocast", {}).get("dtype")
    half = half or ("bfloat16" if args.bf16 else "float16" if args.fp16 else None)
    precision = "float32" if half is None else f"{half} (autocast)"
    print(
        f"model     {parameters:,} parameters: {config.num_hidden_layers} x [{', '.join(config.sublayers)}], "
        f"{config.ssm}, hidden_size {config.hidden_size}, state_size {config.state_size}\n"
        f"{task.describe(args)} "
        f"({args.world_size} ranks x {args.per_device_train_batch_size} x {args.gradient_accumulation_steps} "
        f"accumulated{shared}), {args.max_steps} steps\n"
        f"engine    {engine}, {precision}, {args.device}",
        flush=True,
    )
    if checkpoint is not None:
        print(f"resuming  {checkpoint}", flush=True)
