"""`ssm-lm estimate CONFIG.yaml`: parameters, FLOPs, memory and days of a run, and how it scales, before it takes a GPU.

Nothing is allocated and no GPU is asked: the parameters are counted on the meta device, FLOPs by formula (flops.py),
memory by running a layer on tensors without data (memory.py), time from a roofline (scaling.py).
"""

import argparse
import json
import math
import sys
from pathlib import Path

from ..config.reading import parse_overrides, read_train_config
from ..costs.devices import DEVICES
from ..errors import UserError
from ..files import write_json

STAGES = (None, 0, 1, 2, 3)
RANKS = [8 * 2**k for k in range(10)]  # 8 to 4096
# what a rank holds beside tensors: the CUDA context, NCCL's buffers; and the share of the memory that is aimed at
RESERVED, USABLE = 2e9, 0.92


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="a training config; see configs/train/")
    parser.add_argument("--nodes", type=int, default=1, help="machines (1)")
    parser.add_argument("--gpus", type=int, default=8, help="GPUs in each (8)")
    parser.add_argument("--device", default="h100", help=f"one of {', '.join(DEVICES)} (h100)")
    parser.add_argument("--efficiency", type=float, default=0.4, help="share of the roofline that is reached (0.4)")
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


def estimate(values: dict, args: argparse.Namespace, where: str) -> dict:
    """Everything that the command prints, as one JSON object. Raises UserError for a config that makes no model."""
    import torch

    from ..config.arguments import S4TrainingArguments
    from ..config.deepspeed import deepspeed_config
    from ..costs.flops import on_paper, total, training_execution, training_flops
    from .memory import count_pieces, rank_memory
    from .scaling import Assumptions, Network, roofline, state_exchange, step_time

    config, task, length, samples = what_is_trained(values, where)
    device, ranks = DEVICES[args.device], args.nodes * args.gpus
    batch = values.get("per_device_train_batch_size", S4TrainingArguments.per_device_train_batch_size)
    accumulation = values.get("gradient_accumulation_steps", 1)
    for key, value in (("per_device_train_batch_size", batch), ("gradient_accumulation_steps", accumulation)):
        if value < 1:
            raise UserError(f"{where}: {key} must be at least 1, not {value}")
    if length % args.sequence_ranks:
        raise UserError(f"--sequence-ranks {args.sequence_ranks} must divide the sequence of {length} tokens")
    checkpointing = bool(values.get("activation_checkpointing") or values.get("gradient_checkpointing"))
    needs_state = bool(values.get("carry_state"))
    half = bool(values.get("bf16") or values.get("fp16"))
    engine = deepspeed_config(values.get("deepspeed"), bool(values.get("bf16")), bool(values.get("fp16")))
    zero = (engine or {}).get("zero_optimization", {})
    stage = zero.get("stage", 0) if engine else None
    bucket = zero.get("reduce_bucket_size", "auto")
    bucket = config.hidden_size**2 if bucket == "auto" else int(bucket)
    precision = "bf16" if half else "tf32" if values.get("tf32") else "fp32"
    ssm_precision = "tf32" if values.get("tf32") else "fp32"

    # ---- one rank, one micro-batch
    local = length // args.sequence_ranks
    counting = {
        "autocast": torch.bfloat16 if half else None,
        "architecture": device.architecture,
        "needs_state": needs_state,
    }
    pieces = count_pieces(config, batch, local, task=task, **counting)
    rule = {"runs": on_paper(config, device.architecture), "architecture": device.architecture}
    parts = training_flops(
        config, batch, local, needs_state=needs_state, checkpointing=checkpointing, task=task, **rule
    )
    execution = training_execution(config, local, needs_state, **rule)
    limits = roofline(pieces, parts, device, precision, ssm_precision, checkpointing)
    micro_batch = sum(max(pair) for pair in limits.values())

    # ---- memory
    layout = {"reduce_bucket": bucket, "overlap": bool(zero.get("overlap_comm", True)), "ranks": ranks}
    if "stage3_max_live_parameters" in zero:
        layout["max_live_parameters"] = int(zero["stage3_max_live_parameters"])
    layout["accumulates"] = accumulation > 1
    memory = [
        {"stage": option, "activation_checkpointing": policy}
        | _memory(rank_memory(pieces, stage=option, checkpointing=policy, **layout))
        for option in STAGES
        for policy in (False, True)
    ]
    here = rank_memory(pieces, stage=stage, checkpointing=checkpointing, **layout)
    budget = device.memory * USABLE - RESERVED
    larger = count_pieces(config, batch + 1, local, task=task, **counting)
    a_sequence = rank_memory(larger, stage=stage, checkpointing=checkpointing, **layout).total - here.total
    recommended = batch + math.floor((budget - here.total) / max(1, a_sequence))

    # ---- time
    network = Network(args.intra * 1e9, args.inter * 1e9, gpus_per_node=args.gpus)
    assumptions = Assumptions(args.efficiency, args.overlap)
    ssm_layers = config.num_hidden_layers * config.sublayers.count("ssm")
    exchange = state_exchange(batch, config.hidden_size, config.state_size, config.ssm, args.sequence_ranks)

    def step(count, option):
        return step_time(
            count,
            pieces.parameters,
            micro_batch,
            device,
            network,
            assumptions,
            stage=option,
            accumulation=accumulation,
            bucket=bucket,
            sequence_ranks=args.sequence_ranks,
            exchange=exchange,
            exchanges=2 * ssm_layers,
        )

    def global_batch(count):
        return batch * accumulation * count // args.sequence_ranks

    now = step(ranks, stage)
    steps = values.get("max_steps", -1)
    if steps <= 0 and samples:
        epochs = values.get("num_train_epochs", 3)
        steps = max(1, int(epochs * samples // global_batch(ranks)))
    tokens_per_step = global_batch(ranks) * length
    model_flops, hardware_flops = total(parts), total(parts, "hardware")
    local_tokens = batch * local
    report = {
        "config": where,
        "model": {
            "parameters": pieces.parameters,
            "layers": f"{config.num_hidden_layers} x [{', '.join(config.sublayers)}]",
            "ssm": config.ssm,
            "mode": execution.mode,
            "kernel": execution.kernel,
        },
        "run": {
            "device": device.name,
            "nodes": args.nodes,
            "gpus_per_node": args.gpus,
            "sequence_length": length,
            "sequence_ranks": args.sequence_ranks,
            "per_device_batch": batch,
            "gradient_accumulation_steps": accumulation,
            "sequences_per_step": global_batch(ranks),
            "tokens_per_step": tokens_per_step,
            "steps": steps if steps > 0 else None,
            "zero_stage": stage,
            "activation_checkpointing": checkpointing,
            "precision": precision,
            "state_space_precision": ssm_precision,
        },
        "flops_per_token": {
            "model": model_flops / local_tokens,
            "hardware": hardware_flops / local_tokens,
            "parts": [
                {"part": p.name, "forward": p.forward / local_tokens, "backward": p.backward / local_tokens}
                | {"recompute": p.recompute / local_tokens, "other": p.other / local_tokens}
                for p in parts
            ],
        },
        "memory": memory,
        "memory_as_configured": _memory(here) | {"device": device.memory, "budget": budget},
        "bytes_of_one_more_sequence": a_sequence,
        "recommended_per_device_batch": max(0, recommended),
        "roofline": {piece: {"arithmetic": a, "memory": m} for piece, (a, m) in limits.items()},
        "state_exchange_bytes_per_layer": exchange,
        "time": now._asdict()
        | {
            "step": now.step,
            "tokens_per_second": tokens_per_step / now.step,
            "mfu": model_flops * accumulation / now.step / device.peak(precision),
            "tokens": tokens_per_step * steps if steps > 0 else None,
            "days": steps * now.step / 86400 if steps > 0 else None,
        },
        "assumptions": {
            "efficiency": args.efficiency,
            "overlap": args.overlap,
            "intra_bytes_per_second": network.intra,
            "inter_bytes_per_second": network.inter,
            "latency_seconds": network.latency,
            "reserved_bytes": RESERVED,
            "usable_share_of_memory": USABLE,
        },
    }
    if args.scaling:
        report["scaling"] = []
        for option in STAGES[1:]:
            one = micro_batch * accumulation / args.efficiency
            for count in RANKS:
                if count % args.sequence_ranks:
                    continue
                row = step(count, option)
                tokens = global_batch(count) * length
                report["scaling"].append(
                    {"stage": option, "sequences_per_step": global_batch(count), "tokens_per_second": tokens / row.step}
                    | row._asdict()
                    | {"step": row.step, "scaling_efficiency": one / row.step}
                )
    return json.loads(json.dumps(report))


def _memory(memory) -> dict:
    return memory._asdict() | {"total": memory.total}


def what_is_trained(values: dict, where: str):
    """(S4Config, "lm" or "classification", tokens a sequence, sequences an epoch or None)."""
    from ..config.arguments import S4TrainingArguments
    from ..config.model import model_config

    if values.get("init_from"):
        raise UserError(f"{where}: init_from is not read by estimate; give the model's keys under `model`")
    if values.get("task"):
        from ..data.sequences import load_task

        task = load_task(values["task"])
        config = model_config(task.model_keys() | {"tie_word_embeddings": False} | values["model"], where)
        train = task.splits["train"]
        key = "inputs_embeds" if task.input_size is not None else "input_ids"
        longest = max(len(train[index][key]) for index in range(min(len(train), 256)))
        return config, "classification", longest, len(train)
    length = values.get("sequence_length", S4TrainingArguments.sequence_length)
    if length < 2:
        raise UserError(f"{where}: sequence_length must be at least 2, not {length}")
    keys, samples = dict(values["model"]), None
    if values.get("data") and Path(values["data"]).expanduser().is_dir():
        from ..data.stream import TokenStream

        stream = TokenStream.open(values["data"], "train")
        keys = {"vocab_size": stream.vocab_size} | keys
        samples = len(stream.tokens) // length
    elif "vocab_size" not in keys:
        raise UserError(
            f"{where}: the vocabulary comes from the data, which is not there yet ({values.get('data')}); "
            "prepare it, or give --set model.vocab_size=N"
        )
    return model_config(keys, where), "lm", length, samples


# ---- printing


def _gb(value) -> str:
    return f"{value / 1e9:,.2f}"


def print_report(report: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    # into a file or a pipe as wide as the widest table; rich would cut at 80 columns
    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 150)
    model, plan, time, flops = report["model"], report["run"], report["time"], report["flops_per_token"]
    ranks = plan["nodes"] * plan["gpus_per_node"]
    stage = "no DeepSpeed" if plan["zero_stage"] is None else f"ZeRO {plan['zero_stage']}"
    console.print(
        f"model     {model['parameters']:,} parameters: {model['layers']}, {model['ssm']}, mode {model['mode']}"
        f"{' by its Triton kernel' if model['kernel'] else ''}\n"
        f"run       {plan['nodes']} x {plan['gpus_per_node']} {plan['device']}, {stage}, {plan['precision']} "
        f"(state spaces {plan['state_space_precision']}), activation checkpointing "
        f"{'on' if plan['activation_checkpointing'] else 'off'}\n"
        f"step      {plan['sequences_per_step']:,} sequences of {plan['sequence_length']:,} = "
        f"{plan['tokens_per_step']:,} tokens ({ranks} ranks x {plan['per_device_batch']} x "
        f"{plan['gradient_accumulation_steps']} accumulated, {plan['sequence_ranks']} to a sequence)\n",
        markup=False,
    )
    table = Table(
        "MFLOP a token", "forward", "backward", "recomputed", "FFT, states", title="FLOPs", title_justify="left"
    )
    for part in flops["parts"]:
        numbers = [part[key] / 1e6 for key in ("forward", "backward", "recompute", "other")]
        table.add_row(part["part"], *(f"{x:,.3f}" for x in numbers))
    console.print(table)
    console.print(
        f"{flops['model'] / 1e6:,.2f} MFLOP a token by the mathematics, {flops['hardware'] / 1e6:,.2f} executed\n",
        markup=False,
    )

    names = ("parameters", "optimizer", "gradients", "buckets", "activations", "workspace", "total")
    table = Table("stage", "checkpointing", *names, "peak at", title="GB a rank at the peak", title_justify="left")
    for row in report["memory"]:
        label = "torch" if row["stage"] is None else f"ZeRO {row['stage']}"
        policy = "on" if row["activation_checkpointing"] else "off"
        table.add_row(label, policy, *(_gb(row[name]) for name in names), row["moment"])
    console.print(table)
    here = report["memory_as_configured"]
    fits = "fits" if here["total"] <= here["budget"] else "does NOT fit"
    console.print(
        f"as configured {_gb(here['total'])} GB: {fits} in {_gb(here['budget'])} of the device's {_gb(here['device'])} "
        f"GB; largest per_device_train_batch_size: {report['recommended_per_device_batch']:,}\n",
        markup=False,
    )

    table = Table(
        "seconds at the peak", "arithmetic", "memory", title="Roofline of a micro-batch", title_justify="left"
    )
    for piece, row in report["roofline"].items():
        table.add_row(piece, f"{row['arithmetic']:.4f}", f"{row['memory']:.4f}")
    console.print(table)
    budget = "no token budget: the config has no max_steps and its data is not there"
    if time["days"] is not None:
        budget = f"{time['tokens']:,} tokens in {plan['steps']:,} steps: {time['days']:,.2f} days"
    assumed = report["assumptions"]
    console.print(
        f"a step takes {time['step']:.4f} s: {time['compute']:.4f} forward and backward, {time['optimizer']:.4f} "
        f"optimizer, {time['exposed']:.4f} waiting for the network ({time['communication']:.4f} in all), "
        f"{time['sequence']:.4f} "
        f"exchanging states\n"
        f"{time['tokens_per_second']:,.0f} tokens/s, MFU {time['mfu']:.1%}; {budget}\n\n"
        f"assumed   {assumed['efficiency']:.0%} of the roofline is reached; every operator of PyTorch reads and writes "
        f"device memory, and a Triton kernel what it asks for\n"
        f"          network {assumed['intra_bytes_per_second'] / 1e9:g} GB/s within a node, "
        f"{assumed['inter_bytes_per_second'] / 1e9:g} GB/s a GPU between nodes, "
        f"{assumed['latency_seconds'] * 1e6:g} us "
        f"a hop; communication hides behind {assumed['overlap']:.0%} of the backward\n"
        f"          parameters, gradients and moments are float32; {_gb(assumed['reserved_bytes'])} GB a rank for CUDA "
        f"and NCCL; 1 GB = 1e9 bytes",
        markup=False,
    )
    if "scaling" in report:
        by_stage = {}
        for row in report["scaling"]:
            by_stage.setdefault(row["stage"], []).append(row)
        names = [f"ZeRO {stage}" for stage in by_stage]
        table = Table(
            "GPUs",
            "sequences a step",
            *names,
            title="\nSeconds a step, and the share of one GPU's speed that each GPU keeps; batch a GPU fixed",
            title_justify="left",
        )
        for rows in zip(*by_stage.values(), strict=True):
            cells = [f"{row['step']:.4f}  {row['scaling_efficiency']:.0%}" for row in rows]
            table.add_row(f"{rows[0]['ranks']:,}", f"{rows[0]['sequences_per_step']:,}", *cells)
        console.print(table)
