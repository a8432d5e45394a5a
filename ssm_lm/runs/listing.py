"""`ssm-lm runs [FOLDER]`: the runs below a folder, how far each came, and what may be done with it.

Reads a few small files of each and imports neither torch nor transformers, so that it answers at once.
"""

import argparse
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from ..config.reading import read_yaml
from ..errors import UserError
from ..loading.folder import INDEX, WEIGHTS
from ..training.checkpoints import RUN_FILE, complete_checkpoints
from ..training.history import read_metrics, series
from ..training.lock import is_held

DEEPEST = 3  # folders below the given one in which a run is looked for
STATES = {
    "running": "a process holds the folder",
    "finished": "its model is in the folder",
    "stopped": "the same command goes on from its last whole checkpoint, or from the beginning",
    "broken": "nothing goes on from it: its files are damaged or gone",
}


class Run(NamedTuple):
    """What is known of a run from its folder; None where it is not."""

    folder: Path
    state: str  # of STATES
    step: int  # the last one in the log
    last_step: int | None  # at which it ends
    loss: float | None  # of the last entry
    best: tuple[str, float, int] | None  # (measure, value, step) on the validation split
    checkpoint: Path | None  # the last whole one


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument(
        "folder", nargs="?", default="runs", metavar="FOLDER", help="a run, or a folder with runs (default: runs)"
    )
    parser.add_argument("--json", action="store_true", help="as one JSON list")


def run(args: argparse.Namespace) -> None:
    """Print the runs below a folder."""
    folder = Path(args.folder).expanduser()
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give one with runs, or a run's output_dir")
    runs = [read_run(place) for place in find_runs(folder)]
    if args.json:
        print(json.dumps([describe(run) for run in runs], indent=2))
    elif not runs:
        print(f"{folder}: holds no run of ssm-lm")
    else:
        Console().print(table(runs, folder))


def find_runs(folder: Path) -> Iterator[Path]:
    """The folders of runs in and below `folder`, in the order of their names."""
    for place, inner, files in os.walk(folder):
        depth = len(Path(place).relative_to(folder).parts)
        if RUN_FILE in files:
            yield Path(place)
            inner.clear()  # a run holds no runs
        elif depth == DEEPEST:
            inner.clear()
        inner[:] = sorted(name for name in inner if not name.startswith("."))


def read_run(folder: Path) -> Run:
    """What is known of the run in `folder`."""
    entries = read_metrics(folder)
    losses = series(entries, "loss")[1]
    checkpoints = complete_checkpoints(folder)
    return Run(
        folder=folder,
        state=state_of(folder),
        step=max((entry["step"] for entry in entries), default=0),
        last_step=last_step(folder),
        loss=losses[-1] if losses else None,
        best=best(entries),
        checkpoint=checkpoints[-1] if checkpoints else None,
    )


def state_of(folder: Path) -> str:
    """One of STATES."""
    try:
        recorded = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
        finished = recorded.get("finished_step") is not None
    except (OSError, ValueError, AttributeError):
        return "broken"
    if is_held(folder):
        return "running"
    if finished:
        return "finished" if any((folder / name).is_file() for name in (WEIGHTS, INDEX)) else "broken"
    if any(folder.glob("checkpoint-*")) and not complete_checkpoints(folder):
        return "broken"
    return "stopped"


def last_step(folder: Path) -> int | None:
    """Where the run ends, from the config that it has written."""
    try:
        steps = read_yaml(folder / "config.yaml").get("max_steps")
    except UserError:
        return None
    return steps if isinstance(steps, int) and steps > 0 else None


def best(entries: list[dict]) -> tuple[str, float, int] | None:
    """The best of the evaluations: the lowest perplexity or loss, the highest accuracy."""
    for key, choose in (("eval_accuracy", max), ("eval_perplexity", min), ("eval_loss", min)):
        steps, values = series(entries, key)
        found = [(value, step) for step, value in zip(steps, values, strict=True) if math.isfinite(value)]
        if found:
            value = choose(value for value, _ in found)
            return key.removeprefix("eval_"), value, next(step for other, step in found if other == value)
    return None


def describe(run: Run) -> dict:
    """A run as JSON has it."""
    best = None if run.best is None else dict(zip(("measure", "value", "step"), run.best, strict=True))
    values = run._asdict() | {"folder": str(run.folder), "best": best}
    return values | {"checkpoint": None if run.checkpoint is None else str(run.checkpoint)}


def table(runs: list[Run], folder: Path) -> Table:
    """The runs for people."""
    view = Table(box=None, pad_edge=False)
    for column in ("run", "state", "step", "loss", "best on validation", "last checkpoint"):
        view.add_column(column, justify="right" if column in ("step", "loss") else "left", overflow="fold")
    for run in runs:
        name = str(run.folder.relative_to(folder)) if run.folder != folder else str(folder)
        best = "-"
        if run.best is not None:
            measure, value, step = run.best
            shown = f"{value:.2%}" if measure == "accuracy" else f"{value:.4f}" if measure == "loss" else f"{value:.2f}"
            best = f"{measure} {shown} at {step}"
        steps = f"{run.step:,}" if run.last_step is None else f"{run.step:,}/{run.last_step:,}"
        loss = "-" if run.loss is None else f"{run.loss:.4f}"
        view.add_row(name, run.state, steps, loss, best, "-" if run.checkpoint is None else run.checkpoint.name)
    return view
