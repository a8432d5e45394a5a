"""The text of a split, and what a corpus is divided by where it has no splits."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from .pieces import pieces_of
from .remote import RemoteFile
from .text_files import can_be_entered, joined, parquet_groups, read_marked, suffix_of

Marked = Iterator[tuple[bool, str]]  # (whether a document begins, text): see text_files.py
Pieces = Iterator[tuple[str, bool]]  # (text, whether it ends a document): see pieces.py

RANGE_BYTES = 1 << 23
# So many files that cannot be entered are read by the workers, a file at a time; fewer by one process, in order.
MANY_FILES = 32


@dataclass(frozen=True)
class FileRange:
    """A part of one file that a worker reads by itself: `start` and `end` as in `read_marked`."""

    path: Path | RemoteFile
    documents: str
    text_field: str
    start: int = 0
    end: int | None = None

    def __call__(self) -> Marked:
        return read_marked(self.path, self.documents, self.text_field, self.start, self.end)


@dataclass(frozen=True)
class Documents:
    """The documents of one split, an iterable of str that starts anew each time.

    start: gives the text in order. ranges: gives parts that make up the same text and can be read by themselves, in
    any process; None where the text can be read from front to back only.
    """

    start: Callable[[], Marked]
    ranges: Callable[[], Iterator[Callable[[], Marked]] | None] = lambda: None

    def __iter__(self) -> Iterator[str]:
        return joined(self.start())


def documents_of(
    files: list[Path | RemoteFile], documents: str, text_field: str, range_bytes: int | None = None
) -> Documents:
    """The documents of some files, one behind the other."""

    def start() -> Marked:
        for file in files:
            yield from read_marked(file, documents, text_field)

    return Documents(start, lambda: file_ranges(files, documents, text_field, range_bytes))


def file_ranges(
    files: list[Path | RemoteFile], documents: str, text_field: str, range_bytes: int | None = None
) -> Iterator[FileRange] | None:
    """Files in parts of about `range_bytes` (RANGE_BYTES); None where they are few and must be read front to back."""
    if len(files) < MANY_FILES and not all(can_be_entered(file) for file in files):
        return None
    # a file is looked at when it is its turn: what is done before one that cannot be had stays
    return (
        FileRange(file, documents, text_field, start, end)
        for file in files
        for start, end in _bounds(file, range_bytes or RANGE_BYTES, len(files))
    )


def _bounds(file: Path | RemoteFile, range_bytes: int, number: int) -> Iterator[tuple[int, int | None]]:
    is_parquet = suffix_of(file) == ".parquet"
    # looking into a remote file is a round trip; of many, each is a part of its own
    if not can_be_entered(file) or (isinstance(file, RemoteFile) and number >= MANY_FILES):
        yield 0, None
    elif is_parquet:
        first, size = 0, 0
        groups = parquet_groups(file)
        for group, group_bytes in enumerate(groups, 1):
            size += group_bytes
            if size >= range_bytes or group == len(groups):
                yield first, group
                first, size = group, 0
    else:
        size = size_of(file)
        for start in range(0, size, range_bytes):
            yield start, None if start + range_bytes >= size else start + range_bytes


def size_of(file: Path | RemoteFile) -> int:
    """The bytes of a file; UserError where it is not there."""
    try:
        if isinstance(file, RemoteFile):
            with file.open("rb") as opened:
                return opened.seek(0, 2)
        return file.stat().st_size
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror or error}") from error


@dataclass(frozen=True)
class HoldOut:
    """Divides a text that has no splits: `share` of the documents are validation and as many test, the others train.

    A document's own hash decides (of its first piece, which for all but the longest is the whole), so a document stays
    where it is when others come to it, and the same one is never in two splits.
    """

    share: float

    def split_of(self, first_piece: str) -> str:
        """The split of the document that begins with a piece."""
        digest = hashlib.blake2b(first_piece.encode("utf-8"), digest_size=8).digest()
        place = int.from_bytes(digest, "big") / 2**64
        return "validation" if place < self.share else "test" if place < 2 * self.share else "train"

    def only(self, split: str, text: Pieces) -> Pieces:
        """The pieces of the documents of one split."""
        found = None
        for piece, last in text:
            found = found or self.split_of(piece)
            if found == split:
                yield piece, last
            if last:
                found = None


def first_bytes(text: Marked, max_bytes: int | None) -> Marked:
    """The first documents that fit into `max_bytes` of UTF-8, and at least one; None: all."""
    if max_bytes is None:
        yield from text
        return
    used, document, number = 0, [], -1
    for begins, part in text:
        if begins:
            yield from document
            document, number = [], number + 1
        document.append((begins, part))
        used += len(part.encode("utf-8"))
        if used > max_bytes and number > 0:
            return
        if number == 0:  # however long it is
            yield from document
            document = []
    yield from document


def sample(sources: Iterable[Callable[[], Marked]], max_bytes: int, hold_out: HoldOut | None) -> Iterator[str]:
    """About `max_bytes` of the text of the train split, in pieces, as much of each source from its beginning on."""
    sources = list(sources)
    for source in sources:
        left = max_bytes / len(sources)
        text = pieces_of(source())
        for piece, _ in hold_out.only("train", text) if hold_out else text:
            yield piece
            left -= len(piece.encode("utf-8"))
            if left <= 0:
                break
