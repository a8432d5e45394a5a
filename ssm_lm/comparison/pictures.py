"""Learning curves of several runs in one picture, over the tokens that each has seen; and what size is worth."""

from pathlib import Path

from ..runs.curves import PANELS, draw_series, save
from ..training.history import read_metrics, series

LEARNING = ("loss", "eval_perplexity", "eval_accuracy")  # of PANELS: what says which learns better


def draw(folders: dict[str, Path], files: list[Path]) -> None:
    """Draw the runs (name -> folder) into each of `files`, .png or .svg. Raises UserError."""
    logs = {name: read_metrics(folder) for name, folder in folders.items()}
    panels = [key for key in LEARNING if any(series(entries, key)[0] for entries in logs.values())]
    drawings = [lambda axes, key=key: _panel(axes, key, logs) for key in panels]
    for file in files if drawings else ():
        save(drawings, file)


def _panel(axes, key: str, logs: dict[str, list[dict]]) -> None:
    by_tokens = all(any("tokens" in entry for entry in entries) for entries in logs.values())
    curves = {name: series(entries, key) for name, entries in logs.items()}
    if by_tokens:
        for name, entries in logs.items():
            last = next(entry for entry in reversed(entries) if "tokens" in entry)
            steps, values = curves[name]
            curves[name] = [step * last["tokens"] / last["step"] / 1e6 for step in steps], values
    draw_series(axes, PANELS[key], curves)
    axes.set_xlabel("million tokens" if by_tokens else "step")


def families(rows: list[dict]) -> dict[str, list[dict]]:
    """Family -> its rows of a summary, the smallest first; families of one size are left out."""
    found = {}
    for row in sorted(rows, key=lambda row: row["without_embeddings"]):
        if row["family"] is not None:
            found.setdefault(row["family"], []).append(row)
    return {name: sizes for name, sizes in sorted(found.items()) if len(sizes) > 1}


def draw_sizes(lines: dict[str, list[dict]], files: list[Path]) -> None:
    """Draw what the sizes of each family reach, over their parameters and over the FLOPs of their training, into each
    of `files`. lines: of `families`, at least one. Raises UserError.
    """
    axis = {"without_embeddings": "parameters without embeddings", "flops": "FLOPs of training"}
    if any(row["flops"] is None for sizes in lines.values() for row in sizes):
        del axis["flops"]
    drawings = [lambda axes, key=key, title=title: _by_size(axes, key, title, lines) for key, title in axis.items()]
    for file in files:
        save(drawings, file)


def _by_size(axes, key: str, title: str, lines: dict[str, list[dict]]) -> None:
    for name, sizes in lines.items():
        axes.plot([row[key] for row in sizes], [row["value"] for row in sizes], label=name, marker="o", markersize=3)
    axes.set_xscale("log")
    measured = next(iter(lines.values()))[0]  # as all the others are
    if measured["measure"] == "perplexity":
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_xlabel(title)
    axes.set_title(f"{measured['split']} {measured['measure']}")
