"""`ssm-lm bench kernels`: the fused kernels on this machine's GPU, beside an FFT convolution; and --compile-only:
compiled for GPUs that need not be there, their resources and their roofline.
"""

import argparse
import os
from collections.abc import Iterator

from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ..errors import UserError
from . import compile, roofline

TARGETS = "sm_80,sm_90,sm_100,gfx942"
KERNEL_TASK = "kernels"


def kernel_rows(args: argparse.Namespace) -> list[dict]:
    """The rows that the arguments ask for, printed as tables. Raises UserError."""
    if args.compile_only:
        rows = list(compiled(args.target or TARGETS, args.kernel or ""))
        print_resources(rows)
        return rows
    for flag, value in (("--target", args.target), ("--kernel", args.kernel)):
        if value is not None:
            raise UserError(f"{flag}: goes with --compile-only; without it every kernel runs on the GPU that is here")
    rows = timed()
    print_times(rows)
    return rows


def compiled(targets: str, name: str) -> Iterator[dict]:
    """A row for each shipped configuration whose kernel's name holds `name` and each target. Raises UserError."""
    compile.require_triton()
    names = [target for target in targets.split(",") if target] or [targets]
    for target in names:
        compile.parse_target(target)
    pairs = [(case, target) for target in names for case in compile.compile_cases(target) if name in case["name"]]
    if not pairs:
        known = sorted({case["name"] for case in compile.compile_cases("sm_90")})
        raise UserError(f"--kernel {name}: no kernel has this in its name; there are {', '.join(known)}")
    for case, target in track(pairs, "compiling", console=Console(stderr=True), transient=True):
        yield resource_row(case, target, compile.compile_case(case, target))


def resource_row(case: dict, target: str, resources: compile.Resources) -> dict:
    """The row of one kernel on one target; with its least time on an H100 where its work is known."""
    import triton

    row = {"task": KERNEL_TASK, "kernel": case["name"], "target": target, "triton": triton.__version__}
    row |= resources._asdict()
    if work := case.get("work"):
        tokens = work.get("tokens", roofline.TOKENS)
        bound = roofline.bound(work)
        row |= {
            "bytes_per_token": work["bytes"] / tokens,
            "flops_per_token": work.get("flops", 0) / tokens,
            "tensor_flops_per_token": work.get("tensor_flops", 0) / tokens,
            "h100_memory_us": round(bound.memory * 1e6, 2),
            "h100_tensor_us": round(bound.tensor * 1e6, 2),
            "h100_other_us": round(bound.other * 1e6, 2),
        }
    return row


def timed() -> list[dict]:
    """A row for each contender. Raises UserError where there is no GPU."""
    import torch

    if not torch.cuda.is_available():
        raise UserError("bench kernels: this machine has no GPU to time on; --compile-only counts without one")
    if os.environ.get("SSM_LM_KERNELS", "auto") != "auto":
        raise UserError("SSM_LM_KERNELS is set, so that kernels and PyTorch would be the same: unset it")
    from ..modeling.ops import kernel_status

    for op, line in kernel_status().items():
        if not line.startswith("Triton"):
            raise UserError(
                f"bench kernels: {op} does not run in its kernel here, so there is nothing to time ({line})"
            )
    from .timing import rows

    return rows(torch.device("cuda"))


def print_resources(rows: list[dict]) -> None:
    """What the compiler says (KiB: shared memory of a block, code: instructions), then what the counted work says."""
    console = Console()
    for target in dict.fromkeys(row["target"] for row in rows):
        table = _table(f"{target}: resources", "registers", "spills", "KiB", "occupancy", "matrix", "code")
        for row in rows:
            if row["target"] == target:
                table.add_row(
                    row["kernel"],
                    str(row["registers"]),
                    str(row["spills"]),
                    f"{row['shared'] / 1024:.1f}",
                    f"{row['occupancy']:.0%}",
                    f"{row['tensor_cores']} {row['tensor_core_ops']}" if row["tensor_cores"] else "-",
                    str(row["instructions"]),
                )
        console.print(table)

    counted = {row["kernel"]: row for row in rows if "h100_memory_us" in row}
    if not counted:
        return
    columns = ("bytes", "FLOP", "tensor FLOP", "memory", "tensor", "other")
    table = _table("A token's work, and the least microseconds of a launch on an H100", *columns)
    for name, row in counted.items():
        tensor = row["tensor_flops_per_token"]
        cells = (row["bytes_per_token"], row["flops_per_token"] + tensor, tensor)
        times = (row["h100_memory_us"], row["h100_tensor_us"], row["h100_other_us"])
        table.add_row(name, *(f"{x:,.0f}" for x in cells), *(f"{x:,.1f}" for x in times))
    moved = roofline.fft_convolution_bytes()
    table.add_section()
    memory = f"{moved / roofline.BANDWIDTH * 1e6:,.1f}"
    table.add_row("FFT convolution, PyTorch", f"{moved / roofline.TOKENS:,.0f}", "", "", memory, "", "")
    console.print(table)
    shape = f"B = {roofline.BATCH}, L = {roofline.LENGTH}, H = {roofline.HIDDEN}, N = {roofline.STATE}"
    console.print(f"Counted, not measured: {shape}; of a decode step, one token for each row of its batch.")


def _table(title: str, *numbers: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    table.add_column("kernel", min_width=24)
    for column in numbers:
        table.add_column(column, justify="right", no_wrap=column != "tensor FLOP")
    return table


def print_times(rows: list[dict]) -> None:
    """The measured rows."""
    table = _table("median times", "ms", "tokens/s", "peak MiB", "ratio to ours")
    for row in rows:
        peak = "" if row["peak_mib"] is None else f"{row['peak_mib']:,.0f}"
        cells = f"{row['seconds'] * 1e3:,.3f}", f"{row['tokens_per_second']:,.0f}", peak, f"{row['ratio_to_ours']:.2f}"
        table.add_row(row["model"], *cells)
    Console().print(table)
