"""The documents of one file: plain text, JSON lines or Parquet, plain or compressed, on disk or elsewhere.

A text is read as (begins, text) in order: parts of any length, none empty, each with whether a document begins with it.
So no more than a line, a row or `LONGEST_LINE` is held, however long a file or a document is.
"""

import bz2
import codecs
import gzip
import json
import lzma
import re
import zlib
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain, pairwise
from pathlib import Path

from ..errors import UserError, first_line
from ..extras import need
from .remote import RemoteFile

TEXT = (".txt", ".text", ".tokens", ".raw", ".md")
JSON_LINES = (".jsonl", ".json")
PARQUET = ".parquet"
COMPRESSION = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open}
LONGEST_LINE = 1 << 22  # bytes of a text without a line end that are held at once
DOCUMENTS = ("auto", "file", "line", "blank", "heading")

KNOWN_SUFFIXES = f"{' '.join((*TEXT, *JSON_LINES, PARQUET))} (the text ones also with {' '.join(COMPRESSION)})"

# `= Title =` but not `= = Section = =`; WikiText puts a space before it
_HEADING = re.compile(r"[ \t]*= (?!= )(\S|\S.*\S)(?<! =) =[ \t]*$")


def suffix_of(path: Path | RemoteFile) -> str:
    """The format of a file from its name, with its compression: ".txt", ".jsonl.xz"; "" when it is not one we read."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSION else ""
    last = suffixes[-1] if suffixes else ""
    if last in TEXT or last in JSON_LINES or (last == PARQUET and not compression):
        return last + compression
    return ""


def can_be_entered(path: Path | RemoteFile) -> bool:
    """Whether a file can be read from its middle on: rows that lie in it uncompressed, or a Parquet file."""
    return suffix_of(path) in (*JSON_LINES, PARQUET)


def read_documents(path: Path | RemoteFile, documents: str = "auto", text_field: str = "text") -> Iterator[str]:
    """Yield the documents of one file, none of them empty; arguments and errors as in `read_marked`."""
    return joined(read_marked(path, documents, text_field))


def joined(marked: Iterable[tuple[bool, str]]) -> Iterator[str]:
    """The documents of a text that is read as (begins, text)."""
    document = []
    for begins, text in marked:
        if begins and document:
            yield "".join(document)
            document = []
        document.append(text)
    if document:
        yield "".join(document)


def read_marked(
    path: Path | RemoteFile,
    documents: str = "auto",
    text_field: str = "text",
    start: int = 0,
    end: int | None = None,
) -> Iterator[tuple[bool, str]]:
    """Yield (begins, text) of one file.

    `documents` says where a text file is cut; a row of JSON lines or Parquet is a document, whatever it says, and an
    empty one is none. The documents of a text file, concatenated, are the file's text to the byte.
    start, end: of a file that can be entered, only the rows that begin in these bytes, of Parquet the row groups with
    these numbers.
    Raises UserError when the file cannot be read, is damaged, or lacks `text_field`.
    """
    suffix = suffix_of(path)
    try:
        if suffix.startswith(TEXT):
            yield from mark_documents(_text_lines(path, LONGEST_LINE), documents)
            return
        if suffix in JSON_LINES and (start, end) != (0, None):
            found = _json_texts_between(path, text_field, start, end)
        elif suffix.startswith(JSON_LINES):
            found = _json_texts(path, text_field)
        elif suffix == PARQUET:
            found = _parquet_texts(path, text_field, start, end)
        else:
            raise UserError(f"{path}: unknown kind of file; known are {KNOWN_SUFFIXES}")
        yield from ((True, document) for document in found if document)
    except (lzma.LZMAError, zlib.error, gzip.BadGzipFile, EOFError) as error:
        raise UserError(f"{path}: the compressed file is damaged ({error}); get it again") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or first_line(error)}") from error
    except UserError:
        raise
    except Exception as error:  # of the libraries behind a URL
        if not isinstance(path, RemoteFile):
            raise
        raise UserError(f"{path}: cannot be read any further ({first_line(error)}); check the network") from error


def split_documents(lines: Iterable[str], documents: str = "auto") -> Iterator[str]:
    """Group the lines of a text into documents, without changing a character; see `mark_documents`."""
    return joined(mark_documents(lines, documents))


def mark_documents(lines: Iterable[str], documents: str = "auto") -> Iterator[tuple[bool, str]]:
    """Yield (begins, line): whether a document begins with the line.

    `documents`: "file" keeps the lines as one; "line" starts a document at each line that is not blank; "blank" at each
    line after a blank one; "heading" at each `= Title =` between blank lines (WikiText has formulas that look like a
    heading inside its paragraphs); "auto" is "heading" if the first line that is not blank is such a line, else "file".
    Blank lines belong to the document before them.
    """
    if documents not in DOCUMENTS:
        raise UserError(f"--documents {documents}: unknown; choose one of {', '.join(DOCUMENTS)}")
    first, has_text, after_blank, inside_line = True, False, True, False
    for line, following in pairwise(chain(lines, [""])):
        blank, begins = not line.strip(), first
        if not blank and not inside_line:
            if not has_text and documents == "auto":
                documents = "heading" if _HEADING.match(line.removeprefix("\ufeff")) else "file"
            starts = (
                documents == "line"
                or (documents == "blank" and after_blank)
                or (documents == "heading" and after_blank and not following.strip() and _HEADING.match(line))
            )
            begins = first or bool(starts and has_text)
        yield begins, line
        first, has_text = False, has_text or not blank
        after_blank = blank and not (inside_line and not after_blank)
        inside_line = line[-1] != "\n"  # of a line that is longer than LONGEST_LINE


def _open(path: Path | RemoteFile):
    file = path.open("rb")
    compression = COMPRESSION.get(path.suffix.lower())
    return compression(file, "rb") if compression else file


def _text_lines(path: Path | RemoteFile, longest: int = -1) -> Iterator[str]:
    """The lines of a UTF-8 file with their ends as they are; only `\n` ends a line.

    longest: a line of more bytes comes in parts.
    """
    offset, decode = 0, codecs.getincrementaldecoder("utf-8")().decode
    with _open(path) as file:
        for line in chain(iter(partial(file.readline, longest), b""), [b""]):
            try:
                text = decode(line, not line or line[-1:] == b"\n")
            except UnicodeDecodeError as error:
                place = offset + len(line) - len(error.object) + error.start
                raise UserError(
                    f"{path}: not UTF-8 at byte {place}; convert the file first, for example with iconv"
                ) from error
            if text:
                yield text
            offset += len(line)


def _json_texts(path: Path | RemoteFile, text_field: str) -> Iterator[str]:
    for number, line in enumerate(_text_lines(path), 1):
        if line.strip():
            yield _json_text(line, text_field, f"{path}: line {number}")


def _json_texts_between(path: Path | RemoteFile, text_field: str, start: int, end: int | None) -> Iterator[str]:
    """The texts of the lines that begin at a byte from `start` to `end` - 1."""
    with path.open("rb") as file:
        place = start
        if start:
            file.seek(start - 1)
            place = start - 1 + len(file.readline())
        while end is None or place < end:
            data = file.readline()
            if not data:
                return
            try:
                line = data.decode("utf-8")
                text = _json_text(line, text_field, str(path)) if line.strip() else ""
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path}: not UTF-8 at byte {place + error.start}; convert the file first, for example with iconv"
                ) from error
            except UserError:
                # the line's number is known only by counting all before it, for which there is time now
                _json_text(line, text_field, f"{path}: line {_line_number(path, place)}")
                raise
            yield text
            place += len(data)


def _line_number(path: Path | RemoteFile, place: int) -> int:
    """The number, from 1, of the line that begins at the byte `place`."""
    number = 1
    with path.open("rb") as file:
        while place and (block := file.read(min(place, 1 << 20))):
            number += block.count(b"\n")
            place -= len(block)
    return number


def _json_text(line: str, text_field: str, where: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON ({error.msg}); one object a line is expected") from error
    if not isinstance(row, dict):
        raise UserError(f"{where} is not an object; one object a line is expected")
    return checked_text(row, text_field, where)


def _parquet_texts(path: Path | RemoteFile, text_field: str, start: int = 0, end: int | None = None) -> Iterator[str]:
    """The texts of the row groups from `start` to `end` - 1."""
    need(f"{path}: a Parquet file", "train", "pyarrow")
    import pyarrow
    import pyarrow.parquet

    try:
        # a few pages are read at a time; by default the chunk of a row group is held whole
        options = {"buffer_size": 1 << 20, "pre_buffer": False}
        with path.open("rb") as opened, pyarrow.parquet.ParquetFile(opened, **options) as file:
            names = file.schema_arrow.names
            if text_field not in names:
                raise UserError(f"{path}: no field {text_field!r}, only {', '.join(names)}; choose one by --text-field")
            groups = range(file.num_row_groups)[start:end]
            number = sum(file.metadata.row_group(group).num_rows for group in range(start))
            for batch in file.iter_batches(batch_size=256, columns=[text_field], row_groups=groups):
                for text in batch.column(0).to_pylist():
                    number += 1
                    yield checked_text({text_field: text}, text_field, f"{path}: row {number}")
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable Parquet file ({first_line(error)})") from error


def parquet_groups(path: Path | RemoteFile) -> list[int]:
    """The uncompressed bytes of each row group of a Parquet file."""
    need(f"{path}: a Parquet file", "train", "pyarrow")
    import pyarrow
    import pyarrow.parquet

    try:
        with path.open("rb") as opened, pyarrow.parquet.ParquetFile(opened) as file:
            return [file.metadata.row_group(group).total_byte_size for group in range(file.num_row_groups)]
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: not a readable Parquet file ({first_line(error)})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or first_line(error)}") from error


def checked_text(row: dict, text_field: str, place: str) -> str:
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
