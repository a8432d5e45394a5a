"""The documents of one file on disk: plain text, JSON lines or Parquet, plain or compressed."""

import bz2
import gzip
import json
import lzma
import re
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain, pairwise
from pathlib import Path

from ..errors import UserError, first_line
from ..extras import need

TEXT = (".txt", ".text", ".tokens", ".raw", ".md")
JSON_LINES = (".jsonl", ".json")
PARQUET = ".parquet"
COMPRESSION = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open}
DOCUMENTS = ("auto", "file", "line", "blank", "heading")

KNOWN_SUFFIXES = f"{' '.join((*TEXT, *JSON_LINES, PARQUET))} (the text ones also with {' '.join(COMPRESSION)})"

# `= Title =` but not `= = Section = =`; WikiText puts a space before it
_HEADING = re.compile(r"[ \t]*= (?!= )(\S|\S.*\S)(?<! =) =[ \t]*$")


def suffix_of(path: Path) -> str:
    """The format of a file from its name, with its compression: ".txt", ".jsonl.xz"; "" when it is not one we read."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSION else ""
    last = suffixes[-1] if suffixes else ""
    if last in TEXT or last in JSON_LINES or (last == PARQUET and not compression):
        return last + compression
    return ""


def read_documents(path: Path, documents: str = "auto", text_field: str = "text") -> Iterator[str]:
    """Yield the documents of one file, none of them empty.

    `documents` says where a text file is cut; a row of JSON lines or Parquet is a document, whatever it says.
    The documents of a text file, concatenated, are the file's text to the byte.
    Raises UserError when the file cannot be read, is damaged, or lacks `text_field`.
    """
    suffix = suffix_of(path)
    try:
        if suffix.startswith(TEXT):
            found = split_documents(_text_lines(path), documents)
        elif suffix.startswith(JSON_LINES):
            found = _json_texts(path, text_field)
        elif suffix == PARQUET:
            found = _parquet_texts(path, text_field)
        else:
            raise UserError(f"{path}: unknown kind of file; known are {KNOWN_SUFFIXES}")
        yield from (document for document in found if document)
    except (lzma.LZMAError, zlib.error, gzip.BadGzipFile, EOFError) as error:
        raise UserError(f"{path}: the compressed file is damaged ({error}); get it again") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error


def split_documents(lines: Iterable[str], documents: str = "auto") -> Iterator[str]:
    """Group the lines of a text into documents, without changing a character.

    `documents`: "file" keeps them as one; "line" starts a document at each line that is not blank; "blank" at each
    line after a blank one; "heading" at each `= Title =` between blank lines (WikiText has formulas that look like a
    heading inside its paragraphs); "auto" is "heading" if the first line that is not blank is such a line, else "file".
    Blank lines belong to the document before them.
    """
    if documents not in DOCUMENTS:
        raise UserError(f"--documents {documents}: unknown; choose one of {', '.join(DOCUMENTS)}")
    document, has_text, after_blank = [], False, True
    for line, following in pairwise(chain(lines, [""])):
        blank = not line.strip()
        if not blank:
            if not has_text and documents == "auto":
                documents = "heading" if _HEADING.match(line.removeprefix("\ufeff")) else "file"
            starts = (
                documents == "line"
                or (documents == "blank" and after_blank)
                or (documents == "heading" and after_blank and not following.strip() and _HEADING.match(line))
            )
            if starts and has_text:
                yield "".join(document)
                document = []
            has_text = True
        document.append(line)
        after_blank = blank
    if document:
        yield "".join(document)


def _open(path: Path):
    return COMPRESSION.get(path.suffix.lower(), open)(path, "rb")


def _text_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file with their ends as they are; only `\\n` ends a line."""
    offset = 0
    with _open(path) as file:
        for line in file:
            try:
                yield line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path}: not UTF-8 at byte {offset + error.start}; convert the file first, for example with iconv"
                ) from error
            offset += len(line)


def _json_texts(path: Path, text_field: str) -> Iterator[str]:
    for number, line in enumerate(_text_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}: line {number} is not JSON ({error.msg}); one object a line is expected"
            ) from error
        if not isinstance(row, dict):
            raise UserError(f"{path}: line {number} is not an object; one object a line is expected")
        yield _text_of(row, text_field, f"{path}: line {number}")


def _parquet_texts(path: Path, text_field: str) -> Iterator[str]:
    need(f"{path}: a Parquet file", "train", "pyarrow")
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if text_field not in names:
                raise UserError(f"{path}: no field {text_field!r}, only {', '.join(names)}; choose one by --text-field")
            number = 0
            for batch in file.iter_batches(batch_size=256, columns=[text_field]):
                for row in batch.to_pylist():
                    number += 1
                    yield _text_of(row, text_field, f"{path}: row {number}")
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: not a readable Parquet file ({first_line(error)})") from error


def _text_of(row: dict, text_field: str, place: str) -> str:
    """The text of one row, checked: a string that has a UTF-8 form."""
    if text_field not in row:
        raise UserError(
            f"{place}: no field {text_field!r}, only {', '.join(row) or 'none'}; choose one by --text-field"
        )
    text = row[text_field]
    if not isinstance(text, str):
        raise UserError(f"{place}: field {text_field!r} is {type(text).__name__}, not text; choose one by --text-field")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{place}: field {text_field!r} holds half of a surrogate pair, which is no text") from error
    return text
