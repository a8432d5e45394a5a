"""All that a GPU must show, in at most eight minutes: one JSON, pictures, and what each part printed.

    make gpu                                            # into build/gpu
    python -m tests.gpu.first_day --output FOLDER [--parts NAME,...] [--device cpu]

Nothing is installed and nothing is asked of a network: it runs what this checkout and this Python hold. Each part is a
process with a time limit of its own; one that fails is written down with the last lines of its output, one for which a
package is missing is passed over with its name, and the others run. `--device cpu` is the rehearsal: the same parts,
tiny. Exit code: 0 where nothing has failed, 1 where a part has, 2 where there is no GPU or a part has no such name.

It stands with the tests, and not in the package, because it runs them. gpu.json holds

    device, commit, python, seconds, passed
    parts              [{part, status, seconds, limit, ...}]: status is passed, failed, timed out or passed over;
                       why, exit_code and output where it did not pass; result where it did
    share_of_roofline  {device, share}: seconds of a training step on paper over those that were measured, which
                       `ssm-lm estimate --measured gpu.json` takes
"""

import argparse
import importlib.util
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

REPO = Path(__file__).parents[2]
TOTAL = 470.0  # seconds of all parts
PATIENCE = {"cuda": 1, "cpu": 6}  # of the limits: a rehearsal may run beside other work, on a core or two
STOPPED = 75  # exit code of a run that was asked to stop, with a checkpoint
LINES = 30  # of output, kept of a part that did not pass
GPU_NAME = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
TRAINING = ("accelerate",)  # what `ssm-lm train` cannot do without
# H = 1024 as in the WikiText-103 recipe, with fewer layers and a small vocabulary
MODELS = {
    "cuda": {"ssm": "s4", "arch": "s4", "hidden_size": 1024, "num_hidden_layers": 4, "state_size": 64},
    "cpu": {"ssm": "s4", "arch": "s4", "hidden_size": 16, "num_hidden_layers": 1, "state_size": 8, "chunk_size": 16},
}
RUNS = {
    "cuda": {"sequence_length": 1024, "per_device_train_batch_size": 16, "max_steps": 600, "logging_steps": 10}
    | {"bf16": True, "tf32": True, "warmup_steps": 40, "learning_rate": 1e-3},
    "cpu": {"sequence_length": 64, "per_device_train_batch_size": 4, "max_steps": 6, "logging_steps": 1}
    | {"use_cpu": True, "warmup_steps": 2, "learning_rate": 1e-2},
}
TEXT = {"cuda": ("3000000", "bpe:4096"), "cpu": ("30000", "bpe:300")}  # bytes of the built-in corpus, tokenizer
SIZES = {  # of the models that are timed
    "cuda": ["--size", "125M", "--dtype", "bfloat16", "--turns", "3"],
    "cpu": ["--size", "tiny", "--turns", "1"],
}
TIMED = {  # contenders and lengths
    "cuda": {"train": ("s4,s4d,ssd,gpt2", "2048,8192"), "generate": ("s4,s4d,ssd,gpt2", "128,2048")},
    "cpu": {"train": ("s4,gpt2", "16"), "generate": ("s4,gpt2", "16")},
}
TESTS = ("kernels", "models", "training")
REHEARSED = "tiny and (single_steps or keeps_its_size or resumed)"


class Part(NamedTuple):
    """A process of at most `limit` seconds. needs: modules without which it is passed over. read: what it has shown,
    for the JSON; an exception in it is a failure. stop: what it gets at its limit before it is killed; a process that
    then ends with STOPPED has passed.
    """

    name: str
    command: list[str]
    limit: float
    needs: tuple[str, ...] = ()
    read: Callable[[], dict] = dict
    stop: signal.Signals = signal.SIGINT
    why_not: str | None = None  # why it cannot run here at all


def run_part(part: Part, folder: Path, left: float = TOTAL) -> dict:
    """The part's entry in the JSON. left: seconds that remain for all parts."""
    limit = min(part.limit, left)
    entry = {"part": part.name, "status": "passed over", "seconds": 0.0, "limit": round(limit, 1)}
    missing = [module for module in part.needs if importlib.util.find_spec(module) is None]
    if part.why_not or missing:
        return entry | {"why": part.why_not or f"{', '.join(missing)}: not installed"}
    if limit <= 0:
        return entry | {"status": "timed out", "why": "the time of all parts was over before it began"}
    log = folder / "output" / f"{part.name.replace(' ', '-')}.txt"
    log.parent.mkdir(exist_ok=True)
    start = time.monotonic()
    with log.open("w") as output:
        code, in_time = _run(part, limit, output)
    entry["seconds"] = round(time.monotonic() - start, 1)
    if code == 0 or (not in_time and code == STOPPED):
        try:
            return entry | {"status": "passed", "result": part.read()}
        except Exception as error:
            why = str(error) if isinstance(error, RuntimeError) else f"{type(error).__name__}: {error}"
            entry["why"] = why
    status = "failed" if in_time else "timed out"
    kept = log.read_text(errors="replace").splitlines()[-LINES:]
    return entry | {"status": status, "exit_code": code, "output": kept}


def _run(part: Part, limit: float, output) -> tuple[int, bool]:
    """(exit code, whether it ended in its time); none of its processes is left behind."""
    path = os.pathsep.join(filter(None, [str(REPO), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "MPLBACKEND": "Agg", "SSM_LM_FIRST_DAY": "1"}
    environment |= dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"), "1")
    process = subprocess.Popen(
        part.command, cwd=REPO, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
    )
    in_time = True
    try:
        process.wait(limit)
    except subprocess.TimeoutExpired:
        in_time = False
        process.send_signal(part.stop)
        try:
            process.wait(max(2.0, limit / 5))
        except subprocess.TimeoutExpired:
            pass
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    return process.wait(), in_time


# ---- the parts


def parts(device: str, gpu: str | None, folder: Path) -> list[Part]:
    """All of them, in the order of what one wants to know first. device: "cuda" or "cpu"."""
    python, on_gpu = sys.executable, device == "cuda"
    command = [python, "-m", "ssm_lm"]
    draws = importlib.util.find_spec("matplotlib") is not None
    config, run = folder / "training.yaml", folder / "run"
    bytes_of_text, tokenizer = TEXT[device]
    text = ["--dataset", "builtin", "--max-bytes", bytes_of_text, "--tokenizer", tokenizer]

    def tests(name: str, files: tuple[str, ...], limit: float) -> Part:
        report = folder / f"{name}.xml"
        chosen = ["-m", "gpu"] if on_gpu else ["-m", "not gpu", "-k", REHEARSED]
        several = on_gpu and importlib.util.find_spec("xdist") and (os.cpu_count() or 1) >= 8
        workers = ["-n", "4"] if several and "training" not in files else []  # Triton compiles on one core
        paths = [f"tests/gpu/test_gpu_{file}.py" for file in files]
        # none of the options of pyproject.toml, for which other packages would have to be there
        options = ["-q", "--tb=short", "-o", "addopts=", "-p", "no:cacheprovider", f"--junitxml={report}"]
        whole = [python, "-m", "pytest", *paths, *chosen, *workers, *options]
        needs = ("pytest", *(TRAINING if files == ("training",) else ()))
        return Part(name, whole, limit, needs, lambda: counts_of_tests(report))

    def timed(task: str, limit: float) -> Part:
        models, lengths = TIMED[device][task]
        rows = folder / f"{task}.json"
        plot = ["--plot", str(folder / f"{task}.png")] if draws else []
        options = ["--models", models, "--lengths", lengths, "--device", device, *SIZES[device], "--json", str(rows)]
        return Part(f"bench {task}", [*command, "bench", task, *options, *plot], limit, (), lambda: rows_of(rows))

    def test_parts(names) -> list[Part]:
        limits = {"kernels": 100, "models": 75, "training": 50}
        return [tests(f"tests of {name}", (name,), limits[name]) for name in names]

    kernels, report = folder / "kernels.json", folder / "estimate.json"
    sheet = known_device(gpu)
    on_paper = ["estimate", str(config), "--gpus", "1", "--device", sheet or "", "--json", str(report)]
    found = [
        Part("self-checks", [*command, "doctor", "--json"], 70, (), lambda: machine_of(folder, on_gpu)),
        *(test_parts(TESTS[:1]) if on_gpu else [tests("tests", TESTS, 100)]),
        Part("bench kernels", [*command, "bench", "kernels", "--json", str(kernels)], 45, ("triton",),
             lambda: rows_of(kernels), why_not=None if on_gpu else "there is no GPU to time on"),
        Part("text", [*command, "prepare", *text, "--output", str(folder / "data")], 40),
        Part("training", [*command, "train", str(config)], 75, TRAINING, lambda: losses_of(run), signal.SIGTERM),
        Part("estimate", [*command, *on_paper], 20, TRAINING,
             lambda: share_of_roofline(json.loads(report.read_text()), entries_of(run)),
             why_not=None if sheet else "there is no data sheet of this device in costs/devices.py"),
        *(test_parts(TESTS[1:]) if on_gpu else []),
        timed("train", 40),
        timed("generate", 40),
        Part("curves", [*command, "plot", str(run), "--output", str(folder / "training.png")], 10, ("matplotlib",)),
    ]  # fmt: skip
    return [part._replace(limit=part.limit * PATIENCE[device]) for part in found]


def write_config(device: str, folder: Path) -> None:
    """The config of the training, in JSON, which is YAML."""
    keys = {"data": str(folder / "data"), "output_dir": str(folder / "run"), "lr_scheduler_type": "cosine"}
    keys |= {"save_strategy": "no", "report_to": [], "disable_tqdm": True, "seed": 1}
    (folder / "training.yaml").write_text(json.dumps({"model": MODELS[device], **keys, **RUNS[device]}, indent=1))


def known_device(gpu: str | None) -> str | None:
    """The name in the table of devices of what a driver calls so."""
    from ssm_lm.costs.devices import known_device

    found = known_device(gpu) if gpu else None
    return None if found is None else found.name


# ---- what the parts have shown


def machine_of(folder: Path, on_gpu: bool) -> dict:
    """The report of `ssm-lm doctor`. Raises RuntimeError for a kernel that does not run on the GPU."""
    text = (folder / "output" / "self-checks.txt").read_text()
    report, _ = json.JSONDecoder().raw_decode(text[text.index("{\n") :])
    slow = {name: line for name, line in report["kernels"].items() if not line.startswith("Triton")}
    if on_gpu and slow:
        raise RuntimeError("not in its Triton kernel: " + "; ".join(f"{name}: {line}" for name, line in slow.items()))
    return report


def counts_of_tests(report: Path) -> dict:
    """How many tests passed, and which were skipped, by pytest's report. Raises RuntimeError where none passed."""
    cases = list(ElementTree.parse(report).iter("testcase"))
    skipped = {case.get("name"): case.find("skipped").get("message") for case in cases if len(case.findall("skipped"))}
    failed = [case.get("name") for case in cases if len(case.findall("failure")) + len(case.findall("error"))]
    passed = len(cases) - len(skipped) - len(failed)
    if not passed:
        raise RuntimeError("no test has run")
    return {"passed": passed, "failed": failed, "skipped": skipped}


def rows_of(file: Path) -> dict:
    """The rows of `ssm-lm bench`. Raises RuntimeError where one of ours holds an error; a peer's is said alone."""
    rows = json.loads(file.read_text())
    ours = [row for row in rows if "error" in row and row["model"] != "gpt2"]
    if ours:
        raise RuntimeError("; ".join(f"{row['model']}: {row['error']}" for row in ours))
    return {"rows": rows}


def entries_of(run: Path) -> list[dict]:
    """What a training has logged at its steps."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if "loss" in entry]


def losses_of(run: Path) -> dict:
    """The curve and the speed of a training. Raises RuntimeError where it has not learnt."""
    entries = entries_of(run)
    curve = [(entry["step"], entry["loss"]) for entry in entries]
    if not curve or not curve[-1][1] < curve[0][1]:
        raise RuntimeError(f"the loss has not fallen: {curve[:1]} to {curve[-1:]}")
    found = {"losses": curve, "tokens_per_second": speed_of(entries)}
    mfu = [entry["mfu"] for entry in entries if "mfu" in entry]
    return found | ({"mfu": statistics.median(mfu)} if mfu else {})


def speed_of(entries: list[dict]) -> float:
    """Tokens a second once it runs: the median of all entries but the first, in which kernels are compiled."""
    return statistics.median(entry["tokens_per_second"] for entry in entries[1:] or entries)


def share_of_roofline(report: dict, entries: list[dict]) -> dict:
    """Which share of the roofline the training has reached: seconds of a step by `ssm-lm estimate` at the device's
    peaks, over the seconds that it took.
    """
    run = report["run"]
    micro_batch = sum(max(row["arithmetic"], row["memory"]) for row in report["roofline"].values())
    on_paper = run["gradient_accumulation_steps"] * micro_batch
    on_paper += report["time"]["optimizer"] * report["assumptions"]["efficiency"]
    measured = run["tokens_per_step"] / speed_of(entries)
    return {"device": run["device"], "share": on_paper / measured, "on_paper": on_paper, "measured": measured}


# ---- all of it


def run_all(chosen: list[Part], folder: Path, about: dict, total: float = TOTAL) -> dict:
    """Run the parts one after the other; gpu.json is written anew after each. Returns what it holds."""
    begin, entries = time.monotonic(), []
    for part in chosen:
        print(f"{part.name:18s}", end="", flush=True)
        entry = run_part(part, folder, total - (time.monotonic() - begin))
        entries.append(entry)
        print(f"{entry['status']:12s} {entry['seconds']:6.1f} s  {entry.get('why', '')}", flush=True)
        report = {**about, "seconds": round(time.monotonic() - begin, 1)}
        report["passed"] = all(done["status"] in ("passed", "passed over") for done in entries)
        share = [done["result"] for done in entries if done["part"] == "estimate" and "result" in done]
        if share:
            report["share_of_roofline"] = share[0]
        (folder / "gpu.json").write_text(json.dumps({**report, "parts": entries}, indent=1))
    return report


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=REPO / "build" / "gpu", help="a folder, which is made anew")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: the rehearsal, tiny")
    parser.add_argument("--parts", help="those of these names alone, with commas between them")
    args = parser.parse_args(argv)
    folder, gpu = args.output.absolute(), None
    if args.device == "cuda":
        gpu = subprocess.run([sys.executable, "-c", GPU_NAME], capture_output=True, text=True).stdout.strip()
        if not gpu:
            print(f"{sys.executable}: its torch sees no GPU; --device cpu is a rehearsal without one", file=sys.stderr)
            return 2
    chosen = parts(args.device, gpu, folder)
    if args.parts:
        names = args.parts.split(",")
        if unknown := set(names) - {part.name for part in chosen}:
            known = ", ".join(part.name for part in chosen)
            print(f"--parts {', '.join(sorted(unknown))}: there are {known}", file=sys.stderr)
            return 2
        chosen = [part for part in chosen if part.name in names]
    else:
        for made in ("data", "run", "output"):  # of an earlier call
            shutil.rmtree(folder / made, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_config(args.device, folder)
    about = {"device": gpu or platform.processor() or platform.machine(), "commit": commit()}
    about["python"] = platform.python_version()
    print(f"{about['device']}, Python {about['python']}, into {folder}")
    report = run_all(chosen, folder, about, TOTAL * PATIENCE[args.device])
    print(f"{'all have passed' if report['passed'] else 'NOT all have passed'}: {folder / 'gpu.json'}")
    return 0 if report["passed"] else 1


def commit() -> str | None:
    """Of the checkout; None where it is none, or there is no git."""
    try:
        found = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=REPO, capture_output=True, text=True)
    except OSError:
        return None
    return found.stdout.strip() or None


if __name__ == "__main__":
    raise SystemExit(main())
