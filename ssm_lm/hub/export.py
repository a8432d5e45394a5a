"""`ssm-lm export`: a folder that transformers' Auto classes load where ssm_lm is not installed.

Weights in safetensors, the configuration, the tokenizer, the model's own code and a model card; nothing of the
training. The folder is written beside its place under another name and renamed when complete.
"""

import argparse
import contextlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

from .. import modeling
from ..baselines import is_baseline
from ..errors import UserError, one_line
from ..extras import need
from ..files import new_folder
from ..loading.folder import CHECKPOINT, check_links, quiet, resolve
from ..loading.model import CAUSAL_LM, CLASSIFIER, DTYPES, load_model
from ..loading.tokenizer import check_vocabulary_fits, has_tokenizer, load_tokenizer
from . import card, own_layer
from .making import curve_of, curves_of, draw, making

FORMATS = ("transformers", "onnx")
SHARD_SIZE = "5GB"  # what an interrupted upload over LFS sends a second time at most


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a training run's output, a checkpoint or a model")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default=FORMATS[0],
        help="transformers (default); onnx: a graph that reads a prompt and one for a token, states in and out",
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="the folder to write; must be new")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of the weights; state spaces stay float32 (default: as they are)"
    )
    parser.add_argument(
        "--int8",
        action="store_true",
        help="the projections in int8, by torchao: a smaller file, which transformers loads",
    )
    parser.add_argument("--tokenizer", metavar="PATH", help="the tokenizer's folder (default: that of the checkpoint)")
    parser.add_argument(
        "--results",
        type=Path,
        action="append",
        metavar="FILE",
        help="from `eval --json`, for the card; may be repeated",
    )
    parser.add_argument("--license", metavar="ID", help="of the weights, as the Hub calls it, such as apache-2.0")
    parser.add_argument("--trained-on", metavar="TEXT", help="the training data in a few words, for the card")
    parser.add_argument(
        "--max-shard-size", default=SHARD_SIZE, metavar="SIZE", help=f"of a file of weights (default: {SHARD_SIZE})"
    )


def run(args: argparse.Namespace) -> None:
    """Export as the arguments say."""
    if args.format == "onnx":
        for key, default in (
            ("results", None),
            ("license", None),
            ("trained_on", None),
            ("max_shard_size", SHARD_SIZE),
            ("int8", False),
        ):
            if getattr(args, key) != default:
                raise UserError(f"--{key.replace('_', '-')}: belongs to --format transformers; leave it out")
        export_graphs(args.checkpoint, args.output, dtype=args.dtype, tokenizer=args.tokenizer)
        print(f"{args.output}: done; its {card.CARD} says how to run it")
        return
    export(
        args.checkpoint,
        args.output,
        dtype=args.dtype,
        tokenizer=args.tokenizer,
        results=args.results or (),
        license=args.license,
        trained_on=args.trained_on,
        max_shard_size=args.max_shard_size,
        int8=args.int8,
    )
    print(f"{args.output}: done; its {card.CARD} says how to load it")


def export(
    checkpoint,
    output,
    *,
    dtype=None,
    tokenizer=None,
    results=(),
    license: str | None = None,
    trained_on: str | None = None,
    max_shard_size: str = SHARD_SIZE,
    int8: bool = False,
) -> Path:
    """Write the model in `checkpoint` to the new folder `output` and return its path.

    dtype: of the weights, None keeps it. tokenizer: a folder or Hub id, None takes the checkpoint's, which a classifier
    may be without. results: JSON files of `ssm-lm eval` whose numbers the card is to show. license, trained_on: what
    the card says about the weights and their data. max_shard_size: of a file of weights, such as "5GB".
    int8: write the projections of a language model in int8, see int8.py.
    Raises UserError for a bad source and for an output that holds something, which is left as it is.
    """
    output = checked_output(output)
    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", license):
        raise UserError(f"--license {license}: give an identifier of the Hub, such as apache-2.0 or cc-by-4.0")
    if not re.fullmatch(r"[1-9]\d*[KMG]I?B", max_shard_size.upper()):
        raise UserError(f"--max-shard-size {max_shard_size}: give a size such as 500MB or 5GB")
    if int8:
        need("--int8", "int8", "torchao", "accelerate")
    results = [card.read_results(Path(file)) for file in results]
    check_sources(checkpoint, tokenizer)
    model = load_model(checkpoint, dtype, kinds=(CAUSAL_LM, CLASSIFIER))
    if int8 and (is_baseline(model.config) or type(model).__name__ == CLASSIFIER):
        raise UserError(f"--int8: is for language models of this package, and {checkpoint} is none; leave it out")
    vocabulary = tokenizer or checkpoint
    if type(model).__name__ == CLASSIFIER and tokenizer is None and not has_tokenizer(checkpoint):
        tokenizer = None  # its input is numbers, or ids of its own
    else:
        tokenizer = load_tokenizer(vocabulary, needs_model=tokenizer is None)
        check_vocabulary_fits(tokenizer, model, vocabulary)
    curves = curves_of(checkpoint)
    readme = card.write_card(
        model,
        output.resolve().name,
        results,
        license=license,
        trained_on=trained_on,
        made=making(checkpoint),
        curve=curve_of(checkpoint),
        picture=bool(curves),
        int8=int8,
    )

    if int8:
        from .int8 import quantised

        model = quantised(model)
    with writing(output) as partial:
        write(model, tokenizer, partial, readme, max_shard_size)
        if curves:
            draw(curves, partial / card.PICTURE)
    return output


def export_graphs(checkpoint, output, *, dtype=None, tokenizer=None) -> Path:
    """Write the language model in `checkpoint` as ONNX graphs, with its tokenizer, to the new folder `output`.

    The arguments are those of `export`. Raises UserError as it does, and for a model of transformers.
    """
    from . import onnx

    output = checked_output(output)
    need("--format onnx", "onnx", "onnx", "onnxscript")
    check_sources(checkpoint, tokenizer)
    model = load_model(checkpoint, dtype)
    if is_baseline(model.config):
        raise UserError(f"{checkpoint}: is a model of transformers; its own exporters write it as ONNX")
    vocabulary = tokenizer or checkpoint
    tokenizer = load_tokenizer(vocabulary, needs_model=tokenizer is None)
    check_vocabulary_fits(tokenizer, model, vocabulary)
    with writing(output) as partial:
        onnx.write_graphs(model, partial)
        save_tokenizer(tokenizer, partial)
        (partial / card.CARD).write_text(onnx.readme(model, output.resolve().name), encoding="utf-8")
    return output


def checked_output(output) -> Path:
    """The folder to be written; UserError where it holds something."""
    output = Path(output).expanduser()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output}: exists and is not an empty folder; choose another")
    return output


@contextlib.contextmanager
def writing(output: Path) -> Iterator[Path]:
    """The folder beside its place, renamed when complete; UserError where the disk says no."""
    try:
        with new_folder(output) as partial:
            yield partial
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({one_line(error)}); choose another place") from error


def check_sources(checkpoint, tokenizer) -> None:
    """Raise UserError where a link in a folder that is read leads out of it: an export is made to be given away."""
    source = resolve(checkpoint)
    if isinstance(source, Path):  # what the Hub's cache keeps is links, and of what the Hub has published
        root = source.parent if CHECKPOINT.fullmatch(source.name) else source  # a run has its tokenizer above
        for folder in {source, root}:
            check_links(folder, root, "put the file itself there")
    if tokenizer is not None and Path(tokenizer).expanduser().is_dir():
        folder = Path(tokenizer).expanduser()
        check_links(folder, folder, "put the file itself there")


def write(model, tokenizer, folder: Path, readme: str, max_shard_size: str = SHARD_SIZE) -> None:
    """Write every file of the exported model into `folder`. tokenizer: None for a classifier without one.

    Of a baseline that is a plain folder of transformers, with a card.
    """
    from ..auto import AUTO_MAP

    ours = not is_baseline(model.config)  # transformers has a baseline's code
    if ours:
        model.config.auto_map = dict(AUTO_MAP)
        model.config.kernels = "auto"  # what was forced here is about this machine
    with quiet():
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        if tokenizer is not None:
            save_tokenizer(tokenizer, folder)
    if ours:
        write_code(model.config.ssm, folder)
    (folder / card.CARD).write_text(readme, encoding="utf-8")


def write_code(ssm: str, folder: Path) -> None:
    """Write the model's own code, and with it that of a layer of one's own. Raises UserError for one that cannot go."""
    files = code_files()
    own = own_layer.layer_file(ssm, {file.name for file in files})
    for file in files:
        shutil.copyfile(file, folder / file.name)
    if own is not None:
        path, text = own
        (folder / path.name).write_text(text, encoding="utf-8")
        for name, added in (("checks.py", own_layer.names_of(ssm)), ("ssm.py", own_layer.import_of(ssm, path))):
            with open(folder / name, "a", encoding="utf-8") as file:
                file.write(added)


def save_tokenizer(tokenizer, folder: Path) -> None:
    """Without how it was loaded here."""
    for key in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(key, None)
    tokenizer.save_pretrained(folder)


def code_files() -> list[Path]:
    """The model's own code: the modules that AUTO_MAP names, and what they import of their neighbours, and so on."""
    from ..auto import AUTO_MAP

    entries = {Path(modeling.__file__).with_name(f"{name.split('.')[0]}.py") for name in AUTO_MAP.values()}
    return sorted(entries | {Path(file) for entry in entries for file in get_relative_import_files(entry)})
