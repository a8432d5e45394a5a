"""`ssm-lm compare RUN...`: what runs that are there differ in, and how far each came."""

import json
from pathlib import Path

from ..errors import UserError
from ..runs.curves import names
from ..training.checkpoints import RUN_FILE
from ..training.history import read_metrics, series
from .sizes import count
from .worker import speed


def compare_folders(folders: list[Path]) -> dict:
    """The JSON object: the keys that differ, and for each run its values of them and its last numbers.

    Raises UserError for a folder that holds no run.
    """
    identities, rows = {}, []
    for name, folder in zip(names(folders), folders, strict=True):
        folder = folder.expanduser()
        identities[name] = flat(read_identity(folder))
        rows.append({"run": name, "folder": str(folder)} | last_numbers(folder))
    keys = sorted({key for identity in identities.values() for key in identity})
    differ = [key for key in keys if len({json.dumps(identity.get(key)) for identity in identities.values()}) > 1]
    for row in rows:
        row["keys"] = {key: identities[row["run"]].get(key) for key in differ}
    return {"keys_that_differ": differ, "runs": rows}


def read_identity(folder: Path) -> dict:
    """What a run is, as its run file says."""
    try:
        return json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))["identity"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{folder / RUN_FILE}: holds no run; give the output_dir of one, or a .yaml file") from error


def flat(values: dict, before: str = "") -> dict:
    """{"model": {"ssm": "s4"}} -> {"model.ssm": "s4"}"""
    found = {}
    for key, value in values.items():
        found |= flat(value, f"{before}{key}.") if isinstance(value, dict) else {f"{before}{key}": value}
    return found


def last_numbers(folder: Path) -> dict:
    """Parameters, where there is a model; steps, tokens, seconds; the last loss, the last and the best validation."""
    entries = read_metrics(folder)
    try:
        parameters, inner = count(folder)
    except UserError:
        parameters = inner = None
    found = {"parameters": parameters, "without_embeddings": inner, **speed(folder)}
    _, losses = series(entries, "loss")
    found["loss"] = losses[-1] if losses else None
    for key, better in (("eval_perplexity", min), ("eval_accuracy", max)):
        _, values = series(entries, key)
        if values:
            found |= {key: values[-1], f"best_{key}": better(values)}
    return found


def markdown(comparison: dict) -> str:
    """Two tables: numbers, a row a run; keys that differ, a column a run."""
    rows = comparison["runs"]
    columns = ["parameters", "without_embeddings", "steps", "tokens", "seconds", "tokens_per_second", "loss"]
    for key in ("eval_perplexity", "best_eval_perplexity", "eval_accuracy", "best_eval_accuracy"):
        columns += [key] if any(key in row for row in rows) else []
    lines = ["| run | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    lines += [f"| {row['run']} | " + " | ".join(_number(row.get(key)) for key in columns) + " |" for row in rows]
    lines += [
        "",
        "| key that differs | " + " | ".join(row["run"] for row in rows) + " |",
        "|---" * (len(rows) + 1) + "|",
    ]
    for key in comparison["keys_that_differ"]:
        lines.append(f"| {key} | " + " | ".join(_key(row["keys"][key]) for row in rows) + " |")
    if not comparison["keys_that_differ"]:
        lines.append("| none |" + " |" * len(rows))
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if isinstance(value, int) or value >= 1000 else f"{value:.4g}"


def _key(value) -> str:
    return "-" if value is None else str(value)
