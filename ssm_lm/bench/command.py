"""`ssm-lm bench TASK`: how fast, beside what a user would take instead, and what is asked of a GPU.

generate   a token after a text of each length, through generate()
prefill    a prompt of each length, to the first token
train      forward and backward over sequences of each length
kernels    the fused GPU kernels; see kernels.py
"""

import argparse
import json
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from ..errors import UserError
from ..files import write_text
from ..runs.curves import check_picture, save
from .kernels import KERNEL_TASK, kernel_rows

MODEL_TASKS = {
    "generate": (128, 1024, 8192),
    "prefill": (2048, 8192),
    "train": (1024, 4096),
}
DEFAULT_MODELS = "s4,s4d,s5,h3,ssd,gpt2,llama,mamba,mamba2"
DTYPES = ("float32", "bfloat16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    tasks = (*MODEL_TASKS, KERNEL_TASK)
    parser.add_argument("task", metavar="TASK", choices=tasks, help=", ".join(tasks))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, as one list")
    models = parser.add_argument_group("generate, prefill, train")
    models.add_argument("--models", metavar="NAME,...", help=f"the first of ours is the measure ({DEFAULT_MODELS})")
    models.add_argument("--size", choices=("25M", "125M", "tiny"), help="parameters of every model (default: 25M)")
    models.add_argument("--lengths", metavar="N,...", help="tokens of text, prompt or sequence")
    models.add_argument("--batch", type=int, metavar="N", help="texts at once, of generate and prefill (default: 1)")
    models.add_argument("--dtype", choices=DTYPES, help="of the weights (default: float32)")
    models.add_argument("--device", choices=("cpu", "cuda"), help="where they run (default: a GPU, where there is one)")
    models.add_argument("--turns", type=int, metavar="N", help="how often each is timed (default: 5)")
    models.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw tokens a second against the length, .png or .svg"
    )
    kernels = parser.add_argument_group("kernels")
    kernels.add_argument(
        "--compile-only", action="store_true", help="compile and count instead of timing: needs no GPU"
    )
    kernels.add_argument("--target", metavar="NAME,...", help="of --compile-only: sm_NN for NVIDIA, gfxNNN for AMD")
    kernels.add_argument("--kernel", metavar="NAME", help="of --compile-only: those whose names hold this")


def run(args: argparse.Namespace) -> None:
    """Print tables and write the JSON file."""
    if args.json is not None and not args.json.absolute().parent.is_dir():
        raise UserError(f"--json {args.json}: the folder {args.json.parent} does not exist; make it first")
    of_kernels = {"--compile-only": args.compile_only or None, "--target": args.target, "--kernel": args.kernel}
    of_models = ("models", "size", "lengths", "batch", "dtype", "turns", "plot", "device")
    of_models = {f"--{name}": getattr(args, name) for name in of_models}
    for flag, value in (of_models if args.task == KERNEL_TASK else of_kernels).items():
        if value is not None:
            raise UserError(f"{flag} is not for bench {args.task}; leave it out")
    if args.task == KERNEL_TASK:
        rows = kernel_rows(args)
    else:
        rows = model_rows(args)
    if args.json is not None:
        try:
            write_rows(args.json, rows)
        except OSError as error:
            raise UserError(f"--json {args.json}: cannot be written ({error.strerror or error})") from error


def model_rows(args: argparse.Namespace) -> list[dict]:
    """The rows of a task of models, printed as they come. Raises UserError."""
    lengths = _lengths(args.lengths) if args.lengths else MODEL_TASKS[args.task]
    for flag, value in (("--batch", args.batch), ("--turns", args.turns)):
        if value is not None and value < 1:
            raise UserError(f"{flag} {value}: give a number of at least 1")
    if args.plot is not None:
        check_picture("--plot", args.plot)
    names = list(dict.fromkeys((args.models or DEFAULT_MODELS).split(",")))
    from .peers import SIZES, check_names

    check_names(names)
    import torch

    from .speed import machine, measure

    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU on this machine; leave it out, or see `ssm-lm doctor`")
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype, size = getattr(torch, args.dtype or "float32"), SIZES[args.size or "25M"]
    here = machine(device)
    console, rows = Console(), []
    threads = "" if device.type == "cuda" else f"{here['threads']} threads, "
    console.print(f"{here['processor']}, {threads}torch {here['torch']}, {args.dtype or 'float32'}")
    for length in lengths:
        found = measure(args.task, names, size, length, args.batch or 1, dtype, args.turns or 5, device)
        console.print(_table(args.task, length, found))
        rows += [row | here for row in found]
    if args.plot is not None:
        _draw(args.task, rows, args.plot)
    return rows


def _lengths(text: str) -> tuple[int, ...]:
    try:
        lengths = tuple(int(part) for part in text.split(","))
    except ValueError:
        lengths = (0,)
    if min(lengths) < 2:
        raise UserError(f"--lengths {text}: give numbers of at least 2 with commas between them, such as 128,1024")
    return lengths


def _table(task: str, length: int, rows: list[dict]) -> Table:
    table = Table(title=f"{task}, {length:,} tokens", title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("model", "million parameters", "ms a token", "tokens/s", "spread", "to ours", "of the limit", "MiB"):
        table.add_column(column, justify="left" if column == "model" else "right")
    failed = [row for row in rows if "error" in row]
    table.caption = "\n".join(f"{row['model']} did not run: {row['error']}" for row in failed) or None
    for row in rows:
        if row in failed:
            table.add_row(row["model"])
            continue
        ratio, peak, share = row["ratio_to_ours"], row["peak_mib"], row.get("share_of_limit")
        table.add_row(
            row["model"],
            f"{row['parameters'] / 1e6:.1f}",
            f"{row['milliseconds_per_token']:.2f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['spread']:.0%}",
            "" if ratio is None else f"{ratio:.2f}",
            "" if share is None else f"{share:.0%}",
            "" if peak is None else f"{peak:,.0f}",
        )
    return table


def _draw(task: str, rows: list[dict], file: Path) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    def draw(axes):
        for name in dict.fromkeys(row["model"] for row in rows if "error" not in row):
            points = [(row["length"], row["tokens_per_second"]) for row in rows
                      if row["model"] == name and "error" not in row]  # fmt: skip
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1.2, label=name)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted({row["length"] for row in rows}))
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
            axis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("tokens")
        axes.set_title(f"{task}: tokens a second")

    save([draw], file)


def write_rows(file: Path, rows: list[dict]) -> None:
    """A list of rows as JSON, one a line, so that a change of one is a change of one line. Raises OSError."""
    lines = ",\n".join(json.dumps(row, allow_nan=False) for row in rows)
    write_text(file, f"[\n{lines}\n]\n")
