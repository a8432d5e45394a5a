"""The tables of an estimate's report."""

import sys

from rich.console import Console
from rich.table import Table


def print_report(report: dict) -> None:
    """Print what `report.estimate` has found."""
    # into a file or a pipe as wide as the widest table; rich would cut at 80 columns
    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 150)
    if "type" in report["model"]:
        _print_baseline(console, report)
        return
    _print_plan(console, report)
    _print_flops(console, report["flops_per_token"])
    _print_memory(console, report)
    _print_roofline(console, report["roofline"])
    _print_sublayers(console, report["sublayers"])
    _print_time(console, report)
    if "scaling" in report:
        _print_scaling(console, report["scaling"])


def _print_baseline(console: Console, report: dict) -> None:
    model, flops, run = report["model"], report["flops_per_token"], report["run"]
    parts = ", ".join(f"{p['part']} {(p['forward'] + p['backward']) / 1e6:,.2f}" for p in flops["parts"])
    budget = "" if run["tokens"] is None else f"; {run['tokens']:,} tokens: {report['flops']:.3g} FLOP"
    console.print(
        f"model     {model['type']} of transformers, {model['parameters']:,} parameters, "
        f"{model['without_embeddings']:,} without embeddings\n"
        f"flops     {flops['model'] / 1e6:,.2f} MFLOP a token ({parts}){budget}\n"
        "          memory and time are estimated for models of this package alone",
        markup=False,
    )


def _print_plan(console: Console, report: dict) -> None:
    model, plan = report["model"], report["run"]
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


def _print_flops(console: Console, flops: dict) -> None:
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


def _print_memory(console: Console, report: dict) -> None:
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


def _print_roofline(console: Console, limits: dict) -> None:
    table = Table(
        "seconds at the peak",
        "arithmetic",
        "memory",
        "launches",
        title="Roofline of a micro-batch",
        title_justify="left",
    )
    for piece, row in limits.items():
        table.add_row(piece, f"{row['arithmetic']:.4f}", f"{row['memory']:.4f}", f"{row['launches']:,}")
    console.print(table)


def _print_sublayers(console: Console, sublayers: dict) -> None:
    table = Table(
        *("sublayer", "forward, MB", "least", "times", "of our kernels", "launches"),
        *("backward, MB", "least", "times", "of our kernels", "launches"),
        title="One sublayer of a micro-batch",
        title_justify="left",
    )
    for kind, ways in sublayers.items():
        numbers = (
            f"{way['bytes'] / 1e6:,.0f} {way['least'] / 1e6:,.0f} {way['bytes'] / way['least']:.1f} "
            f"{way['in_kernels'] / 1e6:,.0f} {way['launches']}"
            for way in ways.values()
        )
        table.add_row(kind, *" ".join(numbers).split())
    console.print(table)


def _print_time(console: Console, report: dict) -> None:
    plan, time, assumed = report["run"], report["time"], report["assumptions"]
    launched = sum(row["launches"] for row in report["roofline"].values()) * assumed["launch_seconds"]
    launched *= plan["gradient_accumulation_steps"]
    measured = f", as measured on {assumed['measured']}" if assumed["measured"] else ""
    budget = "no token budget: the config has no max_steps and its data is not there"
    if time["days"] is not None:
        budget = f"{time['tokens']:,} tokens in {plan['steps']:,} steps: {time['days']:,.2f} days"
    console.print(
        f"a step takes {time['step']:.4f} s: {time['compute']:.4f} forward and backward, {time['optimizer']:.4f} "
        f"optimizer, {time['exposed']:.4f} waiting for the network ({time['communication']:.4f} in all), "
        f"{time['sequence']:.4f} "
        f"exchanging states\n"
        f"{time['tokens_per_second']:,.0f} tokens/s, MFU {time['mfu']:.1%}; {budget}\n\n"
        f"assumed   {assumed['efficiency']:.0%} of the roofline is reached{measured}; every operator of PyTorch reads "
        f"and writes device memory, and a Triton kernel what it asks for; bytes and launches are counted, not "
        f"measured\n"
        f"          the host takes {assumed['launch_seconds'] * 1e6:g} us a launch: {launched:.4f} s a step, beside "
        f"which the GPU computes\n"
        f"          network {assumed['intra_bytes_per_second'] / 1e9:g} GB/s within a node, "
        f"{assumed['inter_bytes_per_second'] / 1e9:g} GB/s a GPU between nodes, "
        f"{assumed['latency_seconds'] * 1e6:g} us "
        f"a hop; communication hides behind {assumed['overlap']:.0%} of the backward\n"
        f"          parameters, gradients and moments are float32; {_gb(assumed['reserved_bytes'])} GB a rank for CUDA "
        f"and NCCL; 1 GB = 1e9 bytes",
        markup=False,
    )


def _print_scaling(console: Console, rows_of_all: list[dict]) -> None:
    by_stage = {}
    for row in rows_of_all:
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


def _gb(value) -> str:
    return f"{value / 1e9:,.2f}"
