"""One run of a comparison, in a process of its own: trained, then measured; its numbers as a JSON file.

`python -m ssm_lm.comparison.worker CONFIG RESULT PARENT`. It ends as `ssm-lm train` does: 0, 2 with one line, or 75
after a checkpoint. When the process PARENT ends, however it does, this one is asked to end.
"""

import ctypes
import math
import os
import signal
import sys
from pathlib import Path

from ..allocator import keep_freed_memory
from ..errors import PREEMPTED, UserError
from ..files import write_json
from ..internals.python import leave

PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def end_with(parent: int) -> None:
    """Have the kernel send SIGTERM to this process when its parent ends; where there is no prctl, nothing happens."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it has ended already
            leave(PREEMPTED)


def train_and_measure(config: str) -> dict:
    """The numbers of a run: train it as its config says, from where it was left, and evaluate it."""
    from ..config.reading import read_train_config
    from ..training.train import train

    values = read_train_config(config, {})
    folder = train(values, where=config)
    measured = measure_task(folder) if values.get("task") else measure_stream(values, folder)
    return {"config": values} | sizes(folder) | speed(folder) | measured


def measure_stream(values: dict, folder: Path) -> dict:
    """Perplexity on the validation split, in windows of the training's length: every contender has the same context."""
    from ..config.arguments import S4TrainingArguments
    from ..data.sources import has_split, read_sources
    from ..evaluation.evaluate import evaluate, place
    from ..loading.model import load_model

    length = values.get("sequence_length", S4TrainingArguments.sequence_length)
    folders = read_sources(values["data"], None, "config").folders
    folders = [data for data in folders if has_split(data, "validation")] or folders[:1]
    model = place(load_model(folder), None)
    return joined([evaluate(model, data, "validation", length) for data in folders])


def joined(found: list[dict]) -> dict:
    """The perplexity over the tokens of all sources, from what `evaluate` says of each."""
    from ..evaluation.evaluate import perplexity

    tokens, nll = sum(one["tokens"] for one in found), sum(one["nll"] for one in found)
    value, error = perplexity(nll, tokens), None
    if value is not None and all(one.get("token_perplexity_standard_error") is not None for one in found):
        # sources are drawn apart: the variances of their sums add up
        errors = [one["tokens"] * one["token_perplexity_standard_error"] / one["token_perplexity"] for one in found]
        error = value * math.hypot(*errors) / tokens
    return {
        "measure": "perplexity",
        "value": value,
        "standard_error": error,
        "protocol": found[0]["protocol"],
        "split": found[0]["split"],
        "dataset": " + ".join(one["dataset"] for one in found),
        "nll": nll,
        "documents": sum(one.get("documents", 0) for one in found) or None,
    }


def measure_task(folder: Path) -> dict:
    """Accuracy on the test split, which the training has measured at its end."""
    from ..loading.folder import read_json

    found = read_json(folder / "test_results.json")
    share, number = found["test_accuracy"], found["examples"]
    error = (share * (1 - share) / number) ** 0.5
    return {"measure": "accuracy", "value": share, "standard_error": error, "split": "test", "protocol": found["task"]}


def sizes(folder: Path) -> dict:
    """Parameters of the model in a folder, all of them and those outside of embeddings and an untied head."""
    from .sizes import count

    return dict(zip(("parameters", "without_embeddings"), count(folder), strict=True))


def speed(folder: Path) -> dict:
    """Steps, tokens, seconds and FLOPs of training, by the log: what was taken again after a kill counts once."""
    from ..training.history import read_metrics

    steps, tokens, seconds, flops = 0, None, 0.0, None
    for entry in read_metrics(folder):
        if "loss" not in entry:
            continue
        taken, steps = entry["step"] - steps, entry["step"]
        if "tokens" in entry:
            tokens = entry["tokens"]
            seconds += taken * tokens / entry["step"] / entry["tokens_per_second"]
            flops = round(tokens * entry["flops_per_second"] / entry["tokens_per_second"])  # a count, but for rounding
    return {
        "steps": steps,
        "tokens": tokens,
        "seconds": seconds if tokens else None,
        "tokens_per_second": tokens / seconds if tokens else None,
        "flops": flops,
    }


def main(config: str, result: str, parent: str) -> int:
    end_with(int(parent))
    try:
        write_json(Path(result), train_and_measure(config))
    except UserError as error:
        print(f"ssm-lm: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main(*sys.argv[1:]))
