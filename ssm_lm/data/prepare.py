"""`ssm-lm prepare`: turn a corpus into a folder of tokens.

The folder holds the token files of each split (the ids, little endian, nothing else), `tokenizer/` and `manifest.json`.
A split that fits into one file is SPLIT.bin, a larger one SPLIT/00000.bin and so on, all of one size but the last.

The work is done in OUTPUT.partial, which takes the name when it is complete, so a folder that has the name is whole. A
corpus is cut into units, which any number of processes encode and write as parts; the parts, one behind the other, are
then cut into token files. A call that was killed leaves its parts, and the same call goes on from them.
"""

import argparse
import contextlib
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..errors import UserError, one_line
from ..processors import usable
from .assembly import NoText, assemble
from .corpora import HOLD_OUT, LEVELS, NAMES, Corpus, load_corpus
from .documents import first_bytes, sample
from .encoding import COUNTS, Encoding
from .hub import one_line_errors
from .manifest import DTYPES, MANIFEST_FILE, Manifest
from .processes import run_units
from .shards import check_size
from .text_files import DOCUMENTS
from .tokenizer import (
    is_trained_here,
    load_tokenizer,
    obtain_tokenizer,
    tokenizer_hash,
    vocabulary_size,
)
from .units import Unit, units_of
from .work_folder import Plan, WorkFolder

SHARD_TOKENS = 1 << 28
TOKENIZER_SAMPLE = 10**9
LONGEST_MINIMUM = 100_000  # of --min-length: less than a piece, so that a document's first piece tells


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    source = parser.add_argument_group("the text")
    source.add_argument(
        "--dataset",
        metavar="NAME|PATH|URL",
        help=f"{', '.join(NAMES)}; a file, folder or pattern of text; hub:ORG/NAME[/CONFIG], a data set of the Hub; or "
        "a URL of files that fsspec knows (s3://, gs://, hf://)",
    )
    source.add_argument("--level", choices=LEVELS, help="WikiText only: raw text (default) or the word-level files")
    source.add_argument(
        "--revision", metavar="COMMIT", help="of the Hub: a commit, tag or branch (default: main, pinned)"
    )
    source.add_argument("--split", metavar="NAME", help="of the Hub: the one split to take, and to hold out of")
    source.add_argument(
        "--documents", choices=DOCUMENTS, default="auto", help="where a document of a text file begins (default: auto)"
    )
    source.add_argument(
        "--text-field", default="text", metavar="NAME", help="the field of rows that holds the text (default: text)"
    )
    source.add_argument(
        "--max-bytes", type=int, metavar="N", help="of each split, only the first documents that fit into N bytes"
    )
    source.add_argument(
        "--hold-out",
        metavar="SHARE|end",
        help="of a text without splits: validation and test get each this share of the documents, by their hash "
        f"(default: {HOLD_OUT}), or 5%% off its end (default of a local file or folder)",
    )
    source.add_argument(
        "--min-length", type=int, default=0, metavar="N", help="leave out documents of fewer than N characters"
    )
    source.add_argument(
        "--drop-duplicates", action="store_true", help="keep the first of documents of a split that are the same"
    )
    tokens = parser.add_argument_group("its tokens")
    tokens.add_argument(
        "--tokenizer",
        metavar="NAME|PATH",
        help="a folder or Hub name; bpe:SIZE or words[:SIZE] to train one on the train split",
    )
    tokens.add_argument(
        "--tokenizer-sample",
        type=int,
        default=TOKENIZER_SAMPLE,
        metavar="BYTES",
        help=f"bpe is trained on so much of the train split, taken from all over it (default: {TOKENIZER_SAMPLE:,})",
    )
    tokens.add_argument(
        "--shard-tokens", type=int, default=SHARD_TOKENS, metavar="N", help=f"of one file (default: {SHARD_TOKENS:,})"
    )
    work = parser.add_argument_group("the work")
    work.add_argument("--output", required=True, type=Path, metavar="DIR", help="the folder to write; must be new")
    work.add_argument("--workers", type=int, metavar="N", help="processes; the result is the same (default: all cores)")
    work.add_argument(
        "--shard",
        metavar="I/N",
        help="do the I-th of N shares alone, for N machines with one file system; then --merge",
    )
    work.add_argument("--merge", action="store_true", help="put together what all of --shard have done")


def run(args: argparse.Namespace) -> None:
    """Prepare as the arguments say and print a table of what there is."""
    if args.merge:
        manifest = merge(args.output, workers=args.workers)
        print_summary(manifest, args.output, is_new=True)
        return
    for option in ("dataset", "tokenizer"):
        if getattr(args, option) is None:
            raise UserError(f"--{option} is missing; see `ssm-lm prepare --help`")
    is_new = not args.output.exists()
    options = {name: value for name, value in vars(args).items() if name in OPTIONS}
    manifest = prepare(args.dataset, args.tokenizer, args.output, show_progress=sys.stderr.isatty(), **options)
    if manifest is None:
        print(f"{args.output}: share {args.shard} is done; when all are: ssm-lm prepare --merge --output {args.output}")
    else:
        print_summary(manifest, args.output, is_new)


OPTIONS = (
    *("level", "documents", "text_field", "max_bytes", "hold_out", "revision", "split", "min_length"),
    *("drop_duplicates", "tokenizer_sample", "shard_tokens", "workers", "shard"),
)


def prepare(
    dataset: str | Path,
    tokenizer: str | Path,
    output: str | Path,
    *,
    level: str | None = None,
    documents: str = "auto",
    text_field: str = "text",
    max_bytes: int | None = None,
    hold_out: str | float | None = None,
    revision: str | None = None,
    split: str | None = None,
    min_length: int = 0,
    drop_duplicates: bool = False,
    tokenizer_sample: int = TOKENIZER_SAMPLE,
    shard_tokens: int = SHARD_TOKENS,
    workers: int | None = None,
    shard: str | None = None,
    show_progress: bool = False,
) -> Manifest | None:
    """Tokenise `dataset` into the folder `output` and return its manifest.

    dataset, level, documents, text_field, hold_out, revision, split: as in `load_corpus`. tokenizer: as in
    `obtain_tokenizer`. max_bytes: of each split, only the first documents that fit into so many bytes of UTF-8, and at
    least one. min_length: documents of fewer characters are left out. drop_duplicates: so are copies of an earlier
    document of the split; a document that is longer than a unit is never one. workers: processes, None for all cores;
    the folder is the same for any number. shard: "I/N" does the I-th of N shares and returns None; see `merge`.

    A folder that the same request made already is left as it is, and one that was begun goes on. Raises UserError for
    bad input, for a folder that something else made, and when the disk is full.
    """
    output, tokenizer = Path(output).expanduser(), str(tokenizer)
    at_least_one = {"--max-bytes": max_bytes, "--tokenizer-sample": tokenizer_sample, "--shard-tokens": shard_tokens}
    for option, value in {**at_least_one, "--workers": workers}.items():
        if value is not None and value < 1:
            raise UserError(f"{option} {value}: must be 1 or more")
    if not 0 <= min_length <= LONGEST_MINIMUM:
        raise UserError(f"--min-length {min_length}: must be between 0 and {LONGEST_MINIMUM}")
    share = _share_of(shard)
    work = WorkFolder(output)
    revision = revision or _pinned_revision(work, str(dataset))
    corpus = load_corpus(
        dataset,
        level=level,
        documents=documents,
        text_field=text_field,
        hold_out=hold_out,
        revision=revision,
        split=split,
    )
    request = {
        "dataset": corpus.name,
        "source": corpus.identity(),
        "documents": documents,
        "text_field": text_field,
        "max_bytes": max_bytes,
        "tokenizer": tokenizer_name(tokenizer),
    }
    # what an earlier version did not know stands there where it was asked for
    request |= {
        name: value
        for name, value, usual in (
            ("hold_out", None if corpus.hold_out is None else corpus.hold_out.share, None),
            ("min_length", min_length, 0),
            ("drop_duplicates", drop_duplicates, False),
            ("tokenizer_sample", tokenizer_sample, TOKENIZER_SAMPLE),
            ("shard_tokens", shard_tokens, SHARD_TOKENS),
        )
        if value != usual
    }
    if Path(tokenizer).expanduser().is_dir() and not is_trained_here(tokenizer):
        request["tokenizer_definition"] = tokenizer_hash(load_tokenizer(tokenizer))
    finished = _finished(output, request)
    if finished is not None:
        return finished

    with _writing(work, shared=shard is not None), _progress(show_progress) as progress:
        report = _Report(progress)
        plan = _plan(work, corpus, tokenizer, request, report)
        encoding = Encoding(
            folder=work.parts,
            tokenizer=work.tokenizer / "tokenizer.json",
            eos_token_id=plan.eos_token_id,
            vocab_size=plan.vocab_size,
            dtype=DTYPES[plan.dtype],
            request=plan.digest,
            hold_out=corpus.hold_out,
            min_length=min_length,
            rows=drop_duplicates,
        )
        if not (work.folder / MANIFEST_FILE).exists():
            units = _not_done(work, plan, corpus, share, report)
            try:
                with one_line_errors():
                    run_units(units, encoding, workers or usable(), report)
            except UserError as error:
                if not work.has_parts():
                    raise
                raise UserError(f"{error}; what is done is kept, and the same command goes on") from error
            if shard is not None:
                return None
            report.say("putting the token files together")
            assemble(work, plan, shard_tokens, workers or usable())
        manifest = Manifest.read(work.folder)
        work.publish(manifest)
    for name in corpus.left_out:
        print(f"{corpus.name}: left out {name}, for its name speaks of no split", file=sys.stderr)
    return manifest


def merge(output: str | Path, *, workers: int | None = None) -> Manifest:
    """Put together what the shares of `prepare` have done, and return the manifest.

    Raises UserError when one has not ended, or a part is of another request.
    """
    output = Path(output).expanduser()
    work = WorkFolder(output)
    if (output / MANIFEST_FILE).exists():
        return Manifest.read(output)
    if not work.folder.is_dir():
        raise UserError(f"--merge: {work.folder} is not there; prepare its shares first, by --shard I/N")
    with _writing(work, shared=False):
        if not (work.folder / MANIFEST_FILE).exists():
            plan = work.plan()
            if plan is None:
                raise UserError(f"--merge: {work.folder} holds no plan; prepare its shares first, by --shard I/N")
            shard_tokens = plan.request.get("shard_tokens", SHARD_TOKENS)
            assemble(work, plan, shard_tokens, workers or usable())
        manifest = Manifest.read(work.folder)
        work.publish(manifest)
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
    difference = _difference(request, manifest.request)
    if difference:
        raise UserError(f"--output {output}: was prepared with {difference}; choose another folder")
    for split in manifest.splits:
        for file in manifest.files(split):
            check_size(output / file.file, file.tokens, np.dtype(DTYPES[manifest.dtype]))
    return manifest


def _difference(request: dict, had: dict) -> str:
    """In what an earlier request was another one, in words; "" where it was the same."""
    for key in {**request, **had}:
        if request.get(key) != had.get(key):
            if key in ("source", "tokenizer_definition"):  # hashes: too long, and no help
                return f"another {'text' if key == 'source' else 'tokenizer'} under the same name"
            return f"{key.replace('_', ' ')} {had.get(key)}, not {request.get(key)}"
    return ""


@contextlib.contextmanager
def _writing(work: WorkFolder, shared: bool) -> Iterator[None]:
    """Hold the work folder; whatever ends the block is one line that says what was kept."""
    try:
        with work.held(shared):
            yield
    except NoText:
        shutil.rmtree(work.folder, ignore_errors=True)
        raise
    except OSError as error:
        kept = "what is done is kept, the same command goes on" if work.has_parts() else "nothing was kept"
        raise UserError(
            f"--output {work.output}: cannot be written: {error.strerror or one_line(error)}; {kept}; make room, or "
            "choose another place"
        ) from error


def _plan(work: WorkFolder, corpus: Corpus, tokenizer_argument: str, request: dict, report: "_Report") -> Plan:
    """The plan that an earlier call has begun, or a new one with its tokenizer."""
    plan = work.plan()
    if plan is not None:
        difference = _difference(request, plan.request)
        if difference:
            raise UserError(
                f"{work.folder}: was begun with {difference}; remove it, or choose another folder as --output"
            )
        return plan
    report.say(f"tokenizer {request['tokenizer']}")
    tokenizer = obtain_tokenizer(tokenizer_argument, _training_text(corpus, tokenizer_argument, request))
    vocab_size = vocabulary_size(tokenizer)
    plan = Plan(
        dataset=corpus.name,
        description=corpus.description,
        tokenizer=request["tokenizer"],
        vocab_size=vocab_size,
        eos_token_id=tokenizer.eos_token_id,
        dtype="uint16" if vocab_size < 1 << 16 else "uint32",
        splits=list(corpus.splits),
        divided=corpus.hold_out is not None,
        request=request,
    )
    work.begin(plan, tokenizer)
    return plan


def _training_text(corpus: Corpus, tokenizer: str, request: dict) -> Iterator[str]:
    """What a tokenizer is trained on: of the train split a sample, or all where words are counted."""
    whole = corpus["train"] if corpus.whole is None else corpus.whole
    max_bytes, limit = request["max_bytes"], request.get("tokenizer_sample", TOKENIZER_SAMPLE)
    if tokenizer.partition(":")[0] == "words":
        limit = float("inf")
    ranges = whole.ranges() if max_bytes is None else None
    sources = [lambda: first_bytes(whole.start(), max_bytes)] if ranges is None else ranges
    yield from sample(sources, limit, corpus.hold_out)


def _not_done(
    work: WorkFolder, plan: Plan, corpus: Corpus, share: tuple[int, int], report: "_Report"
) -> Iterator[Unit]:
    """The units of this share whose parts are not there."""
    known = work.units()
    index, shares = share
    if known is not None and all(
        work.counts(number, plan.digest) is not None for number in range(index, known, shares)
    ):
        return  # nothing needs to be read
    number = -1
    for number, unit in enumerate(units_of(corpus, plan.request["max_bytes"])):
        if number % shares == index:
            counts = work.counts(number, plan.digest)
            if counts is None:
                yield unit
            else:
                report(unit, counts)
    work.set_units(number + 1)


def _share_of(shard: str | None) -> tuple[int, int]:
    """(index from 0, number) of `--shard`."""
    if shard is None:
        return 0, 1
    match = re.fullmatch(r"(\d+)/(\d+)", shard)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"--shard {shard}: write I/N, from 1/N to N/N")
    return int(match[1]) - 1, int(match[2])


def _pinned_revision(work: WorkFolder, dataset: str) -> str | None:
    """The commit of a data set of the Hub that an earlier call with the same output has taken."""
    with contextlib.suppress(UserError):
        had = work.plan() or Manifest.read(work.output)
        if had.dataset == dataset:
            return had.request["source"].get("revision")
    return None


class _Report:
    """What is shown of the work as it goes on; called with each unit that is done and its counts."""

    def __init__(self, progress: Progress):
        self._progress, self._task = progress, progress.add_task("", total=None)
        self._counts = dict.fromkeys(COUNTS, 0)

    def say(self, text: str) -> None:
        self._progress.update(self._task, description=text)

    def __call__(self, unit: Unit, splits: dict) -> None:
        for counts in splits.values():
            for name, number in counts.items():
                self._counts[name] += number
        self.say(f"{self._counts['documents']:,} documents, {self._counts['tokens']:,} tokens")


def _progress(show: bool) -> Progress:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=not show)
