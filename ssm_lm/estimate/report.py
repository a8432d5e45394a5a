"""`ssm-lm estimate CONFIG.yaml`: parameters, FLOPs, memory and days of a run, and how it scales, before it takes a GPU.

Nothing is allocated and no GPU is asked: the parameters are counted on the meta device, FLOPs by formula (flops.py),
memory by running a layer on tensors without data (memory.py), time from a roofline (scaling.py).
"""

import argparse
import json
from pathlib import Path

from ..baselines import is_baseline
from ..config.reading import parse_overrides, read_train_config
from ..costs.baselines import baseline_flops, baseline_parameters
from ..costs.devices import DEVICES
from ..costs.flops import total
from ..errors import UserError
from ..files import write_json
from .tables import print_report

EFFICIENCY = 0.4  # what is assumed where nothing is measured


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="a training config; see configs/train/")
    parser.add_argument("--nodes", type=int, default=1, help="machines (1)")
    parser.add_argument("--gpus", type=int, default=8, help="GPUs in each (8)")
    parser.add_argument("--device", default="h100", help=f"one of {', '.join(DEVICES)} (h100)")
    parser.add_argument(
        "--efficiency", type=float, help=f"share of the roofline that is reached ({EFFICIENCY}; or --measured)"
    )
    parser.add_argument("--measured", metavar="FILE", help="the gpu.json of `make gpu`, whose share of it is taken")
    parser.add_argument(
        "--overlap", type=float, default=0.8, help="share of a backward that communication may use (0.8)"
    )
    parser.add_argument("--intra", type=float, default=450.0, help="GB/s a GPU and direction within a node (450)")
    parser.add_argument("--inter", type=float, default=50.0, help="GB/s a GPU and direction between nodes (50)")
    parser.add_argument("--sequence-ranks", type=int, default=1, help="ranks that share a sequence (1)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a key of the config, repeatable"
    )
    parser.add_argument("--scaling", action="store_true", help="step time on 8 to 4096 GPUs")
    parser.add_argument("--plot", metavar="FILE", help="with --scaling: a plot of it, .svg or .png (needs matplotlib)")
    parser.add_argument("--json", metavar="FILE", help="write everything to FILE")


def run(args: argparse.Namespace) -> None:
    check_arguments(args)
    values = read_train_config(args.config, parse_overrides([f"--{item}" for item in args.set]))
    report = estimate(values, args, where=args.config)
    print_report(report)
    if args.json:
        try:
            write_json(Path(args.json), report)
        except OSError as error:
            raise UserError(f"--json: cannot write {args.json}: {error.strerror or error}") from error
    if args.plot:
        from .plot import plot_scaling

        plot_scaling(report, Path(args.plot))
        print(f"plot      {args.plot}")


def check_arguments(args) -> None:
    """Raise UserError for an argument out of range."""
    for name in ("nodes", "gpus", "sequence_ranks", "intra", "inter"):
        if not getattr(args, name) > 0:
            raise UserError(f"--{name.replace('_', '-')} must be positive, not {getattr(args, name)}")
    args.measured_on = None
    if args.measured is not None:
        if args.efficiency is not None:
            raise UserError("--efficiency and --measured both say which share of the roofline is reached; give one")
        args.efficiency, args.measured_on = measured_share(Path(args.measured))
    elif args.efficiency is None:
        args.efficiency = EFFICIENCY
    for name, low in (("efficiency", False), ("overlap", True)):
        value = getattr(args, name)
        if not (0 <= value <= 1 if low else 0 < value <= 1):
            raise UserError(f"--{name} is a share between 0 and 1, not {value}")
    if args.device not in DEVICES:
        raise UserError(f"--device {args.device} is not known; take one of {', '.join(DEVICES)}")
    if (args.nodes * args.gpus) % args.sequence_ranks:
        raise UserError(f"--sequence-ranks {args.sequence_ranks} must divide the {args.nodes * args.gpus} GPUs")
    if args.plot and not args.scaling:
        raise UserError("--plot draws what --scaling computes; give both")
    if args.plot and Path(args.plot).suffix not in (".svg", ".png"):
        raise UserError(f"--plot {args.plot}: name a file that ends in .svg or .png")


def measured_share(file: Path) -> tuple[float, str]:
    """The share of the roofline that a training reached, and the device that it ran on, of a gpu.json of `make gpu`.
    Raises UserError.
    """
    try:
        found = json.loads(file.read_text())["share_of_roofline"]
        share, device = float(found["share"]), str(found["device"])
    except OSError as error:
        raise UserError(f"--measured {file}: {error.strerror or error}; `make gpu` writes it") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--measured {file}: holds no share_of_roofline; give the gpu.json of a `make gpu` that has come to it"
        ) from error
    if not 0 < share <= 1:
        raise UserError(f"--measured {file}: its share of the roofline is {share:.3g}; give one between 0 and 1")
    return share, device


def estimate(values: dict, args: argparse.Namespace, where: str) -> dict:
    """Everything that the command prints, as one JSON object. Raises UserError for a config that makes no model."""
    from .sections import OnPaper
    from .subject import read_subject

    subject = read_subject(values, args.nodes * args.gpus, args.sequence_ranks, where)
    if is_baseline(subject.config):
        if args.scaling:
            raise UserError(f"--scaling: is for models of this package, not for {subject.config.model_type}")
        return baseline_report(subject, args.nodes * args.gpus, where)
    run = OnPaper(subject, args)
    report = {
        "config": where,
        "model": run.model(),
        "run": run.plan(),
        "flops_per_token": run.flops_per_token(),
        **run.memory(),
        "roofline": run.roofline(),
        "sublayers": run.sublayers(),
        "state_exchange_bytes_per_layer": run.exchange,
        "time": run.time(),
        "assumptions": run.assumed(),
    }
    if args.scaling:
        report["scaling"] = run.scaling()
    return json.loads(json.dumps(report))


def baseline_report(subject, ranks: int, where: str) -> dict:
    """What is counted of a baseline: parameters, and FLOPs by 6 N D and its attention."""
    config, tokens = subject.config, subject.batch * subject.length
    every, inner = baseline_parameters(config)
    parts = baseline_flops(config, subject.batch, subject.length)
    steps = subject.steps(ranks)
    seen = None if steps is None else steps * subject.global_batch(ranks) * subject.length
    flops = total(parts) / tokens
    return {
        "config": where,
        "model": {"type": config.model_type, "parameters": every, "without_embeddings": inner},
        "run": {"steps": steps, "tokens": seen, "sequence_length": subject.length},
        "flops_per_token": {
            "model": flops,
            "parts": [{"part": p.name, "forward": p.forward / tokens, "backward": p.backward / tokens} for p in parts],
        },
        "flops": None if seen is None else flops * seen,
    }
