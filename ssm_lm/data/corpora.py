"""Sources of text. `load_corpus` takes a name or a path and gives the documents of each split.

Nothing is read or fetched before a split is iterated over, and a split can be iterated over as often as needed.
"""

import difflib
import functools
import glob
import hashlib
import io
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from ..errors import UserError, first_line
from ..extras import need
from ..hub_access import asking_the_hub
from . import builtin, hub
from .documents import Documents, HoldOut, Marked, documents_of
from .hub_datasets import HUB_PREFIX, hub_splits
from .pieces import pieces_of
from .remote import RemoteFile, is_remote, list_remote, remote_identity
from .text_files import DOCUMENTS, KNOWN_SUFFIXES, mark_documents, suffix_of

SPLITS = ("train", "validation", "test")
NAMES = ("wikitext-2", "wikitext-103", "builtin")
LEVELS = ("raw", "word")
WIKITEXT_HUB_ID = "Salesforce/wikitext"
AT_THE_END = "end"
HOLD_OUT = 0.01
# Of more than so many bytes of files, the ends are hashed and not the whole.
HASHED_BYTES = 1 << 32

_SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "valid": "validation",
    "validation": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}


@dataclass(frozen=True)
class Corpus:
    """Text in splits: `corpus["train"]` is an iterable of documents.

    name: as the user gave it, of a path only the last part. description: one line for people.
    identity(): what tells this text from another (sizes and hashes of files, versions), as JSON-able values.
    left_out: files of a folder that belong to no split.
    whole, hold_out: of a text without splits that its documents' hashes divide, all of it and what divides it.
    """

    name: str
    description: str
    splits: dict[str, Documents]
    identity: Callable[[], dict]
    left_out: tuple[str, ...] = ()
    whole: Documents | None = None
    hold_out: HoldOut | None = None

    def __getitem__(self, split: str) -> Iterable[str]:
        if split not in self.splits:
            raise UserError(f"{self.name}: no split {split!r}; there are {', '.join(self.splits)}")
        return self.splits[split]


def load_corpus(
    dataset: str | Path,
    *,
    level: str | None = None,
    documents: str = "auto",
    text_field: str = "text",
    hold_out: str | float | None = None,
    revision: str | None = None,
    split: str | None = None,
) -> Corpus:
    """The corpus that `dataset` names: one of NAMES, the path of a file or folder, a pattern of paths, the URL of
    files elsewhere, or `hub:ORG/NAME[/CONFIG]`, a data set of the Hub.

    level: of WikiText, "raw" (the default) or "word". documents: where a text file is cut, see `split_documents`.
    text_field: the field of JSON lines, Parquet and data sets that holds the text.
    hold_out: of a text without splits, "end" cuts validation and test off its end, 5 % each (the default of a local
    file or folder); a share gives each of them so many of the documents, by their hash (the default elsewhere: 0.01).
    revision, split: of a data set of the Hub, the commit, tag or branch (main), and the only split to take.
    Raises UserError for an unknown name, a missing path, or a folder whose files do not say what they are.
    """
    name = str(dataset)
    if level is not None and level not in LEVELS:
        raise UserError(f"--level {level}: unknown; choose one of {', '.join(LEVELS)}")
    if documents not in DOCUMENTS:
        raise UserError(f"--documents {documents}: unknown; choose one of {', '.join(DOCUMENTS)}")
    is_wikitext, is_hub = name.startswith("wikitext-") and name in NAMES, name.startswith(HUB_PREFIX)
    if level is not None and not is_wikitext:
        raise UserError(f"--level {level}: only wikitext-2 and wikitext-103 have levels; leave it out for {name}")
    for option, value in {"--revision": revision, "--split": split}.items():
        if value is not None and not is_hub:
            raise UserError(f"{option} {value}: only data sets of the Hub (hub:ORG/NAME) have it; leave it out")
    if name in NAMES and hold_out is not None:
        raise UserError(f"--hold-out {hold_out}: {name} has splits of its own; leave it out")
    if is_wikitext:
        return _wikitext(name, level or "raw", documents)
    if name == "builtin":
        splits = {split: Documents(functools.partial(_builtin, split)) for split in SPLITS}
        return Corpus(name, "English prose of the installed Python packages", splits, builtin.identity)
    if is_hub:
        return _hub(name, text_field, _share(hold_out, name) or HoldOut(HOLD_OUT), revision, split)
    if is_remote(name):
        return _remote(name, documents, text_field, hold_out)
    path = Path(name).expanduser()
    if path.exists():
        return _local(path, documents, text_field, hold_out)
    if glob.has_magic(name):
        return _matching(name, documents, text_field, hold_out)
    if path.suffix or len(path.parts) > 1:
        raise UserError(f"--dataset {name}: no such file or folder; known names are {', '.join(NAMES)}")
    nearest = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.0)[0]
    raise UserError(f"--dataset {name}: no such name, file or folder; did you mean {nearest}?")


def _share(hold_out: str | float | None, name: str) -> HoldOut | None:
    """How `--hold-out` divides a text by hashes; None where it does not say."""
    if hold_out is None:
        return None
    try:
        share = float(hold_out)
    except ValueError:
        share = -1.0
    if hold_out == AT_THE_END:
        raise UserError(f"--hold-out end: only a local file or folder has an end that stays; give a share for {name}")
    if not 0 < share < 0.5:
        raise UserError(f"--hold-out {hold_out}: give end, or a share of the documents between 0 and 0.5")
    return HoldOut(share)


def _divided(whole: Documents, hold_out: HoldOut) -> dict:
    """The fields of a Corpus whose documents' hashes say where they go."""

    def start(split: str) -> Marked:
        begins = True
        for piece, last in hold_out.only(split, pieces_of(whole.start())):
            yield begins, piece
            begins = last

    splits = {split: Documents(functools.partial(start, split)) for split in SPLITS}
    return {"splits": splits, "whole": whole, "hold_out": hold_out}


def _builtin(split: str) -> Marked:
    return ((True, document) for document in builtin.documents(split))


def _wikitext(name: str, level: str, documents: str) -> Corpus:
    config = f"{name}-raw-v1" if level == "raw" else f"{name}-v1"
    identity = {"hub": WIKITEXT_HUB_ID, "config": config}

    def start(split: str) -> Marked:
        return mark_documents(_hub_lines(config, split), documents)

    splits = {split: Documents(functools.partial(start, split)) for split in SPLITS}
    return Corpus(name, f"{WIKITEXT_HUB_ID} {config} of the Hugging Face Hub", splits, lambda: identity)


def _hub_lines(config: str, split: str) -> Iterator[str]:
    need(f"{WIKITEXT_HUB_ID} of the Hub", "train", "datasets")
    import datasets

    try:
        with hub.one_line_errors(), asking_the_hub():
            rows = datasets.load_dataset(WIKITEXT_HUB_ID, config, split=split)
    except Exception as error:  # the Hub's client has a dozen kinds, of several libraries, for "not reached"
        raise UserError(
            f"{WIKITEXT_HUB_ID} ({config}) could not be had from the Hub: {first_line(error)}; "
            "check the network, or give a local copy by --dataset PATH"
        ) from error
    for batch in rows.iter(batch_size=1000):
        for text in batch["text"]:
            # a row is a line; the blank lines, " \n" in the published files, come as ""
            yield text if text.endswith("\n") else (text or " ") + "\n"


def _hub(name: str, text_field: str, hold_out: HoldOut, revision: str | None, only: str | None) -> Corpus:
    splits, identity = hub_splits(name, text_field, revision, only)
    description = f"{identity['hub']} of the Hugging Face Hub at {identity['revision']}"
    by_split, left_out = {}, []
    for found, documents in splits.items():
        known = "train" if found == only else _SPLIT_WORDS.get(found.lower())
        if known is None or known in by_split:
            left_out.append(found)
        else:
            by_split[known] = documents
    if not by_split:
        raise UserError(f"{name}: its splits are {', '.join(splits)}; say which one to take by --split")
    by_split = {split: by_split[split] for split in SPLITS if split in by_split}
    fields = {"splits": by_split}
    if list(by_split) == ["train"]:
        fields = _divided(by_split["train"], hold_out)
    return Corpus(name, description, identity=lambda: identity, left_out=tuple(left_out), **fields)


def _remote(url: str, documents: str, text_field: str, hold_out: str | float | None) -> Corpus:
    hold_out = _share(hold_out, url) or HoldOut(HOLD_OUT)
    files = [file for file in list_remote(url) if suffix_of(file)]
    if not files:
        raise UserError(f"--dataset {url}: no file of a known kind; known are {KNOWN_SUFFIXES}")
    root = re.split(r"[*?[]", url)[0]
    return _of_files(url, "files", files, root, documents, text_field, hold_out)


def _matching(pattern: str, documents: str, text_field: str, hold_out: str | float | None) -> Corpus:
    found = sorted(glob.glob(str(Path(pattern).expanduser()), recursive=True))
    files = [path for path in map(Path, found) if path.is_file()]
    if not files:
        raise UserError(f"--dataset {pattern}: no file matches")
    for file in files:
        if not suffix_of(file):
            raise UserError(f"{file}: unknown kind of file; known are {KNOWN_SUFFIXES}")
    start = Path(re.split(r"[*?[]", str(Path(pattern).expanduser()))[0])
    root = start if start.is_dir() else start.parent
    hold_out = None if hold_out == AT_THE_END else _share(hold_out, pattern) or HoldOut(HOLD_OUT)
    return _of_files(Path(pattern).name, "files", files, root, documents, text_field, hold_out)


def _local(path: Path, documents: str, text_field: str, hold_out: str | float | None) -> Corpus:
    root = path if path.is_dir() else path.parent
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if suffix_of(file) and file.is_file()]
        files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]
        if not files:
            raise UserError(f"{path}: the folder holds no file of a known kind; known are {KNOWN_SUFFIXES}")
    elif not suffix_of(path):
        raise UserError(f"{path}: unknown kind of file; known are {KNOWN_SUFFIXES}")
    else:
        files = [path]
    kind = "folder" if path.is_dir() else "file"
    hold_out = None if hold_out == AT_THE_END else _share(hold_out, str(path))
    return _of_files(path.resolve().name, f"local {kind}", files, root, documents, text_field, hold_out)


def _of_files(
    name: str,
    kind: str,
    files: list[Path | RemoteFile],
    root: str | Path,
    documents: str,
    text_field: str,
    hold_out: HoldOut | None,
) -> Corpus:
    """A corpus of files that are named from `root`; without a hold_out, one that names no splits is cut at its end."""
    by_split = {split: [file for file in files if _split_of(file, root) == split] for split in SPLITS}
    by_split = {split: group for split, group in by_split.items() if group}

    if by_split:
        for split, group in by_split.items():
            _check_one_kind(split, group)
        used = [file for group in by_split.values() for file in group]
        fields = {"splits": {split: documents_of(group, documents, text_field) for split, group in by_split.items()}}
    else:
        used = files
        whole = documents_of(files, documents, text_field)
        fields = _divided(whole, hold_out) if hold_out else {"splits": _cut(whole, name)}

    def identity() -> dict:
        if isinstance(used[0], RemoteFile):
            return {str(file): remote_identity(file) for file in used}
        few = sum(file.stat().st_size for file in used) <= HASHED_BYTES
        return {_relative(file, root): _fingerprint(file, few) for file in used}

    kinds = ", ".join(sorted({suffix_of(file) for file in used}))
    description = f"{kind} {name} ({kinds}; documents: {documents})"
    left_out = tuple(_relative(file, root) for file in files if file not in set(used))
    return Corpus(name, description, identity=identity, left_out=left_out, **fields)


def _relative(file: Path | RemoteFile, root: str | Path) -> str:
    return str(file) if isinstance(file, RemoteFile) else file.relative_to(root).as_posix()


def _split_of(file: Path | RemoteFile, root: str | Path) -> str | None:
    """The split that the name of a file or of its folder speaks of: `wiki.valid.tokens`, `train-00001.jsonl`."""
    relative = _relative(file, root).removeprefix(str(root))
    words = re.split(r"[^a-z]+", relative.lower())
    found = sorted({_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS})
    if len(found) > 1:
        raise UserError(f"{file}: the name speaks of {' and '.join(found)}; rename it so that it names one split")
    return found[0] if found else None


def _check_one_kind(split: str, files: list[Path | RemoteFile]) -> None:
    """Shards of a split have one suffix; two suffixes are likely the same text twice."""
    kinds = {suffix_of(file): file for file in files}
    if len(kinds) > 1:
        first, second = (file.name for file in list(kinds.values())[:2])
        raise UserError(
            f"{str(files[0]).rpartition('/')[0]}: {first} and {second} are both the {split} split, in different "
            "formats; keep one of them, or give one file as --dataset"
        )


def _cut(whole: Documents, name: str) -> dict[str, Documents]:
    """Splits of a text that has none: the last 5 % are validation, the 5 % before them test.

    The cut is made between documents, or between lines when there are fewer than three documents.
    """

    def lines() -> Iterator[tuple[int, bool, str]]:
        """(the line's number, whether a document begins, a line or a part of one)"""
        number, inside = -1, False
        for begins, text in whole.start():
            for line in io.StringIO(text, newline="\n"):
                number += begins or not inside
                yield number, begins, line
                begins, inside = False, line[-1] != "\n"

    @functools.cache
    def bounds() -> tuple[bool, dict[str, range]]:
        count = sum(begins for begins, _ in whole.start())
        by_line = count < 3
        if by_line:
            count = max((number for number, *_ in lines()), default=-1) + 1
        if count == 0:
            raise UserError(f"{name}: holds no text")
        if count < 3:
            raise UserError(
                f"{name}: too short to be cut into {', '.join(SPLITS)}; give a folder with a file for each split"
            )
        held_out = max(1, round(0.05 * count))
        test, validation = count - 2 * held_out, count - held_out
        return by_line, {
            "train": range(test),
            "test": range(test, validation),
            "validation": range(validation, count),
        }

    def start(split: str) -> Marked:
        by_line, ranges = bounds()
        inside = ranges[split]
        if by_line:
            chosen = ((begins, line) for number, begins, line in lines() if number in inside)
            first = next(chosen, None)
            yield from [] if first is None else chain([(True, first[1])], chosen)
            return
        number = -1
        for begins, text in whole.start():
            number += begins
            if number in inside:
                yield begins, text

    return {split: Documents(functools.partial(start, split)) for split in SPLITS}


def _fingerprint(file: Path, whole: bool) -> dict:
    """The size and the hash of a file, or of its two ends where the files are too large to be read twice."""
    try:
        with open(file, "rb") as stream:
            size = file.stat().st_size
            if whole:
                return {"bytes": size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}
            ends = stream.read(1 << 16)
            stream.seek(max(0, size - (1 << 16)))
            return {"bytes": size, "sha256_of_ends": hashlib.sha256(ends + stream.read()).hexdigest()}
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error
