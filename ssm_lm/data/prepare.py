"""`ssm-lm prepare`: turn a corpus into a folder of tokens.

The folder holds train.bin, validation.bin and test.bin (the token ids, little endian, nothing else), `tokenizer/` and
`manifest.json`. It is written beside its place under another name and renamed when complete, so a folder that has the
name is whole.
"""

import argparse
import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..errors import UserError
from ..files import new_folder
from .corpora import LEVELS, NAMES, Corpus, load_corpus
from .manifest import DTYPES, FORMAT_VERSION, MANIFEST_FILE, Manifest, SplitInfo
from .text_files import DOCUMENTS
from .tokenizer import (
    Encoder,
    is_trained_here,
    load_tokenizer,
    obtain_tokenizer,
    tokenizer_hash,
    vocabulary_size,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument(
        "--dataset", required=True, metavar="NAME|PATH", help=f"{', '.join(NAMES)}, or a file or folder of text"
    )
    parser.add_argument(
        "--tokenizer",
        required=True,
        metavar="NAME|PATH",
        help="a folder or Hub name; bpe:SIZE or words[:SIZE] to train one on the train split",
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="the folder to write; must be new")
    parser.add_argument("--level", choices=LEVELS, help="WikiText only: raw text (default) or the word-level files")
    parser.add_argument(
        "--documents", choices=DOCUMENTS, default="auto", help="where a document of a text file begins (default: auto)"
    )
    parser.add_argument(
        "--text-field", default="text", metavar="NAME", help="the field of JSON lines and Parquet (default: text)"
    )
    parser.add_argument(
        "--max-bytes", type=int, metavar="N", help="of each split, only the first documents that fit into N bytes"
    )


def run(args: argparse.Namespace) -> None:
    """Prepare as the arguments say and print a table of what there is."""
    is_new = not args.output.exists()
    manifest = prepare(
        args.dataset,
        args.tokenizer,
        args.output,
        level=args.level,
        documents=args.documents,
        text_field=args.text_field,
        max_bytes=args.max_bytes,
        show_progress=sys.stderr.isatty(),
    )
    print_summary(manifest, args.output, is_new)


def prepare(
    dataset: str | Path,
    tokenizer: str | Path,
    output: str | Path,
    *,
    level: str | None = None,
    documents: str = "auto",
    text_field: str = "text",
    max_bytes: int | None = None,
    show_progress: bool = False,
) -> Manifest:
    """Tokenise `dataset` into the folder `output` and return its manifest.

    dataset, level, documents, text_field: as in `load_corpus`. tokenizer: as in `obtain_tokenizer`.
    max_bytes: of each split, only the first documents that fit into so many bytes of UTF-8, and at least one.
    A folder that the same request made already is left as it is. Raises UserError for bad input, for a folder that
    something else made, and when the disk is full; then nothing is left behind.
    """
    output, tokenizer = Path(output).expanduser(), str(tokenizer)
    if max_bytes is not None and max_bytes < 1:
        raise UserError(f"--max-bytes {max_bytes}: must be 1 or more")
    corpus = load_corpus(dataset, level=level, documents=documents, text_field=text_field)
    request = {
        "dataset": corpus.name,
        "source": corpus.identity(),
        "documents": documents,
        "text_field": text_field,
        "max_bytes": max_bytes,
        "tokenizer": tokenizer_name(tokenizer),
    }
    if Path(tokenizer).expanduser().is_dir() and not is_trained_here(tokenizer):
        request["tokenizer_definition"] = tokenizer_hash(load_tokenizer(tokenizer))
    finished = _finished(output, request)
    if finished is not None:
        return finished

    try:
        with new_folder(output) as partial:
            manifest = _write(corpus, tokenizer, request, partial, _progress(show_progress))
    except OSError as error:
        raise UserError(
            f"--output {output}: cannot be written: {error.strerror or error}; nothing was kept, choose another place"
        ) from error
    for name in corpus.left_out:
        print(f"{corpus.name}: left out {name}, for its name speaks of no split", file=sys.stderr)
    return manifest


def tokenizer_name(tokenizer: str) -> str:
    """How the manifest calls a tokenizer: a folder by its last part, and not by where it lay."""
    path = Path(tokenizer).expanduser()
    return path.resolve().name if path.is_dir() and not is_trained_here(tokenizer) else tokenizer


def print_summary(manifest: Manifest, output: Path, is_new: bool) -> None:
    """Print the table of the splits."""
    console = Console()
    columns = ("split", "documents", "tokens", "words", "bytes", "tokens per word")
    table = Table(title=f"{manifest.dataset}, {manifest.tokenizer} ({manifest.vocab_size:,} tokens)")
    for column in columns:
        table.add_column(column, justify="left" if column == "split" else "right")
    for name, split in manifest.splits.items():
        counts = (split.documents, split.tokens, split.words, split.bytes)
        table.add_row(name, *(f"{count:,}" for count in counts), f"{split.tokens / max(split.words, 1):.3f}")
    console.print(table)
    print(f"{output}: {'done' if is_new else 'was done already, nothing changed'}")


def _finished(output: Path, request: dict) -> Manifest | None:
    """The manifest if `output` holds what is asked for; None if there is room to make it; else UserError."""
    if not os.path.lexists(output) or (output.is_dir() and not any(output.iterdir())):
        return None
    if not output.is_dir():
        raise UserError(f"--output {output}: is a file; choose another folder")
    if not (output / MANIFEST_FILE).exists():
        raise UserError(f"--output {output}: the folder is not empty and was not made by prepare; choose another")
    manifest = Manifest.read(output)
    for key in {**request, **manifest.request}:
        asked, had = request.get(key), manifest.request.get(key)
        if asked != had:
            difference = f"{key.replace('_', ' ')} {had}, not {asked}"
            if key in ("source", "tokenizer_definition"):  # hashes: too long, and no help
                difference = f"another {'text' if key == 'source' else 'tokenizer'} under the same name"
            raise UserError(f"--output {output}: was prepared with {difference}; choose another folder")
    for name, split in manifest.splits.items():
        path = output / f"{name}.bin"
        if not path.is_file() or path.stat().st_size != split.tokens * np.dtype(DTYPES[manifest.dtype]).itemsize:
            raise UserError(f"{path}: missing or cut short; remove {output} and prepare it again")
    return manifest


def _write(corpus: Corpus, tokenizer_argument: str, request: dict, folder: Path, progress: Progress) -> Manifest:
    """Write every file of the prepared folder; the manifest last."""
    with progress:
        task = progress.add_task(f"tokenizer {request['tokenizer']}", total=None)
        limited = _Limited(corpus, request["max_bytes"])
        tokenizer = obtain_tokenizer(tokenizer_argument, limited)
        tokenizer.save_pretrained(folder / "tokenizer")
        vocab_size = vocabulary_size(tokenizer)
        dtype = "uint16" if vocab_size < 1 << 16 else "uint32"
        encoder, splits = Encoder(tokenizer), {}
        for name in corpus.splits:

            def report(info: dict, name: str = name) -> None:
                progress.update(task, description=f"{name}: {info['documents']:,} documents, {info['tokens']:,} tokens")

            splits[name] = _write_split(encoder, limited[name], folder / f"{name}.bin", DTYPES[dtype], report)
            if splits[name].words == 0:  # line ends alone are none
                raise UserError(f"{corpus.name}: the {name} split holds no text; give it some, or leave its file out")
    with open(folder / "tokenizer" / "tokenizer.json", "rb") as file:
        tokenizer_sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        dataset=corpus.name,
        description=corpus.description,
        tokenizer=request["tokenizer"],
        tokenizer_sha256=tokenizer_sha256,
        vocab_size=vocab_size,
        eos_token_id=tokenizer.eos_token_id,
        dtype=dtype,
        splits=splits,
        request=request,
    )
    manifest.write(folder)
    return manifest


def _write_split(
    encoder: Encoder, documents: Iterable[str], path: Path, dtype: str, report: Callable[[dict], None]
) -> SplitInfo:
    """Write one split, and count it in the same pass; at no time is more than a batch held."""
    counts = dict.fromkeys(("tokens", "documents", "words", "lines", "bytes"), 0)
    digest = hashlib.sha256()
    inside_word = False  # a word longer than a piece spans two of them
    with open(path, "wb") as file:
        for text, ids, last in encoder(documents):
            data = np.array(ids, dtype=dtype).tobytes()
            file.write(data)
            digest.update(data)
            counts["tokens"] += len(ids)
            counts["documents"] += last
            counts["words"] += len(text.split()) - (inside_word and not text[0].isspace())
            counts["lines"] += text.count("\n")
            counts["bytes"] += len(text.encode("utf-8"))
            inside_word = not last and not text[-1].isspace()
            report(counts)
        file.flush()
        os.fsync(file.fileno())
    return SplitInfo(**counts, sha256=digest.hexdigest())


class _Limited:
    """A corpus of which each split ends after `max_bytes`."""

    def __init__(self, corpus: Corpus, max_bytes: int | None):
        self._corpus, self._max_bytes = corpus, max_bytes

    def __getitem__(self, split: str) -> Iterable[str]:
        documents = self._corpus[split]
        return documents if self._max_bytes is None else _first_bytes(documents, self._max_bytes)


def _first_bytes(documents: Iterable[str], max_bytes: int) -> Iterator[str]:
    used = 0
    for number, document in enumerate(documents):
        used += len(document.encode("utf-8"))
        if used > max_bytes and number > 0:
            return
        yield document


def _progress(show: bool) -> Progress:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=not show)
