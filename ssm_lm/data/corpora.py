"""Sources of text. `load_corpus` takes a name or a path and gives the documents of each split.

Nothing is read or fetched before a split is iterated over, and a split can be iterated over as often as needed.
"""

import difflib
import functools
import hashlib
import io
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path

from ..errors import UserError, first_line
from ..extras import need
from ..hub_access import asking_the_hub
from . import builtin, hub
from .text_files import DOCUMENTS, KNOWN_SUFFIXES, read_documents, split_documents, suffix_of

SPLITS = ("train", "validation", "test")
NAMES = ("wikitext-2", "wikitext-103", "builtin")
LEVELS = ("raw", "word")
WIKITEXT_HUB_ID = "Salesforce/wikitext"

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
class Documents:
    """The documents of one split, an iterable of str that starts anew each time."""

    start: Callable[[], Iterator[str]]

    def __iter__(self) -> Iterator[str]:
        return self.start()


@dataclass(frozen=True)
class Corpus:
    """Text in splits: `corpus["train"]` is an iterable of documents.

    name: as the user gave it, of a path only the last part. description: one line for people.
    identity(): what tells this text from another (sizes and hashes of files, versions), as JSON-able values.
    left_out: files of a folder that belong to no split.
    """

    name: str
    description: str
    splits: dict[str, Documents]
    identity: Callable[[], dict]
    left_out: tuple[str, ...] = ()

    def __getitem__(self, split: str) -> Iterable[str]:
        if split not in self.splits:
            raise UserError(f"{self.name}: no split {split!r}; there are {', '.join(self.splits)}")
        return self.splits[split]


def load_corpus(
    dataset: str | Path, *, level: str | None = None, documents: str = "auto", text_field: str = "text"
) -> Corpus:
    """The corpus that `dataset` names: one of NAMES, or the path of a file or folder.

    level: of WikiText, "raw" (the default) or "word". documents: where a text file is cut, see `split_documents`.
    text_field: the field of JSON lines and Parquet that holds the text.
    Raises UserError for an unknown name, a missing path, or a folder whose files do not say what they are.
    """
    name = str(dataset)
    if level is not None and level not in LEVELS:
        raise UserError(f"--level {level}: unknown; choose one of {', '.join(LEVELS)}")
    if documents not in DOCUMENTS:
        raise UserError(f"--documents {documents}: unknown; choose one of {', '.join(DOCUMENTS)}")
    if name.startswith("wikitext-") and name in NAMES:
        return _wikitext(name, level or "raw", documents)
    if level is not None:
        raise UserError(f"--level {level}: only wikitext-2 and wikitext-103 have levels; leave it out for {name}")
    if name == "builtin":
        splits = {split: Documents(functools.partial(builtin.documents, split)) for split in SPLITS}
        return Corpus(name, "English prose of the installed Python packages", splits, builtin.identity)
    path = Path(name).expanduser()
    if path.exists():
        return _local(path, documents, text_field)
    if path.suffix or len(path.parts) > 1:
        raise UserError(f"--dataset {name}: no such file or folder; known names are {', '.join(NAMES)}")
    nearest = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.0)[0]
    raise UserError(f"--dataset {name}: no such name, file or folder; did you mean {nearest}?")


def _wikitext(name: str, level: str, documents: str) -> Corpus:
    config = f"{name}-raw-v1" if level == "raw" else f"{name}-v1"
    identity = {"hub": WIKITEXT_HUB_ID, "config": config}

    def start(split: str) -> Iterator[str]:
        return split_documents(_hub_lines(config, split), documents)

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


def _local(path: Path, documents: str, text_field: str) -> Corpus:
    name = path.resolve().name
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

    by_split = {split: [file for file in files if _split_of(file, root) == split] for split in SPLITS}
    by_split = {split: group for split, group in by_split.items() if group}
    read = functools.partial(_read_files, documents=documents, text_field=text_field)
    if by_split:
        for split, group in by_split.items():
            _check_one_kind(split, group)
        used = [file for group in by_split.values() for file in group]
        splits = {split: Documents(functools.partial(read, group)) for split, group in by_split.items()}
    else:
        used = files
        splits = _cut(Documents(functools.partial(read, files)), path)

    def identity() -> dict:
        return {file.relative_to(root).as_posix(): _fingerprint(file) for file in used}

    kinds = ", ".join(sorted({suffix_of(file) for file in used}))
    description = f"local {'folder' if path.is_dir() else 'file'} {name} ({kinds}; documents: {documents})"
    left_out = tuple(file.relative_to(root).as_posix() for file in files if file not in set(used))
    return Corpus(name, description, splits, identity, left_out)


def _split_of(file: Path, root: Path) -> str | None:
    """The split that the name of a file or of its folder speaks of: `wiki.valid.tokens`, `train-00001.jsonl`."""
    words = re.split(r"[^a-z]+", file.relative_to(root).as_posix().lower())
    found = sorted({_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS})
    if len(found) > 1:
        raise UserError(f"{file}: the name speaks of {' and '.join(found)}; rename it so that it names one split")
    return found[0] if found else None


def _check_one_kind(split: str, files: list[Path]) -> None:
    """Shards of a split have one suffix; two suffixes are likely the same text twice."""
    kinds = {suffix_of(file): file for file in files}
    if len(kinds) > 1:
        first, second = (file.name for file in list(kinds.values())[:2])
        raise UserError(
            f"{files[0].parent}: {first} and {second} are both the {split} split, in different formats; "
            "keep one of them, or give one file as --dataset"
        )


def _read_files(files: list[Path], documents: str, text_field: str) -> Iterator[str]:
    for file in files:
        yield from read_documents(file, documents, text_field)


def _cut(documents: Documents, path: Path) -> dict[str, Documents]:
    """Splits of a text that has none: the last 5 % are validation, the 5 % before them test.

    The cut is made between documents, or between lines when there are fewer than three documents.
    """

    def lines() -> Iterator[tuple[int, str]]:
        for number, document in enumerate(documents):
            for line in io.StringIO(document, newline="\n"):
                yield number, line

    @functools.cache
    def bounds() -> tuple[bool, dict[str, range]]:
        count = sum(1 for _ in documents)
        by_line = count < 3
        if by_line:
            count = sum(1 for _ in lines())
        if count == 0:
            raise UserError(f"{path}: holds no text")
        if count < 3:
            raise UserError(
                f"{path}: too short to be cut into {', '.join(SPLITS)}; give a folder with a file for each split"
            )
        held_out = max(1, round(0.05 * count))
        test, validation = count - 2 * held_out, count - held_out
        return by_line, {
            "train": range(test),
            "test": range(test, validation),
            "validation": range(validation, count),
        }

    def start(split: str) -> Iterator[str]:
        by_line, ranges = bounds()
        inside = ranges[split]
        if not by_line:
            yield from (document for number, document in enumerate(documents) if number in inside)
            return
        chosen = (line for number, line in enumerate(lines()) if number in inside)
        for _, group in groupby(chosen, key=itemgetter(0)):
            yield "".join(line for _, line in group)

    return {split: Documents(functools.partial(start, split)) for split in SPLITS}


def _fingerprint(file: Path) -> dict:
    try:
        with open(file, "rb") as stream:
            return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error
