"""How an exported model was made, for its card: what its run has written down about itself."""

import importlib.util
import json
from pathlib import Path

from ..loading.folder import CHECKPOINT, resolve
from ..runs.curves import PANELS, draw_series, save
from ..training.checkpoints import RUN_FILE
from ..training.history import read_metrics, series
from ..training.record import STARTS_FILE

# keys of a run's identity that the card tells, each with what stands before it
SETTINGS = {
    "learning_rate": "learning rate",
    "ssm_learning_rate": "learning rate of the state spaces",
    "lr_scheduler_type": "schedule",
    "warmup_steps": "steps of warm-up",
    "weight_decay": "weight decay",
    "seed": "seed",
}
DRAWN = ("loss", "eval_perplexity")  # of PANELS, in the card's picture


def making(checkpoint) -> dict[str, str]:
    """What -> value, of the run that a checkpoint, a run's output or a model is of; empty where there was none.

    Names of machines, paths and commands stay where they are: a card is published.
    """
    source = resolve(checkpoint)
    if not isinstance(source, Path):
        return {}
    folder = source.parent if CHECKPOINT.fullmatch(source.name) else source
    try:
        identity = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))["identity"]
        batch, length = identity["global_batch_size"], identity.get("sequence_length")
    except (OSError, ValueError, LookupError, TypeError):
        return {}
    entries = read_metrics(folder)
    step = _step_of(source, entries)
    found = {"optimizer steps": f"{step:,}", "sequences a step": f"{batch:,}"}
    if length:
        found |= {"tokens a sequence": f"{length:,}", "tokens seen": f"{step * batch * length:,}"}
    found |= {name: str(identity[key]) for key, name in SETTINGS.items() if identity.get(key) is not None}
    found["precision"] = next((kind for kind in ("bf16", "fp16") if identity.get(kind)), "float32")
    hours = _hours(entries, step)
    if hours:
        found["hours in steps"] = f"{hours:.2f}"
    return found | _last_start(folder)


def _step_of(source: Path, entries: list[dict]) -> int:
    named = CHECKPOINT.fullmatch(source.name)
    return int(named[1]) if named else max((entry["step"] for entry in entries), default=0)


def _hours(entries: list[dict], last_step: int) -> float:
    """Of all starts, without what lies between them: tokens over tokens a second, entry by entry."""
    seconds, before = 0.0, 0
    for entry in entries:
        tokens, speed = entry.get("tokens"), entry.get("tokens_per_second")
        if tokens and speed and entry["step"] <= last_step:
            seconds, before = seconds + (tokens - before) / speed, tokens
    return seconds / 3600


def _last_start(folder: Path) -> dict[str, str]:
    try:
        start = json.loads((folder / STARTS_FILE).read_text(encoding="utf-8").splitlines()[-1])
        versions = start["versions"]
        names = ("torch", "transformers", "deepspeed")
        software = ", ".join(f"{name} {versions[name]}" for name in names if name in versions)
        return {"processes": str(start["ranks"]), "software": software}
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def _log_of(checkpoint) -> list[dict]:
    """The entries of a run's log up to a checkpoint of it; none where there was no run."""
    source = resolve(checkpoint)
    if not isinstance(source, Path):
        return []
    entries = read_metrics(source.parent if CHECKPOINT.fullmatch(source.name) else source)
    last = _step_of(source, entries)
    return [entry for entry in entries if entry["step"] <= last]


def curves_of(checkpoint) -> dict[str, tuple[list[int], list[float]]]:
    """Title -> (steps, values) of the run's log up to it, for a picture; empty without a run, or without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return {}
    entries = _log_of(checkpoint)
    found = {PANELS[key]: series(entries, key) for key in DRAWN}
    return {title: curve for title, curve in found.items() if curve[0]}


def draw(curves: dict[str, tuple[list[int], list[float]]], file: Path) -> None:
    """A panel for each of `curves_of`."""
    save([lambda axes, t=title, c=curve: draw_series(axes, t, {"": c}) for title, curve in curves.items()], file)


def curve_of(checkpoint) -> list[tuple[int, float]]:
    """(step, validation perplexity) of the run's evaluations up to it, at most eight of them, the last among them."""
    points = list(zip(*series(_log_of(checkpoint), "eval_perplexity"), strict=True))
    every = -(-len(points) // 8) or 1
    return points[::-1][::every][::-1]
