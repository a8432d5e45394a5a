"""What is about to run: everything that can be wrong is found here, before the first file is written."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..config.batch import accumulation_steps
from ..config.model import describe
from ..data.phases import gone_on
from ..errors import UserError, first_line
from ..extras import need
from .changes import Change, allowed_names, changes, check_allowed
from .checkpoints import check_resumable, claim, last_complete_checkpoint
from .checks import check_values
from .environment import agree, on_cpu, prepare_process, told, world_size
from .schedule import curve


@dataclass
class Plan:
    """A run, resolved. task: see tasks.py; args: S4TrainingArguments; record: what the run file is to say.

    checkpoint: where the run goes on from, or None; given: the `resume_from_checkpoint` of the config, or what it
    was when the run began.
    changes: what the config changes about the run from there on; all of it is allowed.
    finished_step: the last step of a run that needs no more of them, else None.
    """

    task: object
    args: object
    identity: dict
    output_dir: Path
    record: dict
    checkpoint: Path | None
    mark: dict  # of the checkpoint, {} without one
    given: str | None
    changes: list[Change]
    finished_step: int | None
    tensorboard_folder: str = ""

    @property
    def checkpoint_step(self) -> int | None:
        """The step that the run goes on from; None at its beginning."""
        return self.mark.get("step")

    @property
    def passed_over(self) -> list[int]:
        """Batches that spoilt the run, and that it does not see."""
        return self.record["passed_over"]


def make_plan(values: dict, where: str, alone: bool = False) -> Plan:
    """The plan of a checked config; every rank makes the same one. Nothing is written.

    alone: of a dry run, in which this process speaks for ranks that are not there.
    Raises UserError for whatever the config or the folders have wrong.
    """
    check_values(values, where)
    check_packages(values)
    prepare_process(uses_deepspeed=values.get("deepspeed") is not None)
    from .identity import order_of, run_identity
    from .tasks import make_task

    task = make_task(values, where)
    output_dir, given = Path(values["output_dir"]), values.get("resume_from_checkpoint")
    values = values | {"max_steps": all_steps(values, task, where)}
    arguments = resolved_arguments(values, where)
    identity = run_identity(values, task, global_batch_size(values, arguments["gradient_accumulation_steps"]))
    curve(identity)  # which says what is wrong about the schedule
    allowed = allowed_names(values.get("allow_changes"), where)
    args = training_arguments(arguments, where)
    apart = ("model", "data")  # in the identity: not where they are, but what they are
    agree(None, {key: value for key, value in values.items() if key not in apart} | identity)
    found = told(lambda: look(output_dir, given, identity))
    recorded, checkpoint, mark = found.recorded, found.checkpoint, found.mark
    given, step = given or recorded.get("resumed_from"), mark.get("step")
    check_data(task, args.device)
    if alone:
        args.distributed_state.num_processes = world_size()  # as if they were there
    # its own folder knows more than its checkpoints; of another folder's run there is the checkpoint alone
    elsewhere = checkpoint is not None and checkpoint.parent.resolve() != output_dir.resolve()
    before = mark if elsewhere and recorded.get("resumed_from") != given else recorded
    begun_with = before.get("identity", {})
    if task.order is not None:
        task.order = identity["order"] = order_of(before)
    if step is not None and step >= args.max_steps:
        identity["max_steps"] = begun_with.get("max_steps", args.max_steps)  # no step is taken on another curve
    changed = changes(begun_with, identity, step or 0)
    check_allowed(changed, allowed, str(checkpoint or output_dir))
    if task.phases is not None:
        task.phases = identity["data_schedule"] = gone_on(
            begun_with.get("data_schedule", task.phases), task.phases, step or 0
        )
    record = run_record(before, identity, changed, step or 0) | ({"resumed_from": given} if given else {})
    finished = finished_step(recorded, args.max_steps, checkpoint, output_dir)
    return Plan(task, args, identity, output_dir, record, checkpoint, mark, given, changed, finished)


class Found(NamedTuple):
    """What is in an output folder: the run file, {} without one; the checkpoint to go on from and its mark, {}."""

    recorded: dict
    checkpoint: Path | None
    mark: dict


def look(output_dir: Path, given: str | None, identity: dict) -> Found:
    """What a run finds to go on from; one rank looks. given: a checkpoint that the config names.

    Raises UserError for a folder, or a checkpoint, that is none of this run's.
    """
    recorded = claim(output_dir, identity)
    checkpoint = choose_checkpoint(output_dir, given or recorded.get("resumed_from"), recorded)
    return Found(recorded, checkpoint, {} if checkpoint is None else check_resumable(checkpoint, identity))


def check_data(task, device) -> None:
    """Let one rank read what must be read of the data, however long it takes. Raises UserError on every rank."""
    from .waiting import first_rank_works

    problem = None
    try:
        first_rank_works(task.check_data, "reads     token ids that no manifest vouches for", device)
    except UserError as error:
        problem = str(error)
    agree(problem)


def check_packages(values: dict) -> None:
    """Raise UserError where the run would miss a package of the extra `train`."""
    wanted = ["accelerate"]
    if values.get("deepspeed") is not None:
        wanted.append("deepspeed")
    if "tensorboard" in (values.get("report_to", "tensorboard") or ()):  # the default
        wanted.append("tensorboard")
    need("train", "train", *wanted)


def run_record(before: dict, identity: dict, changed: list[Change], step: int) -> dict:
    """What the run file says while the run goes on from `step`: its identity, the batches that it passes over, and what
    was changed in it, with the step.

    before: the run file, or the mark of the checkpoint that another folder's run goes on from.
    """
    # where a checkpoint was lost, what was changed after it holds from where the run goes on
    earlier = [change | {"step": min(change["step"], step)} for change in before.get("changes", [])]
    record = {"identity": identity, "passed_over": list(before.get("passed_over", []))}
    return record | {"changes": earlier + [change.record() for change in changed]}


def finished_step(recorded: dict, max_steps: int, checkpoint: Path | None, output_dir: Path) -> int | None:
    """The last step of a run that has taken all of them. Raises UserError for one that cannot go on to max_steps."""
    step = recorded.get("finished_step")
    if step is not None and recorded.get("stopped_early"):
        return step
    if step is not None and step < max_steps and checkpoint is None:
        raise UserError(
            f"output_dir {output_dir} holds a finished run of {step} steps, and no checkpoint to go on from to "
            f"max_steps, {max_steps}; choose another output_dir"
        )
    return step if step is not None and step >= max_steps else None


def all_steps(values: dict, task, where: str) -> int:
    """Optimizer steps of the whole run: max_steps, or those of num_train_epochs where there is none."""
    from ..config.arguments import S4TrainingArguments

    given = values.get("max_steps", S4TrainingArguments.max_steps)
    if given > 0:
        return given
    epochs = values.get("num_train_epochs", S4TrainingArguments.num_train_epochs)
    return max(1, task.steps(epochs, batch_per_device(values), replicas(values), accumulation(values, where)))


def resolved_arguments(values: dict, where: str) -> dict:
    """The keys of S4TrainingArguments, with what follows from the others and from this machine."""
    from ..config.arguments import S4TrainingArguments
    from ..config.deepspeed import deepspeed_config

    arguments = {key: value for key, value in values.items() if key not in ("model", "init_from")}
    arguments["deepspeed"] = deepspeed_config(
        values.get("deepspeed"),
        values.get("bf16", False),
        values.get("fp16", False),
        values.get("reduce_dtype", S4TrainingArguments.reduce_dtype),
    )
    if arguments["deepspeed"]:
        arguments["bf16"] = arguments["fp16"] = False  # it is torch_autocast there
    if on_cpu():
        arguments["use_cpu"] = True
    arguments["gradient_accumulation_steps"] = accumulation(values, where)
    return arguments


def training_arguments(arguments: dict, where: str):
    """S4TrainingArguments. Raises UserError for what transformers refuses."""
    from ..config.arguments import S4TrainingArguments
    from .observation import check_sample_text

    try:
        args = S4TrainingArguments(**arguments)
    except (ValueError, TypeError) as error:
        raise UserError(f"{where}: {first_line(error)}") from error
    check_reporting(args.report_to, where)
    check_sample_text(args, where)
    return args


def check_reporting(report_to: list[str], where: str) -> None:
    """Raise UserError where the run could not report as it is asked to."""
    from transformers.integrations import get_reporting_integration_callbacks

    for name in report_to:
        try:
            (callback,) = get_reporting_integration_callbacks([name])
        except ValueError as error:
            raise UserError(f"{where}: report_to: {first_line(error)}") from error
        try:
            callback()
        except (RuntimeError, ImportError) as error:  # its package is missing, and the message says which
            raise UserError(f"{where}: report_to names {name}: {first_line(error)}") from error


def batch_per_device(values: dict) -> int:
    from ..config.arguments import S4TrainingArguments

    return values.get("per_device_train_batch_size", S4TrainingArguments.per_device_train_batch_size)


def replicas(values: dict) -> int:
    """How many sequences are trained on at once for each one of a device's batch: ranks that share one count once."""
    return world_size() // values.get("sequence_parallel_size", 1)


def global_batch_size(values: dict, accumulation: int) -> int:
    """Sequences that one optimizer step sees."""
    return batch_per_device(values) * accumulation * replicas(values)


def accumulation(values: dict, where: str) -> int:
    """gradient_accumulation_steps of this process's ranks. Raises UserError."""
    return accumulation_steps(values, batch_per_device(values) * replicas(values), world_size(), where)


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


def print_plan(plan: Plan) -> None:
    """What is about to run, resolved."""
    from .tasks import number_of_parameters

    args, task, checkpoint = plan.args, plan.task, plan.checkpoint
    parameters = number_of_parameters(task)
    engine = "torch" if args.zero_stage is None else f"DeepSpeed ZeRO {args.zero_stage}"
    shared = f", {args.sequence_parallel_size} ranks a sequence" if args.sequence_parallel_size > 1 else ""
    half = (args.deepspeed or {}).get("torch_autocast", {}).get("dtype")
    half = half or ("bfloat16" if args.bf16 else "float16" if args.fp16 else None)
    precision = "float32" if half is None else f"{half} (autocast), float32 weights"
    print(
        f"model     {parameters:,} parameters: {describe(task.config)}\n"
        f"{task.describe(args)} "
        f"({args.world_size} ranks x {args.per_device_train_batch_size} x {args.gradient_accumulation_steps} "
        f"accumulated{shared}), {args.max_steps} steps = {task.epochs(args):.2f} epochs\n"
        f"engine    {engine}, {precision}, {args.device}",
        flush=True,
    )
    if checkpoint is not None:
        print(f"resuming  {checkpoint}", flush=True)
        step = plan.checkpoint_step
        if step >= args.max_steps:
            print(
                f"          it is of step {step}, and max_steps is {args.max_steps}: no step is taken, and the "
                f"model of step {step} is the run's",
                flush=True,
            )
    for change in plan.changes:
        print(f"changed   {change}, from step {change.step} on", flush=True)
    if args.save_only_model:
        print("note      save_only_model: the checkpoints hold weights alone, and no run goes on from them", flush=True)
