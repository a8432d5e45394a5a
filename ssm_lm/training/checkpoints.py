"""Which run a folder holds, and which of its checkpoints are whole."""

import json
import re
from pathlib import Path

from ..errors import UserError
from ..files import write_json
from ..hub.load import COMPLETE as COMPLETE_FILE

RUN_FILE = "run.json"


def mark_complete(checkpoint: Path, step: int, world_size: int) -> None:
    """Say that every rank has written its part of the checkpoint. Called by one rank after a barrier."""
    write_json(checkpoint / COMPLETE_FILE, {"step": step, "world_size": world_size})


def last_complete_checkpoint(output_dir: Path) -> Path | None:
    """The newest checkpoint that was finished; one that a kill cut short has no mark and is passed over."""
    found = []
    for folder in output_dir.glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
        if match and (folder / COMPLETE_FILE).is_file():
            found.append((int(match[1]), folder))
    return max(found)[1] if found else None


def check_resumable(checkpoint: Path, world_size: int, sharded: bool) -> None:
    """Raise UserError unless training can go on from the checkpoint. sharded: every rank wrote a part (DeepSpeed)."""
    try:
        mark = json.loads((checkpoint / COMPLETE_FILE).read_text(encoding="utf-8"))
        ranks = int(mark["world_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{checkpoint}: is no whole checkpoint (its {COMPLETE_FILE} is missing or damaged); name another one"
        ) from error
    if sharded and ranks != world_size:
        raise UserError(
            f"{checkpoint}: was written by {ranks} ranks, and DeepSpeed resumes with as many, not {world_size}"
        )


def claim(output_dir: Path, identity: dict) -> dict:
    """The state of the run in `output_dir`, {} for a new one.

    identity: what makes a run this run and not another. Raises UserError where the folder belongs to another run, or
    holds files of something else; nothing is written either way.
    """
    run_file = output_dir / RUN_FILE
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"output_dir {output_dir} is a file; choose a folder")
    if not run_file.is_file():
        if output_dir.is_dir() and any(output_dir.iterdir()):
            raise UserError(f"output_dir {output_dir} is not empty and holds no run of ssm-lm; choose another folder")
        return {}
    try:
        run = json.loads(run_file.read_text(encoding="utf-8"))
        theirs = run["identity"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{run_file} does not describe a run of ssm-lm ({error}); choose another output_dir") from error
    for key in identity:
        if theirs.get(key) != identity[key]:
            raise UserError(
                f"output_dir {output_dir} holds another run: its {_difference(key, theirs.get(key), identity[key])}; "
                "choose another output_dir, or the config that the run began with"
            )
    return run


def _difference(key, theirs, ours) -> str:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        inner = next(k for k in {**theirs, **ours} if theirs.get(k) != ours.get(k))
        return _difference(f"{key}.{inner}", theirs.get(inner), ours.get(inner))
    return f"{key} is {theirs!r}, not {ours!r}"
