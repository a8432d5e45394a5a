"""The folder OUTPUT.partial in which `ssm-lm prepare` works: what is done there stays done when a call is killed."""

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from ..errors import UserError, first_line
from ..files import write_json
from .encoding import part_path
from .manifest import MANIFEST_FILE, Manifest

PLAN = "plan.json"
UNITS = "units.json"
LOCK = "lock"


@dataclass(frozen=True)
class Plan:
    """What is being made: the first fields of the manifest, before there are tokens. request: what was asked for.

    splits: their names in order. divided: hashes of documents divide the text into them.
    """

    dataset: str
    description: str
    tokenizer: str
    vocab_size: int
    eos_token_id: int
    dtype: str
    splits: list[str]
    divided: bool
    request: dict

    @property
    def digest(self) -> str:
        """Tells the parts of this request from those of another."""
        return digest_of(self.request)


def digest_of(request: dict) -> str:
    """A hash of a request."""
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode("utf-8")).hexdigest()


class WorkFolder:
    """OUTPUT.partial, beside the OUTPUT that it takes the name of in the end.

    tokenizer/ and plan.json come first, then the parts in parts/ (see encoding.py), units.json with their number, the
    token files, the manifest.
    """

    def __init__(self, output: Path):
        self.output = output
        place = output.resolve()
        self.folder = place.with_name(f"{place.name}.partial")
        self.parts, self.shards, self.tokenizer = (self.folder / name for name in ("parts", "shards", "tokenizer"))

    @contextlib.contextmanager
    def held(self, shared: bool) -> Iterator[None]:
        """Make the folder and hold its lock: one call at a time, or several that `shared` it, on other units.

        A folder in which nothing is done is removed at the end. Raises UserError while another call holds it, OSError
        when it cannot be made.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / LOCK, "w", encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(
                    f"--output {self.output}: another `ssm-lm prepare` is writing it; wait for it, or choose another "
                    "folder"
                ) from error
            except OSError:  # a file system without locks: two calls would do the same work, and write the same
                pass
            try:
                yield
            finally:
                if not shared and not self.has_parts() and not (self.folder / MANIFEST_FILE).exists():
                    shutil.rmtree(self.folder, ignore_errors=True)

    def has_parts(self) -> bool:
        """Whether a part is done, so that there is something to go on from."""
        return next(self.parts.glob("*/*.json"), None) is not None

    def plan(self) -> Plan | None:
        """The plan that was begun, if there is one."""
        values = self._read(PLAN)
        try:
            return None if values is None else Plan(**values)
        except TypeError as error:
            raise UserError(f"{self.folder / PLAN}: not readable ({first_line(error)}); remove the folder") from error

    def begin(self, plan: Plan, tokenizer) -> None:
        """Keep the tokenizer and the plan. Several calls that do so write the same; the first one counts."""
        partial = self.folder / f"tokenizer.partial-{secrets.token_hex(4)}"
        tokenizer.save_pretrained(partial)
        try:
            os.rename(partial, self.tokenizer)
        except OSError:
            shutil.rmtree(partial)
            if not self.tokenizer.is_dir():
                raise
        write_json(self.folder / PLAN, asdict(plan))

    def units(self) -> int | None:
        """How many units the corpus has, where a call has come to its end."""
        values = self._read(UNITS)
        return None if values is None else values["units"]

    def set_units(self, number: int) -> None:
        """Keep how many units there are."""
        write_json(self.folder / UNITS, {"units": number})

    def counts(self, number: int, digest: str) -> dict | None:
        """The counts of a part by split; None while it is not done. UserError for the part of another request."""
        path = part_path(self.parts, number, "json")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: not readable ({first_line(error)}); remove it, and call again") from error
        if values["request"] != digest:
            raise UserError(
                f"{path}: is of another request (another text, tokenizer or filter); remove {self.folder}, or bring "
                "the parts of this one"
            )
        return values["splits"]

    def publish(self, manifest: Manifest) -> None:
        """Take the output's name, with what the manifest lists and the tokenizer alone.

        Everything else goes: what was needed for the way, and what calls that were killed had begun to write.
        """
        lists = [self.folder / MANIFEST_FILE, self.tokenizer]
        for name, split in manifest.splits.items():
            lists += [self.folder / file.file for file in manifest.files(name)]
            lists += [self.folder / split.unigram] * bool(split.unigram)
        _remove_all_but(self.folder, {*lists, self.folder / PLAN})
        (self.folder / PLAN).unlink(missing_ok=True)  # last: a call that was killed here knows what it was making
        os.rename(self.folder, self.output.resolve())

    def _read(self, name: str) -> dict | None:
        path = self.folder / name
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: not readable ({first_line(error)}); remove {self.folder}") from error


def _remove_all_but(folder: Path, kept: set[Path]) -> None:
    """Empty `folder`, but for the files and whole folders `kept` and the folders on the way to them."""
    for path in folder.iterdir():
        if path in kept:
            continue
        if any(path in other.parents for other in kept):
            _remove_all_but(path, kept)
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
