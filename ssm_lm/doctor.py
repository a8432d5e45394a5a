"""`ssm-lm doctor`: what this machine has for training and running models, and whether the layers compute right on it.

Nothing is built, downloaded or written; the Hub is asked for only with --network. Under a launcher (torchrun,
deepspeed, srun) `--network` measures the network between the ranks instead: see network.py.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import shutil
import sys
import urllib.error
import urllib.request
from pathlib import Path

from packaging.requirements import Requirement
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .errors import one_line
from .lacking import gpus_of_the_machine, lacking
from .network import HOW_TO_RUN, test_job
from .processors import usable

TOLERANCE = 1e-4  # between the modes of a layer, in float32, relative to the largest output
GIB = 1 << 30
# of pyproject.toml; "" for what nothing runs without
EXTRAS = ("", "train", "gpu", "eval", "tasks", "plot", "int8", "onnx", "serve")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument(
        "--network",
        action="store_true",
        help="under a launcher: test the network between its ranks; else: also try to reach the Hub, for two seconds",
    )
    parser.add_argument("--timeout", type=float, default=60, help="seconds that the network test waits at most (60)")


def run(args: argparse.Namespace) -> None:
    """Print the report; exit code 1 when the self-check or the network test fails, else 0, whatever is missing."""
    if args.network and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        test_job(args.timeout, args.json)
        return
    report = examine(args.network)
    if args.network:
        report["network"] = {"ranks": HOW_TO_RUN}
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        print_report(report)
    if not report["self-check"]["passed"]:
        raise SystemExit(1)


def examine(network: bool = False) -> dict[str, dict]:
    """The report: section -> {item: JSON-able value}. "packages" maps to {version, wanted, fits, extra}."""
    return {
        "machine": machine(),
        "torch": torch_and_devices(),
        "lacking": lacking() or {"for a GPU": "nothing" if gpus_of_the_machine() else "no GPU is seen here"},
        "packages": packages(),
        "deepspeed": deepspeed_readiness(),
        "hub": hub(network),
        "kernels": kernels(),
        "self-check": self_check(),
    }


def machine() -> dict:
    """Python, system, processors, memory and disk, as this process may use them."""
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpus": f"{usable()} of {os.cpu_count()}",
        "memory_gib": _memory_gib(),
        "free_disk_gib": round(shutil.disk_usage(Path.cwd()).free / GIB, 1),
        "g++": shutil.which("g++"),
        "ninja": _tool("ninja"),
        "nvcc": shutil.which("nvcc"),
    }


def torch_and_devices() -> dict:
    """torch, its threads, the GPUs it sees, bfloat16 in hardware, and Triton."""
    import torch

    from .internals.torch import bf16_instructions

    report = {"version": torch.__version__, "threads": torch.get_num_threads(), "cuda_build": torch.version.cuda}
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            report[f"cuda:{index}"] = (
                f"{device.name}, {device.total_memory / GIB:.0f} GiB, capability {device.major}.{device.minor}"
            )
        report["bf16_on_gpu"] = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        report["gpu"] = None
    report["bf16_on_cpu"] = ", ".join(bf16_instructions()) or "emulated"
    report["triton"] = _triton()
    report["decoding_on_a_cpu"] = _in_c("step")
    report["systems_of_s4_on_a_cpu"] = _in_c("systems")
    report["operators_of_s4_on_a_cpu"] = _in_c("operators")
    report["operators_of_s4d_on_a_cpu"] = _in_c("diagonal")
    report["scan_of_ssd_on_a_cpu"] = _in_c("ssd")
    return report


def packages() -> dict[str, dict]:
    """The packages that ssm_lm asks for: version installed, version wanted, whether the one is in the other, and the
    extra that brings it ("" for those that nothing runs without). What is of an extra may be missing, and fits then.
    """
    try:
        requirements = importlib.metadata.requires("ssm_lm") or []
    except importlib.metadata.PackageNotFoundError:
        wanted = "installed, for its ranges to be known"
        return {"ssm_lm": {"version": None, "wanted": wanted, "fits": False, "extra": ""}}
    report = {}
    for requirement in map(Requirement, requirements):
        extra = next((extra for extra in EXTRAS if _applies(requirement, extra)), None)
        if extra is None:
            continue
        version = _version(requirement.name)
        fits = bool(extra) if version is None else requirement.specifier.contains(version, prereleases=True)
        report[requirement.name] = {
            "version": version,
            "wanted": str(requirement.specifier),
            "fits": fits,
            "extra": extra,
        }
    return report


def _applies(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def deepspeed_readiness() -> dict:
    """What DeepSpeed could do here. It is not imported, for that may start the compilation of its operators."""
    from .internals.deepspeed import built_operators

    launcher = _tool("deepspeed")
    compiler = bool(shutil.which("g++") and _tool("ninja"))
    return {
        "version": _version("deepspeed"),
        "launcher": launcher,
        "several_nodes": "pdsh"
        if shutil.which("pdsh")
        else "ssh alone"
        if shutil.which("ssh")
        else "neither pdsh nor ssh",
        "built_operators": ", ".join(built_operators()) or "none",
        "builds_operators_when_used": compiler,
    }


def hub(network: bool) -> dict:
    """Where the Hub's files are kept and whether it is to be asked; with `network`, whether it answers."""
    from huggingface_hub import constants

    report = {
        "cache": constants.HF_HUB_CACHE,
        "offline": bool(constants.HF_HUB_OFFLINE),
        "datasets_offline": os.environ.get("HF_DATASETS_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"),
    }
    if network:
        try:
            with urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=2):
                report["reachable"] = True
        except urllib.error.HTTPError:
            report["reachable"] = True  # it answered
        except (OSError, ValueError) as error:
            report["reachable"] = f"no: {getattr(error, 'reason', error)}"
    return report


def kernels() -> dict[str, str]:
    """Operation -> whether its Triton kernel runs here, and why. On a GPU this runs the kernels' own self-checks."""
    from .modeling.ops import kernel_status

    return kernel_status()


def _in_c(name: str) -> str:
    """What a step of generate() or a layer's operators run in on a CPU. Builds a library that is not there yet."""
    from .modeling.native_library import why_not

    return "C" if why_not(name) is None else f"PyTorch: {why_not(name)}"


def self_check() -> dict:
    """Run S4 and S4D in their three modes on every kind of device: {layer on device: largest relative difference}.

    "passed" is False where one exceeds TOLERANCE, or a layer fails.
    """
    import torch

    from .modeling.ssm import LAYERS

    report, passed = {}, True
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, 500, 16 + 2 * 64, generator=generator)  # no whole number of chunks
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        for name, layer_class in LAYERS.items():
            key = f"{name} on {device}"
            try:
                with torch.no_grad():
                    difference = _largest_difference(layer_class(16).to(device), inputs)
                report[key] = difference if math.isfinite(difference) else str(difference)  # JSON has no NaN
                passed = passed and difference < TOLERANCE  # a NaN is not
            except Exception as error:  # the report is to say what fails, not to fail with it
                report[key], passed = f"{type(error).__name__}: {one_line(error)}", False
    return report | {"tolerance": TOLERANCE, "passed": passed}


def _largest_difference(layer, inputs) -> float:
    """Between chunk, fft and recurrent: of outputs and final states, relative to the largest value."""
    inputs = inputs[..., : layer.input_size].to(layer.D.device)
    expected = layer(inputs, mode="chunk")
    differences = [
        ((a - b).abs().max() / b.abs().max()).item()
        for mode in (("fft", "recurrent") if layer.is_time_invariant else ("recurrent",))
        for a, b in zip(layer(inputs, mode=mode), expected, strict=True)
    ]
    return math.nan if any(map(math.isnan, differences)) else max(differences)


def print_report(report: dict[str, dict]) -> None:
    """The report as tables."""
    console = Console()
    for section, items in report.items():
        table = Table(title=section, title_justify="left", show_header=False)
        for item, value in items.items():
            table.add_row(item, escape(_for_people(value)))
        console.print(table)


def _for_people(value) -> str:
    if isinstance(value, dict):
        missing = f"not installed, of ssm_lm[{value['extra']}]" if value["extra"] else "not installed"
        outside = "" if value["fits"] else f"   <- outside {value['wanted']}"
        return f"{value['version'] or missing}{outside}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}"
    return "none" if value is None else str(value)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _tool(name: str) -> str | None:
    """A program on the path, or beside this Python, where it is when the environment is not activated."""
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


def _memory_gib() -> float | None:
    """Of the machine, or what the container may have of it."""
    limits = []
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limits.append(int(Path(file).read_text()))
        except (OSError, ValueError):  # not there, or "max"
            continue
    return round(min(limits) / GIB, 1) if limits else None


def _triton() -> str | None:
    """Triton's version and whether it finds a GPU driver; None where it is not installed."""
    version = "Triton"
    try:
        import triton
    except ModuleNotFoundError:
        return None
    except Exception as error:
        return f"{version}, cannot be imported ({one_line(error)})"
    try:
        version = triton.__version__  # its distribution has another name beside a torch of ROCm
        from triton.runtime import driver

        return f"{version}, driver {driver.active.get_current_target().backend}"
    except Exception as error:  # of the driver's library, of a missing GPU
        return f"{version}, no driver ({one_line(error)})"
