"""`ssm-lm sweep CONFIG --key learning_rate=1e-3,2e-3 [--key ...]`: a training config at every combination of values.

The runs, the table and the files are those of `ssm-lm compare`, of which this is a comparison without a file: a
contender for each combination of the keys, at each learning rate. It may be killed at any moment and given again, with
more values too. `--range` is another thing: see rate_range.py.
"""

import argparse
import itertools
import re
from pathlib import Path

from ..config.reading import checked_values, parse_overrides, read_yaml
from ..errors import UserError
from ..extras import need
from ..files import write_json
from .compare import carry_out, report
from .contest import QUIET, Contest, Run, check_contest

MOST_RUNS = 1000
PLAIN = "config"  # the contender's name where only rates and seeds are varied


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument("config", metavar="CONFIG", help="a training config, as `train` takes it")
    parser.add_argument(
        "--key",
        action="append",
        default=[],
        metavar="KEY=VALUE,VALUE,...",
        help="a key of the config, model.KEY for one of the model, and its values; repeatable: every combination runs. "
        "Of seed, all combinations run with the first, and the best rate of each with the others",
    )
    parser.add_argument(
        "--range",
        metavar="learning_rate=LOW,HIGH",
        help="in the place of --key: one run whose rate grows from LOW to HIGH over 100 steps (--set max_steps=N), the "
        "curve of loss against rate, and a rate to begin with",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="for runs, table, JSON and curves")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for every run; repeatable")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (1)")
    parser.add_argument("--no-run", action="store_true", help="only the table, of what is there")
    parser.add_argument("--list", action="store_true", help="only the runs and their numbers, for an array of jobs")
    parser.add_argument(
        "--only",
        type=int,
        metavar="I",
        help="only run I of --list, in this process: a job of an array, no table",
    )


def run(args: argparse.Namespace) -> None:
    """Sweep as the arguments say."""
    if args.jobs < 1:
        raise UserError(f"--jobs {args.jobs}: must be 1 or more")
    if sum([args.no_run, args.list, args.only is not None]) > 1:
        raise UserError("--no-run, --list, --only: give one of them")
    overrides = parse_overrides([f"--{item}" for item in args.set])
    if args.range is not None:
        search_range(args, overrides)
        return
    contest = read_sweep(args.config, args.key, overrides, args.output)
    runs = [run for contender in contest.contenders for run in contest.first_runs(contender)]
    if args.list:
        for number, one in enumerate(runs):
            print(f"{number}\t{one.name}")
    elif args.only is not None:
        run_one(contest, runs, args.only)
    else:
        need("sweep, which draws curves,", "plot", "matplotlib")
        report(carry_out(contest, args.jobs, only_table=args.no_run, every_curve=True))


def search_range(args: argparse.Namespace, overrides: dict) -> None:
    """`--range`, in the place of a sweep. Raises UserError."""
    from .rate_range import run_range

    given = {"--key": args.key, "--no-run": args.no_run, "--list": args.list, "--only": args.only is not None}
    given["--jobs"] = args.jobs > 1
    for flag, there in given.items():
        if there:
            raise UserError(f"--range: is one run by itself; leave out {flag}")
    need("sweep, which draws curves,", "plot", "matplotlib")
    run_range(args.config, args.range, overrides, args.output.expanduser())


def run_one(contest: Contest, runs: list[Run], number: int) -> None:
    """Train and measure one run in this process, as `ssm-lm train` does; nothing where its result is there.

    Raises UserError for a number that no run has, and SystemExit(75) after a signal, when it can go on.
    """
    import yaml

    from .schedule import read_result, result_file
    from .worker import train_and_measure

    if not 0 <= number < len(runs):
        raise UserError(f"--only {number}: the runs are 0 to {len(runs) - 1}; --list names them")
    if len(contest.seeds) > 1:
        raise UserError("--only: which rate is the best is known when all have run; give one seed, or seeds as --set")
    one = runs[number]
    if read_result(contest, one) is not None:
        print(f"done      {one.name}")
        return
    check_contest(contest)
    config = contest.folder / "configs" / f"{one.name}.yaml"
    try:
        for name in ("configs", "results"):
            (contest.folder / name).mkdir(parents=True, exist_ok=True)
        config.write_text(yaml.safe_dump(one.values, sort_keys=False), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output {contest.folder}: cannot be written to ({error.strerror or error})") from error
    write_json(result_file(contest, one), train_and_measure(str(config)))
    print(f"done      {one.name}")


def read_sweep(path: str, words: list[str], overrides: dict, folder: Path) -> Contest:
    """The comparison of a config at every combination of values. words: KEY=VALUE,... each.

    Raises UserError for whatever is wrong, in the config of a combination too.
    """
    values, keys = read_yaml(path), read_keys(words)
    for key in keys:
        if key in overrides:
            raise UserError(f"--set {key}: is varied by --key; leave one out")
    if "output_dir" in keys or "output_dir" in overrides:
        raise UserError("output_dir: follows from --output; leave it out")
    values.pop("output_dir", None)
    base = checked_values(values, overrides, path, path)
    seeds = _positive(keys.pop("seed", [base.pop("seed", 1111)]), int, "seed")
    rates = _positive(keys.pop("learning_rate", [base.pop("learning_rate", 5e-5)]), float, "learning_rate")
    combinations = list(itertools.product(*keys.values()))
    if len(combinations) * len(rates) > MOST_RUNS:
        raise UserError(f"--key: {len(combinations) * len(rates):,} runs; {MOST_RUNS:,} are the most")
    contenders = {}
    for chosen in combinations:
        own = dict(zip(keys, chosen, strict=True))
        name = "_".join(f"{key}-{_word(value)}" for key, value in own.items()) or PLAIN
        if name in contenders:
            raise UserError(f"--key: {name} stands for two combinations; leave one out")
        found = checked_values(QUIET | values, overrides | own, path, f"{path}, {name}")
        contenders[name] = {key: value for key, value in found.items() if key not in ("learning_rate", "seed")}
    return Contest(path, folder.expanduser(), contenders, dict.fromkeys(contenders, rates), seeds)


def read_keys(words: list[str]) -> dict[str, list]:
    """["learning_rate=1e-3,2e-3"] -> {"learning_rate": [0.001, 0.002]}. A comma in brackets parts no values."""
    keys = {}
    for word in words:
        key, equals, text = word.partition("=")
        texts = re.split(r",(?![^\[{]*[\]}])", text)
        if not key or not equals or not all(texts):
            raise UserError(f"--key {word}: is written KEY=VALUE,VALUE,...")
        found = [parse_overrides([f"--{key}={text}"]) for text in texts]
        key = next(iter(found[0]))
        if key in keys:
            raise UserError(f"--key {key}: is given twice; put its values into one")
        keys[key] = [each[key] for each in found]
    if not keys:
        raise UserError("--key: is needed, such as --key learning_rate=1e-3,2e-3 (or --range learning_rate=1e-5,1)")
    return keys


def _positive(values: list, kind: type, key: str) -> list:
    if any(type(value) not in (int, kind) or value <= 0 for value in values) or len(set(values)) < len(values):
        raise UserError(f"--key {key}: must have positive numbers, none of them twice, not {values}")
    return [kind(value) for value in values]


def _word(value) -> str:
    """For the name of a folder."""
    return re.sub(r"[^\w.+]+", "-", str(value)).strip("-")
