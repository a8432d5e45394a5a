"""metrics.jsonl, the log of a run: one JSON object an entry, in the order of the steps (see meters.py for its keys)."""

import json
from pathlib import Path

from ..files import write_text

METRICS_FILE = "metrics.jsonl"


def read_metrics(folder: Path) -> list[dict]:
    """The entries of a run's folder, [] where there are none; a line that a kill cut short is left out."""
    entries = []
    try:
        text = (Path(folder) / METRICS_FILE).read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            entries.append(entry)
    return entries


def series(entries: list[dict], key: str) -> tuple[list[int], list[float]]:
    """(steps, values) of a key, from those entries that have it."""
    found = [(entry["step"], entry[key]) for entry in entries if isinstance(entry.get(key), int | float)]
    return [step for step, _ in found], [value for _, value in found]


def trim(path: Path, last_step: int) -> None:
    """Leave in a metrics file the entries up to `last_step`; a line that a kill cut short goes too."""
    if not path.is_file():
        return
    kept = "".join(json.dumps(entry) + "\n" for entry in read_metrics(path.parent) if entry["step"] <= last_step)
    write_text(path, kept)
