"""`ssm-lm eval`: the perplexity of a model on a split, with its unit and protocol named.

Three units, for numbers of the literature are in all of them: by token (of the model's tokenizer), by word (separated
by white space, or these and the line ends, as published WikiText numbers count), and bits by byte of UTF-8. With
--tasks, the tasks of lm-evaluation-harness.
"""

import argparse
import contextlib
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..baselines import is_baseline, longest_sequence
from ..errors import UserError, first_line
from ..extras import need
from ..files import write_json
from ..loading.folder import quiet
from ..loading.model import DTYPES, load_model
from ..loading.tokenizer import check_vocabulary_fits, has_tokenizer, is_tokenizer_of, load_tokenizer
from ..runs.curves import check_picture, draw_contexts, save

SPLITS = ("train", "validation", "test")
BY_CONTEXT = ("nll", "token_perplexity", "word_perplexity", "bits_per_byte")  # what is kept of every context


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument("model", metavar="MODEL", help="a model folder, a training run's output or a Hub id")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--data",
        metavar="PATH|NAME",
        help="a prepared folder; or text, as in `prepare --dataset`, which is tokenised with the model's tokenizer",
    )
    what.add_argument("--tasks", metavar="TASK[,TASK]", help="of lm-evaluation-harness, by their names")
    parser.add_argument("--split", choices=SPLITS, default="test", help="(default: test)")
    parser.add_argument(
        "--context",
        default="full",
        metavar="full|N[,...]",
        help="full (default): the state is carried over the whole split; N: windows of N tokens from a zero state; "
        "several, as 64,256,full: each of them, and the numbers of the longest in full",
    )
    parser.add_argument(
        "--window", type=int, default=4096, metavar="N", help="tokens a forward, of --context full (default: 4096)"
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        default=8,
        metavar="N",
        help="windows or requests a forward (default: 8)",
    )
    parser.add_argument(
        "--recall",
        type=int,
        nargs="?",
        const=10,
        metavar="N",
        help="also score the tokens that end a bigram seen before in the context, and at most N times in the train "
        "split (N: 10 where it is not given)",
    )
    parser.add_argument("--include-path", metavar="DIR", help="of --tasks: a folder with task files of your own")
    parser.add_argument("--limit", type=int, metavar="N", help="of --tasks: documents a task, to try it out")
    parser.add_argument("--num-fewshot", type=int, metavar="N", help="of --tasks: examples before a question")
    parser.add_argument(
        "--model-args", metavar="KEY=VALUE,...", help="of --tasks: as in lm_eval: max_length, prefix_token_id, ..."
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there, as one object")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="of --data: draw the perplexity by --context, a .png or .svg"
    )
    add_model_arguments(parser)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of every verb that runs a model."""
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)")
    parser.add_argument("--dtype", choices=DTYPES, help="(default: the dtype of the checkpoint)")


def run(args: argparse.Namespace) -> None:
    """Evaluate as the arguments say, print a table and write the JSON file."""
    contexts = parse_contexts(args.context)
    _positive("--window", args.window)
    _positive("--batch-size", args.batch_size)
    if args.plot is not None:
        check_picture("--plot", args.plot)
        need("--plot", "plot", "matplotlib")
        check_place(args.plot, "--plot")
    if args.json is not None:
        check_writable(args.json)  # before the long part
    if args.recall is not None:
        _positive("--recall", args.recall, least=0)
    if args.tasks is not None:
        for key in ("recall", "plot"):
            if getattr(args, key) is not None:
                raise UserError(f"--{key} belongs to --data")
        run_tasks(args)
        return
    for key in ("include_path", "limit", "num_fewshot", "model_args"):
        if getattr(args, key) is not None:
            raise UserError(f"--{key.replace('_', '-')} belongs to --tasks")
    model = place(load_model(args.model, args.dtype), args.device)
    for context in contexts:
        check_context(model, context)
    rows = []
    with prepared(args.data, args.model, args.split, model) as folder:
        for context in contexts:
            with _progress() as progress:
                results = evaluate(
                    model, folder, args.split, context, args.window, args.batch_size, progress, args.recall
                )
            rows.append({"context": context} | {key: results[key] for key in BY_CONTEXT})
    results |= {"contexts": rows, "model": args.model, "data": args.data}
    if len(rows) > 1:
        Console().print(table_of_contexts(rows))
    Console().print(table(results))
    write_results(args.json, results)
    if args.plot is not None:
        plot_contexts(args.plot, Path(args.model).expanduser().resolve().name, rows)


def plot_contexts(file: Path, name: str, rows: list[dict]) -> None:
    """Draw the token perplexity of `name` by context, windows beside the state that is carried."""
    points = [(row["context"], row["token_perplexity"]) for row in rows if row["token_perplexity"]]
    save([lambda axes: draw_contexts(axes, {name: points})], file)
    print(f"{file}: done")


def parse_contexts(text: str) -> list[int | None]:
    """`--context 256,64,full` -> [64, 256, None], the shortest first; UserError for anything else."""
    words = text.split(",")
    found = {None if word == "full" else _positive("--context", word, "full or a number") for word in words}
    return sorted(found, key=lambda context: (context is None, context))


def check_context(model, context: int | None) -> None:
    """UserError where a baseline cannot read its context."""
    if not is_baseline(model.config):
        return
    longest = longest_sequence(model.config)
    if context is None or (longest is not None and context > longest):
        most = "" if longest is None else f" of at most {longest}"
        raise UserError(
            f"--context {context or 'full'}: {model.config.model_type} reads windows; give --context N, a number of "
            f"tokens{most}"
        )


def run_tasks(args: argparse.Namespace) -> None:
    """Evaluate tasks of lm-evaluation-harness, print its table and write the JSON file."""
    if args.context != "full":
        raise UserError("--context belongs to --data; for tasks, --model-args max_length=N cuts the contexts")
    for name in ("limit", "num_fewshot"):
        if getattr(args, name) is not None:
            _positive(f"--{name.replace('_', '-')}", getattr(args, name), least=name == "limit")
    if args.include_path is not None and not Path(args.include_path).is_dir():
        raise UserError(f"--include-path {args.include_path}: no such folder")
    try:
        from lm_eval.utils import make_table

        from .harness import evaluate_tasks
    except ImportError as error:
        raise UserError(f"--tasks needs lm_eval ({error}): pip install 'ssm_lm[eval]'") from error
    model = place(load_model(args.model, args.dtype), args.device)
    if is_baseline(model.config):
        raise UserError(
            f"--tasks: {args.model} is a model of transformers; export it, and give the folder to lm_eval itself: "
            "`lm_eval --model hf --model_args pretrained=DIR --tasks ...`"
        )
    tokenizer = load_tokenizer(args.model)
    check_vocabulary_fits(tokenizer, model, args.model)
    with quiet():  # lm_eval has much to say
        results, found = evaluate_tasks(
            model,
            tokenizer,
            [name for name in args.tasks.split(",") if name],
            include_path=args.include_path,
            limit=args.limit,
            num_fewshot=args.num_fewshot,
            batch_size=args.batch_size,
            window=args.window,
            model_args=args.model_args,
        )
    print(make_table(found))
    write_results(args.json, results | {"model": args.model})


def write_results(path: Path | None, results: dict) -> None:
    """Write the JSON file, if one was asked for; UserError where it cannot be."""
    if path is None:
        return
    try:
        write_json(path, results)
    except OSError as error:
        raise UserError(f"--json {path}: cannot be written ({error.strerror or error})") from error


def evaluate(
    model,
    folder: str | Path,
    split: str = "test",
    context: int | None = None,
    window: int = 4096,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
    recall: int | None = None,
) -> dict:
    """The numbers of the JSON file for one split of a prepared folder, as a dict of JSON-able values.

    context: None carries the state over the whole split, in forwards of `window` tokens; N resets it every N tokens,
    `batch_size` windows at a time. progress is called with (tokens just scored, tokens in all). recall: also score the
    tokens that end a bigram seen before in the context and at most so often in the train split (see breakdown.py).
    Raises UserError when the folder does not fit the model, or the NLL is not finite.
    """
    from ..data.stream import TokenStream
    from .perplexity import full_context_nll, windowed_nll
    from .unigram import unigram_perplexity

    stream = TokenStream.open(folder, split)
    stream.check_vocabulary(model.config.vocab_size)
    step = None if progress is None else lambda count: progress(count, len(stream.tokens))
    if recall is not None and "train" not in stream.manifest.splits:
        raise UserError(f"--recall: {folder} has no train split to count in; give a prepared folder with one")
    nlls, observe = np.empty(len(stream.tokens)), None
    # with an adaptive softmax, the NLL of a single token costs all clusters
    if recall is not None or getattr(model.config, "adaptive_cutoffs", None) is None:

        def observe(first: int, values: np.ndarray) -> None:
            nlls[first : first + len(values)] = values

    start = time.perf_counter()
    if context is None:
        protocol = "full context, state carried"
        nll = full_context_nll(model, stream.tokens, stream.eos_token_id, window, step, observe)
    else:
        protocol = f"non-overlapping windows of {context}"
        nll = windowed_nll(model, stream.tokens, stream.eos_token_id, context, batch_size, step, observe)
    seconds = time.perf_counter() - start
    if not math.isfinite(nll):
        raise UserError(f"the model's NLL on {folder} is {nll}; its training diverged, evaluate an earlier checkpoint")
    info = stream.info
    results = {
        "tokens": info.tokens,
        "words": info.words,
        "lines": info.lines,
        "bytes": info.bytes,
        "nll": nll,
        "token_perplexity": perplexity(nll, info.tokens),
        "word_perplexity": perplexity(nll, info.words),
        "word_perplexity_with_line_ends": perplexity(nll, info.words + info.lines),
        "bits_per_byte": nll / (math.log(2) * info.bytes) if info.bytes else None,
        "unigram_perplexity": None,
        "protocol": protocol,
        "split": split,
        "dataset": stream.manifest.dataset,
        "seconds": seconds,
        "tokens_per_second": info.tokens / seconds,
    }
    if observe is not None:
        results |= breakdown(stream, nlls, context, recall)
    if "train" in stream.manifest.splits:
        results["unigram_perplexity"] = unigram_perplexity(TokenStream.open(folder, "train"), stream)
    return results


def breakdown(stream, nlls: np.ndarray, context: int | None, recall: int | None) -> dict:
    """Entries of the JSON file from the NLLs of the tokens: the standard error, and with `recall` the recalled ones."""
    from ..data.stream import TokenStream
    from .breakdown import documents_of, recalled, standard_error

    documents = documents_of(stream.tokens, stream.eos_token_id)
    error, number = standard_error(nlls, documents)
    whole = perplexity(float(nlls.sum()), len(nlls))
    found = {
        "documents": number,
        # of exp(m), by its derivative
        "token_perplexity_standard_error": None if error is None or whole is None else whole * error,
    }
    if recall is not None:
        training = TokenStream.open(stream.folder, "train").tokens
        chosen = recalled(stream.tokens, documents, context, training, stream.vocab_size, recall)
        parts = (("recalled", chosen), ("other", ~chosen))
        found["recall"] = {"at_most": recall} | {
            name: {
                "tokens": int(which.sum()),
                "nll": float(nlls[which].sum()),
                "token_perplexity": perplexity(float(nlls[which].sum()), int(which.sum())),
            }
            for name, which in parts
        }
    return found


def perplexity(nll: float, count: int) -> float | None:
    """exp(nll / count); None, JSON's null, where there is nothing to count by or the number is beyond a float."""
    return math.exp(nll / count) if count and nll / count < 700 else None


@contextlib.contextmanager
def prepared(data: str, model_path: str, split: str, model) -> Iterator[Path]:
    """A prepared folder that fits the model: `data` itself, or its text tokenised into a temporary folder.

    Raises UserError when `data` was prepared with another tokenizer than the model's.
    """
    from ..data.manifest import MANIFEST_FILE

    folder = Path(data).expanduser()
    if (folder / MANIFEST_FILE).is_file():
        check_same_tokenizer(folder, model_path)
        yield folder
        return
    if not has_tokenizer(model_path):
        raise UserError(
            f"{data}: is text, and {model_path} holds no tokenizer to read it with; "
            "give a folder that `ssm-lm prepare` wrote"
        )
    from ..data.prepare import prepare

    tokenizer = load_tokenizer(model_path)
    check_vocabulary_fits(tokenizer, model, model_path)
    with tempfile.TemporaryDirectory(prefix="ssm-lm-eval-") as temporary:
        tokenizer.save_pretrained(Path(temporary) / "tokenizer")
        prepare(data, Path(temporary) / "tokenizer", Path(temporary) / "data")
        yield Path(temporary) / "data"


def check_same_tokenizer(folder: Path, model_path: str) -> None:
    """UserError unless the tokenizer beside the data is the model's; a model without one is taken at its word."""
    if not is_tokenizer_of(model_path, load_data_tokenizer(folder)):
        raise UserError(
            f"{folder}: was prepared with another tokenizer than that of {model_path}; "
            "prepare the text with the model's tokenizer, or give the text itself as --data"
        )


def load_data_tokenizer(folder: Path):
    """The tokenizer of a prepared folder."""
    from ..data.tokenizer import load_tokenizer as load

    return load(str(folder / "tokenizer"))


def place(model, device: str | None):
    """The model on `device`, by default a GPU if there is one; UserError for a device that is not there."""
    import torch

    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return model.to(torch.device(name))
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: cannot be used ({first_line(error)})") from error


def check_writable(path: Path) -> None:
    """UserError unless results can be written at `path`: nothing there yet, or results of an earlier evaluation."""
    check_place(path, "--json")
    if path.exists() and not _is_results(path):
        raise UserError(f"--json {path}: exists and was not written by `ssm-lm eval`; choose another name")


def check_place(path: Path, flag: str) -> None:
    """UserError unless a file can be written at `path`, which `flag` has given."""
    if path.is_dir():
        raise UserError(f"{flag} {path}: is a folder; give the name of a file")
    if not path.parent.is_dir():
        raise UserError(f"{flag} {path}: the folder {path.parent} does not exist; make it first")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{flag} {path}: the folder {path.parent} cannot be written to; choose another place")


def _is_results(path: Path) -> bool:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and "protocol" in values and ("nll" in values or "tasks" in values)


def table(results: dict) -> Table:
    """The results for people."""
    view = Table(title=f"{results['split']} split: {results['protocol']}", title_justify="left")
    for column, justify in (("measure", "left"), ("value", "right"), ("of", "left")):
        view.add_column(column, justify=justify)

    def row(name: str, key: str, unit: str):
        view.add_row(name, "-" if results[key] is None else f"{results[key]:,.4f}", unit)

    tokens, words, lines = (f"{results[key]:,}" for key in ("tokens", "words", "lines"))
    row("token perplexity", "token_perplexity", f"{tokens} tokens")
    if results.get("token_perplexity_standard_error") is not None:
        row("its standard error", "token_perplexity_standard_error", f"{results['documents']:,} documents")
    for name, which in (("recalled", "bigram seen in the context, rare in training"), ("other", "all other tokens")):
        if "recall" in results:
            part = results["recall"][name]
            value = "-" if part["token_perplexity"] is None else f"{part['token_perplexity']:,.4f}"
            view.add_row(f"token perplexity, {which}", value, f"{part['tokens']:,} tokens")
    row("word perplexity", "word_perplexity", f"{words} words")
    row("word perplexity, line ends counted", "word_perplexity_with_line_ends", f"{words} words, {lines} line ends")
    row("bits per byte", "bits_per_byte", f"{results['bytes']:,} bytes")
    row("unigram token perplexity, for reference", "unigram_perplexity", "counts of the train split, add one")
    row("seconds", "seconds", f"{results['tokens_per_second']:,.0f} tokens a second")
    return view


def table_of_contexts(rows: list[dict]) -> Table:
    """What each length of context gives; the one without a number has the whole split before it."""
    view = Table(title="by context", title_justify="left")
    for column in ("tokens of context", "token perplexity", "bits per byte"):
        view.add_column(column, justify="right")
    for row in rows:
        measures = ("-" if row[key] is None else f"{row[key]:,.4f}" for key in ("token_perplexity", "bits_per_byte"))
        view.add_row("full, carried" if row["context"] is None else f"{row['context']:,}", *measures)
    return view


def _positive(name: str, value, what: str = "a number", least: int = 1) -> int:
    if not str(value).isascii() or not str(value).isdigit() or int(value) < least:
        raise UserError(f"{name} {value}: must be {what} of {int(least)} or more")
    return int(value)


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr where that is a terminal."""
    columns = (TextColumn("scored"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
    with bar:
        task = bar.add_task("scored", total=None)
        yield lambda count, total: bar.update(task, advance=count, total=total)
