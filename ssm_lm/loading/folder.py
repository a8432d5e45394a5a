"""What a model folder is: the names of its files, which of its folders holds the model, and reading its JSON."""

import contextlib
import json
import logging
import re
import sys
from pathlib import Path

from ..errors import UserError, one_line

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
COMPLETE = "complete.json"  # the last file of a checkpoint that the trainer writes
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
LARGEST_JSON = 64 << 20  # bytes of a config.json or an index; a long one has thousands


def resolve(path: str | Path) -> Path | str:
    """The folder that `path` means, as a Path, or the Hub id that it is, as a str.

    Raises UserError for a path that is no folder and cannot be a Hub id, and for a folder without a model.
    """
    folder = Path(path).expanduser()
    if folder.is_file():
        raise UserError(f"{path}: is a file; give the folder that holds it")
    if not folder.is_dir():
        parts = Path(path).parts
        is_local = str(path).startswith((".", "~", "/")) or len(parts) != 2 or folder.parent.is_dir()
        if is_local or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
            raise UserError(f"{path}: no such folder; give a model folder or a Hub id such as user/name")
        return str(path)
    if (folder / CONFIG).is_file():
        return folder
    checkpoints = [entry for entry in folder.iterdir() if CHECKPOINT.fullmatch(entry.name) and entry.is_dir()]
    checkpoints = [entry for entry in checkpoints if (entry / CONFIG).is_file()]
    if not checkpoints:
        raise UserError(
            f"{folder / CONFIG}: no such file; give a folder that holds a model, or a training run's output"
        )
    # a run that was killed may leave its last one half written; the trainer's mark says which are whole
    return max(checkpoints, key=lambda entry: ((entry / COMPLETE).is_file(), int(CHECKPOINT.fullmatch(entry.name)[1])))


def read_json(file: Path) -> dict:
    """The object in a JSON file; UserError for one that is too large, too deep, or something else."""
    try:
        if file.stat().st_size > LARGEST_JSON:
            raise UserError(f"{file}: cannot be read: larger than {LARGEST_JSON >> 20} MiB")
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read ({one_line(error)})") from error
    if not isinstance(values, dict):
        raise UserError(f"{file}: cannot be read: holds {type(values).__name__}, not an object")
    return values


def check_links(folder: Path, root: Path, way_out: str) -> None:
    """Refuse a folder in which a link leads out of `root`: what it names would be published with the model.

    Looked at is what a model and its tokenizer are read from: the files of the folder, and those of its folders that
    are no checkpoints. Raises UserError, which ends with the way out.
    """
    for entry in sorted(folder.iterdir()):
        if CHECKPOINT.fullmatch(entry.name):
            continue
        for file in (entry, *sorted(entry.rglob("*"))):
            if file.is_symlink() and not file.resolve().is_relative_to(root.resolve()):
                raise UserError(f"{file}: is a link to a place outside of the folder; {way_out}")


@contextlib.contextmanager
def quiet():
    """No progress bars or loading reports, and nothing on stdout, which belongs to what the verbs print."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
