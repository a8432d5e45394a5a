"""Learning curves of several runs in one picture, over the tokens that each has seen."""

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
