"""One unit of a corpus, encoded and written as a part: the work of a process of `ssm-lm prepare`."""

import contextlib
import hashlib
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..errors import UserError
from ..files import write_json
from .documents import HoldOut
from .tokenizer import BATCH_CHARACTERS, Encoder
from .units import Unit

COUNTS = ("tokens", "documents", "words", "lines", "bytes")
# What is kept of a document where duplicates are dropped: 16 bytes of its hash, 0 for one that stays in any case.
ROW = np.dtype([("key", "<u8", 2), *((name, "<i8") for name in COUNTS)])


def part_path(folder: Path, number: int, kind: str) -> Path:
    """The file of a part: kind is a split (its ids), SPLIT.rows (ROW of each document) or json (the counts; the part
    is whole when it is there).
    """
    return folder / f"{number // 1000:03}" / f"{number:06}.{kind}"


@dataclass(frozen=True)
class Encoding:
    """How units become parts; one for all processes.

    folder: of the parts. tokenizer: the path of a tokenizer.json. request: names what is being made. min_length:
    shorter documents, in characters, are left out. rows: write ROWs too.
    """

    folder: Path
    tokenizer: Path
    eos_token_id: int
    vocab_size: int
    dtype: str
    request: str
    hold_out: HoldOut | None = None
    min_length: int = 0
    rows: bool = False

    @cached_property
    def _encoder(self) -> Encoder:
        return Encoder(self.tokenizer.read_text(encoding="utf-8"), self.eos_token_id)

    def __call__(self, unit: Unit) -> dict:
        """Encode a unit, write its part, and return its counts: split -> {tokens, documents, words, lines, bytes}.

        Raises UserError for text that cannot be read, OSError for a part that cannot be written.
        """
        with contextlib.ExitStack() as stack:
            part = _Part(self, unit, stack)
            batch, characters = [], 0
            for item in self._chosen(unit):
                batch.append(item)
                characters += len(item[0])
                if characters >= BATCH_CHARACTERS:
                    part.write(batch, self._encoder.encode([item[:2] for item in batch]))
                    batch, characters = [], 0
            part.write(batch, self._encoder.encode([item[:2] for item in batch]))
            return part.publish()

    def _chosen(self, unit: Unit) -> Iterator[tuple[str, bool, str]]:
        """(piece, last, split) of the documents that are not left out."""
        split, begins = unit.continues, unit.continues is None
        for piece, last in unit.pieces():
            if begins:
                split = unit.split or self.hold_out.split_of(piece)
                if last and len(piece) < self.min_length:
                    split = None
            if split is not None:
                yield piece, last, split
            begins = last


@dataclass
class _Document:
    """What was seen of a document so far; whole: it began in this unit."""

    whole: bool
    counts: np.ndarray = field(default_factory=lambda: np.zeros(len(COUNTS), dtype=np.int64))
    digest: object = field(default_factory=lambda: hashlib.blake2b(digest_size=16))

    def row(self, ends: bool) -> np.ndarray:
        row = np.zeros(1, dtype=ROW)
        if self.whole and ends:
            row["key"] = np.frombuffer(self.digest.digest(), dtype="<u8")
        for name, number in zip(COUNTS, self.counts, strict=True):
            row[name] = number
        return row


class _Part:
    """The files of a part while they are written, under other names."""

    def __init__(self, encoding: Encoding, unit: Unit, stack: contextlib.ExitStack):
        self._encoding, self._number, self._stack = encoding, unit.number, stack
        self._suffix = f".partial-{secrets.token_hex(4)}"
        self._files: dict[str, BinaryIO] = {}
        self._counts: dict[str, np.ndarray] = {}
        self._inside_word = unit.inside_word
        self._document = _Document(whole=unit.continues is None)
        self._of_document = None
        part_path(encoding.folder, unit.number, "json").parent.mkdir(parents=True, exist_ok=True)

    def write(self, batch: list[tuple[str, bool, str]], ids_of_batch: list[list[int]]) -> None:
        """Add pieces and their ids."""
        for (text, last, split), ids in zip(batch, ids_of_batch, strict=True):
            data = np.array(ids, dtype=np.uint32)
            if len(data) and int(data.max()) >= self._encoding.vocab_size:
                raise UserError(
                    f"the tokenizer gives the id {int(data.max())}, beyond its {self._encoding.vocab_size} tokens; "
                    "choose another"
                )
            words = len(text.split()) - (self._inside_word and not text[0].isspace())
            size = len(text) if text.isascii() else len(text.encode("utf-8"))
            counts = np.array([len(ids), last, words, text.count("\n"), size])
            self._file(split).write(data.astype(self._encoding.dtype).tobytes())
            self._counts[split] += counts
            if self._encoding.rows:
                self._document.counts += counts
                self._document.digest.update(text.encode("utf-8"))
                self._of_document = split
                if last:
                    self._end_document(ends=True)
            self._inside_word = not last and not text[-1].isspace()

    def publish(self) -> dict:
        """Bring all to the disk and give it its names, that of the counts last."""
        if self._of_document is not None:
            self._end_document(ends=False)
        for kind, file in self._files.items():
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, part_path(self._encoding.folder, self._number, kind))
        splits = {split: dict(zip(COUNTS, map(int, numbers), strict=True)) for split, numbers in self._counts.items()}
        values = {"request": self._encoding.request, "splits": splits}
        write_json(part_path(self._encoding.folder, self._number, "json"), values)
        return splits

    def _end_document(self, ends: bool) -> None:
        self._file(f"{self._of_document}.rows").write(self._document.row(ends).tobytes())
        self._document, self._of_document = _Document(whole=True), None

    def _file(self, kind: str) -> BinaryIO:
        if kind not in self._files:
            path = part_path(self._encoding.folder, self._number, kind)
            partial = path.with_name(path.name + self._suffix)
            self._stack.callback(partial.unlink, missing_ok=True)
            self._files[kind] = self._stack.enter_context(open(partial, "wb"))
            if not kind.endswith(".rows"):
                self._counts[kind] = np.zeros(len(COUNTS), dtype=np.int64)
        return self._files[kind]
