"""`ssm-lm plot RUN...`: the curves of one run or of several in one picture, from what the runs have logged."""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path

from ..errors import UserError
from ..training.history import METRICS_FILE, read_metrics, series

PICTURE = "curves.png"
MOST_POINTS = 1000  # of a curve; more are not seen, and make an SVG of megabytes
# key of the log -> what stands at the axis; a panel each, where a run has it
PANELS = {
    "loss": "training loss",
    "eval_perplexity": "validation perplexity",
    "eval_accuracy": "validation accuracy",
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_second": "tokens a second",
    "samples_per_second": "samples a second",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="the output_dir of a run")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help=f"the picture, a .png or .svg (default: {PICTURE} in the folder of the first run)",
    )


def run(args: argparse.Namespace) -> None:
    """Draw the runs and name the picture."""
    output = args.output or args.runs[0].expanduser() / PICTURE
    plot(args.runs, output)
    print(f"{output}: done")


def plot(runs: list[Path], output: Path) -> None:
    """Draw the curves of runs into `output`: what they logged at each step, and perplexity against context length where
    `ssm-lm eval --json` has written into their folders.

    Raises UserError for a folder without a log, a suffix that is no picture's, a place that cannot be written to.
    """
    check_picture("--output", output)
    logs = {}
    for name, folder in zip(names(runs), runs, strict=True):
        logs[name] = read_metrics(folder.expanduser())
        if not logs[name]:
            raise UserError(f"{folder / METRICS_FILE}: holds no entries; give the output_dir of a run that has logged")
    contexts = {name: read_contexts(folder.expanduser()) for name, folder in zip(logs, runs, strict=True)}
    drawings = [
        lambda axes, key=key, title=title: draw_series(axes, title, {n: series(e, key) for n, e in logs.items()})
        for key, title in PANELS.items()
        if any(series(entries, key)[0] for entries in logs.values())
    ]
    if any(contexts.values()):
        drawings.append(lambda axes: draw_contexts(axes, contexts))
    save(drawings, output)


def names(runs: list[Path]) -> list[str]:
    """What the curves are called: the folders' names, or their paths where names are the same."""
    short = [run.expanduser().resolve().name for run in runs]
    chosen = short if len(set(short)) == len(runs) else [str(run) for run in runs]
    if len(set(chosen)) < len(runs):
        raise UserError(f"{max(chosen, key=chosen.count)}: is given twice; leave one of them out")
    return chosen


def read_contexts(folder: Path) -> list[tuple[float | None, float]]:
    """[(tokens of context, token perplexity)] of the results that `ssm-lm eval --json` has written into a folder, the
    shortest first; None tokens, at the end, where the state was carried over the whole split. Of the validation split
    where there are results of it.
    """
    found = {}
    for file in sorted(folder.glob("*.json")):
        try:
            results = json.loads(file.read_text(encoding="utf-8"))
            rows = results["contexts"]
            split = results["split"]
            points = {row["context"]: row["token_perplexity"] for row in rows if row["token_perplexity"]}
        except (OSError, ValueError, LookupError, TypeError):
            continue
        found.setdefault(split, {}).update(points)
    points = found.get("validation") or next(iter(found.values()), {})
    return sorted(points.items(), key=lambda point: (point[0] is None, point[0]))


def check_picture(flag: str, path: Path) -> None:
    """UserError unless `path`, which `flag` has given, has the name of a picture that `save` can write."""
    if path.suffix not in (".png", ".svg"):
        raise UserError(f"{flag} {path}: give a name that ends in .png or .svg")


def save(drawings: list[Callable], output: Path) -> None:
    """A panel for each of `drawings`, which takes matplotlib's axes, in one picture. Raises UserError."""
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("plot needs matplotlib: pip install 'ssm_lm[plot]'") from error
    matplotlib.use("Agg")
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "ssm_lm", "font.size": 9}
    from matplotlib import pyplot

    columns = min(3, len(drawings))
    rows = -(-len(drawings) // columns)
    figure, grid = pyplot.subplots(
        rows, columns, figsize=(3.6 * columns, 2.5 * rows), layout="constrained", squeeze=False
    )
    try:
        for axes, draw in zip(grid.flat, drawings, strict=False):
            draw(axes)
            axes.grid(alpha=0.3)
        for axes in grid.flat[len(drawings) :]:
            axes.set_visible(False)
        if len(grid.flat[0].get_lines()) > 1:
            grid.flat[0].legend(frameon=False)
        figure.savefig(output, metadata={"Date": None} if output.suffix == ".svg" else None, dpi=110)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error.strerror or error})") from error
    finally:
        pyplot.close(figure)


def draw_series(axes, title: str, curves: dict[str, tuple[list[int], list[float]]]) -> None:
    """One curve a run over the steps; a run without the key keeps its colour for the other panels."""
    for number, (name, (steps, values)) in enumerate(curves.items()):
        every = -(-len(steps) // MOST_POINTS) or 1
        marker = "." if len(steps) < 30 else None
        axes.plot(steps[::every], values[::every], label=name, color=f"C{number}", linewidth=1.2, marker=marker)
    axes.set_xlabel("step")
    axes.set_title(title)
    seen = [value for _, values in curves.values() for value in values if math.isfinite(value)]
    if "perplexity" in title and max(seen, default=1) > 10 * min(seen, default=1):
        axes.set_yscale("log")  # it begins at the size of the vocabulary
    if "a second" in title:
        axes.set_ylim(bottom=0)


def draw_contexts(axes, contexts: dict[str, list[tuple[float | None, float]]]) -> None:
    """Token perplexity against the length of the windows; a line across where the state was carried."""
    lengths = sorted({length for points in contexts.values() for length, _ in points if length is not None})
    for number, (name, points) in enumerate(contexts.items()):
        windows = dict(point for point in points if point[0] is not None)
        axes.plot(list(windows), list(windows.values()), label=name, color=f"C{number}", marker="o", markersize=3)
        for _, value in points[len(windows) :]:
            axes.axhline(value, color=f"C{number}", linestyle="--", linewidth=1)
    if lengths:
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.set_xlabel("tokens of context; dashed: state carried")
    axes.set_title("perplexity by context")
