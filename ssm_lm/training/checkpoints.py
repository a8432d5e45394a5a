"""Which run a folder holds, and which of its checkpoints are whole."""

import json
import os
import re
import secrets
import shutil
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..errors import UserError
from ..files import write_json
from ..loading.folder import COMPLETE as COMPLETE_FILE
from .identity import fixed_difference
from .lock import LOCK_FILE

RUN_FILE = "run.json"
PARTIAL = ".partial"  # beginning of the names of folders that are being written or deleted


def publish(partial: Path, checkpoint: Path, facts: dict) -> None:
    """Verify a folder that every rank has written its part into, mark it complete, and give it its name.

    Each rank has called `flush_own_files` before. The mark lists every file with its size. The name comes by one
    rename, after the files have reached the disk: a checkpoint is there whole or not at all. facts: what else the mark
    says. Raises OSError, or UserError for a file that is not what its name says.
    """
    files = sorted(path for path in partial.rglob("*") if path.is_file() and path.name != COMPLETE_FILE)
    for path in files:
        verify(path)
    sizes = {str(path.relative_to(partial)): path.stat().st_size for path in files}
    write_json(partial / COMPLETE_FILE, facts | {"files": sizes})
    folders = sorted({path.parent for path in files} | {partial})
    for path in [partial / COMPLETE_FILE, *folders]:
        flush_to_disk(path)
    if read_mark(checkpoint) is not None:
        remove(partial)  # a whole one of this step is there: it is the same run's, and says the same
        return
    if checkpoint.exists():  # cut short, or damaged since: nothing goes on from it
        remove(checkpoint)
    os.rename(partial, checkpoint)
    flush_to_disk(checkpoint.parent)


def verify(path: Path) -> None:
    """Raise UserError if a file cannot be what its name says: cut short, or empty."""
    whole = path.stat().st_size > 0
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt"):
                pass  # reads the header, and checks that the file is as long as it says
        except (SafetensorError, OSError):
            whole = False
    elif path.suffix in (".pt", ".pth"):
        whole = zipfile.is_zipfile(path)  # its directory is at the end
    elif path.suffix == ".json":
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            whole = False
    if not whole:
        raise UserError(f"{path}: was not written whole; the last complete checkpoint is as it was")


def flush_own_files(partial: Path, rank: int) -> None:
    """Bring to the disk what this rank has written into a checkpoint; every rank calls it, before `publish`.

    A rank on another host has its files in that host's memory, where nobody else's fsync finds them. Raises OSError.
    """
    for path in partial.rglob("*"):
        if path.is_file() and written_by_rank(path.name) == rank:
            flush_to_disk(path)


def written_by_rank(name: str) -> int:
    """The rank that wrote a checkpoint's file, from its name; the first one wrote what does not say so."""
    match = re.search(r"pp_rank_(\d+)_|_(\d+)\.(?:pth|safetensors)$", name)
    return int(match[1] or match[2]) if match else 0


def flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint. It is renamed first, so that a folder called checkpoint-N never lacks files."""
    doomed = checkpoint.with_name(f"{PARTIAL}-{checkpoint.name}-{secrets.token_hex(4)}")
    os.rename(checkpoint, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_partial(output_dir: Path) -> None:
    """Delete what a run that was killed left half written or half deleted."""
    for folder in output_dir.glob(f"{PARTIAL}*"):
        shutil.rmtree(folder, ignore_errors=True)


def rotate(output_dir: Path, keep: int | None, best: str | None) -> None:
    """Delete complete checkpoints beyond the newest `keep` (None or 0: keep all), but never the best one."""
    checkpoints = complete_checkpoints(output_dir)
    for checkpoint in checkpoints[:-keep] if keep else []:
        if best is None or checkpoint.name != Path(best).name:
            remove(checkpoint)


def complete_checkpoints(output_dir: Path) -> list[Path]:
    """Those that were finished and still have all their files, the oldest first."""
    found = []
    for folder in output_dir.glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
        if match and read_mark(folder) is not None:
            found.append((int(match[1]), folder))
    return [folder for _, folder in sorted(found)]


def last_complete_checkpoint(output_dir: Path) -> Path | None:
    checkpoints = complete_checkpoints(output_dir)
    return checkpoints[-1] if checkpoints else None


def read_mark(checkpoint: Path) -> dict | None:
    """What `publish` wrote, or None where the checkpoint was not finished or has lost files since."""
    try:
        mark = json.loads((checkpoint / COMPLETE_FILE).read_text(encoding="utf-8"))
        sizes = mark.get("files", {})
        whole = "world_size" in mark and all((checkpoint / name).stat().st_size == sizes[name] for name in sizes)
    except (OSError, ValueError, AttributeError, TypeError):
        return None
    return mark if whole else None


def check_resumable(checkpoint: Path, identity: dict | None = None) -> dict:
    """The mark of a checkpoint. Raises UserError unless it is whole, holds more than weights, and, where both say so,
    is of a run that may go on as `identity`.
    """
    mark = read_mark(checkpoint)
    if mark is None:
        raise UserError(
            f"{checkpoint}: is no whole checkpoint (its {COMPLETE_FILE} or a file that it lists is missing or "
            "damaged); name another one"
        )
    if holds_weights_alone(mark):
        raise UserError(
            f"{checkpoint}: holds the weights alone (save_only_model), and no run goes on from these; a new one begins "
            f"with them: `--init_from {checkpoint}` and another output_dir"
        )
    theirs = mark.get("identity")
    if identity is not None and theirs is not None and (difference := fixed_difference(theirs, identity)):
        raise UserError(f"{checkpoint}: is of another run ({difference}); name one of this run")
    return mark


def holds_weights_alone(mark: dict) -> bool:
    """Whether a checkpoint lacks the optimizer. One that lists no files is from before marks listed them."""
    files = mark.get("files", {})
    return bool(files) and not any(name == "optimizer.pt" or name.startswith("global_step") for name in files)


def claim(output_dir: Path, identity: dict) -> dict:
    """The state of the run in `output_dir`, {} for a new one.

    identity: what makes a run this run and not another; of it, what a run may change is not looked at. Raises UserError
    where the folder belongs to another run, or holds files of something else; nothing is written either way.
    """
    run_file = output_dir / RUN_FILE
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"output_dir {output_dir} is a file; choose a folder")
    if not run_file.is_file():
        if output_dir.is_dir() and any(path.name != LOCK_FILE for path in output_dir.iterdir()):
            raise UserError(f"output_dir {output_dir} is not empty and holds no run of ssm-lm; choose another folder")
        return {}
    try:
        run = json.loads(run_file.read_text(encoding="utf-8"))
        difference = fixed_difference(run["identity"], identity)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{run_file} does not describe a run of ssm-lm ({error}); choose another output_dir") from error
    if difference:
        raise UserError(
            f"output_dir {output_dir} holds another run: its {difference}; choose another output_dir, or the config "
            "that the run began with"
        )
    return run
