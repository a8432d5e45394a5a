"""`ssm-lm compare FILE.yaml`: the runs of a comparison, those that are missing, and its table.

Or `ssm-lm compare RUN...`: what the runs in these folders differ in, and what came of them.
"""

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path

from ..config.reading import parse_overrides
from ..errors import UserError
from ..files import write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument(
        "what", nargs="+", metavar="FILE.yaml|RUN", help="a comparison, see configs/compare/; or folders of runs"
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (1)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="of a comparison: a key of every contender's training config, or output_dir; repeatable",
    )
    parser.add_argument("--no-run", action="store_true", help="of a comparison: only the table, of what is there")
    parser.add_argument("--output", type=Path, metavar="DIR", help="of RUN...: a folder for table, JSON and curves")


def run(args: argparse.Namespace) -> None:
    """Compare as the arguments say."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("compare draws curves with matplotlib: pip install 'ssm_lm[plot]'")
    if args.jobs < 1:
        raise UserError(f"--jobs {args.jobs}: must be 1 or more")
    folders = [Path(word) for word in args.what]
    if all(folder.expanduser().is_dir() for folder in folders):
        for given, name in ((args.set, "--set"), (args.no_run, "--no-run")):
            if given:
                raise UserError(f"{name}: belongs to a comparison, a .yaml file")
        compare_runs(folders, args.output)
        return
    if len(folders) > 1:
        missing = next(folder for folder in folders if not folder.expanduser().is_dir())
        raise UserError(f"{missing}: is no folder; give one .yaml file, or folders of runs")
    if args.output is not None:
        raise UserError("--output: belongs to folders of runs; a comparison writes into its output_dir")
    overrides = parse_overrides([f"--{item}" for item in args.set])
    report(compare(args.what[0], overrides, args.jobs, only_table=args.no_run))


def report(failed: list[str]) -> None:
    """Say which runs failed, if any did, and leave with exit code 1."""
    if failed:
        print(f"\n{len(failed)} runs failed: {', '.join(failed)}; their logs say why, and the same command tries again")
        raise SystemExit(1)


def compare(path: str, overrides: dict, jobs: int = 1, only_table: bool = False) -> list[str]:
    """Do what the comparison of a file lacks and write its table; the names of runs that failed.

    Into its output_dir: table.md (which is printed too), comparison.json, curves.png and curves.svg; sizes.png and
    sizes.svg where contenders are sizes of a family.
    Raises UserError for whatever the file has wrong, before the first run.
    """
    from .contest import read_contest

    return carry_out(read_contest(path, overrides), jobs, only_table)


def carry_out(contest, jobs: int = 1, only_table: bool = False, every_curve: bool = False) -> list[str]:
    """`compare` for a contest that is read already. every_curve: of all learning rates, not of the best alone."""
    from .contest import check_contest
    from .pictures import draw, draw_sizes, families
    from .schedule import best_run, missing, read_result, run_missing
    from .summary import markdown, summarize

    failed = []
    if not only_table and missing(contest, set()):
        check_contest(contest)
        failed = run_missing(contest, jobs)
    summary = summarize(contest)
    ranked = [row["contender"] for row in summary["contenders"]]
    drawn = [best_run(contest, contender)[0] for contender in ranked]
    if every_curve:
        runs = [run for contender in ranked for run in contest.first_runs(contender)]
        drawn = [run for run in runs if read_result(contest, run) is not None]
    curves = {f"{run.contender}, {run.rate:g}": contest.folder / "runs" / run.name for run in drawn}
    pictures = {"curves": lambda files: draw(curves, files)}
    if lines := families(summary["contenders"]):
        pictures["sizes"] = lambda files: draw_sizes(lines, files)
    write(contest.folder, markdown(summary), summary, pictures)
    return failed


def compare_runs(folders: list[Path], output: Path | None) -> None:
    """Print the table of runs, and with `output` write it there, with JSON and curves."""
    from .folders import compare_folders, markdown
    from .pictures import draw

    comparison = compare_folders(folders)
    table = markdown(comparison)
    if output is None:
        print(table, end="")
    else:
        places = {row["run"]: Path(row["folder"]) for row in comparison["runs"]}
        write(output, table, comparison, {"curves": lambda files: draw(places, files)})


def write(folder: Path, table: str, found: dict, pictures: dict[str, Callable[[list[Path]], None]]) -> None:
    """Print a table; write it, its JSON and its pictures, each as PNG and SVG, into a folder. Raises UserError."""
    print(table, end="")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "table.md").write_text(table, encoding="utf-8")
        write_json(folder / "comparison.json", found)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written to ({error.strerror or error})") from error
    written = ["table.md", "comparison.json"]
    for name, draw in pictures.items():
        files = [f"{name}.png", f"{name}.svg"]
        draw([folder / file for file in files])
        written += files
    print(f"\n{folder}: {', '.join(written)}")
