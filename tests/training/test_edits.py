"""Runs as people treat them: begun, killed, changed, made longer or shorter, on one rank or two, at random.

Whatever was done, a start ends in exit code 2 with one line before anything is written, or with the losses, rates and
weights of a plain loop that was given the same settings for the same steps. What is refused is known beforehand too.
"""

import contextlib
import io
import json
import random
import re
import time
from unittest import mock

import forked
import pytest
import torch
import yaml
from harness import base_config, losses, zero
from plain_loop import PlainLoop, factor
from safetensors.torch import load_file

import ssm_lm.training.checkpointing
from ssm_lm.cli import main
from ssm_lm.training.trainer import S4Trainer

STEPS = 8
SETTINGS = {
    "max_steps": STEPS,
    "learning_rate": 1e-2,
    "ssm_learning_rate": 3e-3,
    "weight_decay": 0.1,
    "lr_scheduler_type": "cosine",
    "lr_scheduler_kwargs": None,
    "warmup_steps": 2,
    "adam_beta2": 0.999,
    "max_grad_norm": 1.0,
    "label_smoothing_factor": 0.0,
}
FIXED = {"seed": 1, "sequence_length": 16}
OTHERS = {
    "logging_steps": 1,
    "save_steps": 2,
    "save_strategy": "steps",
    "save_total_limit": 3,
    "per_device_train_batch_size": 2,
    "train_batch_size_total": 4,
    "model": {"hidden_size": 8, "num_hidden_layers": 1, "state_size": 4, "ssm": "s4d", "chunk_size": 16},
}
EDITS = [
    {"max_steps": [4, 5, 6, 7, 9, 10, 12]},
    {"max_steps": [4, 5, 6, 7, 9, 10, 12]},
    {"learning_rate": [5e-3, 1e-2, 2e-2]},
    {"ssm_learning_rate": [1e-3, 3e-3]},
    {"weight_decay": [0.0, 0.1, 0.5]},
    {"lr_scheduler_type": ["cosine", "linear", "constant_with_warmup"], "lr_scheduler_kwargs": [None]},
    {"lr_scheduler_type": ["warmup_stable_decay"], "lr_scheduler_kwargs": [{"num_decay_steps": 2}]},
    {"warmup_steps": [1, 2, 3]},
    {"adam_beta2": [0.95, 0.999]},
    {"max_grad_norm": [0.5, 1.0]},
    {"label_smoothing_factor": [0.0, 0.1]},
    {"logging_steps": [1, 2, 3]},
    {"save_steps": [1, 2, 3]},
    {"seed": [2]},
    {"sequence_length": [20]},
    {},
]


class Killed(BaseException):
    """Ends a start within this process as SIGKILL would: nothing catches it."""


class Sequence:
    """One folder, and all that is done to it."""

    def __init__(self, seed: int, corpus, folder, two_ranks: float):
        self.random, self.corpus, self.folder, self.two_ranks = random.Random(seed), corpus, folder, two_ranks
        self.output = folder / "run"
        self.config = SETTINGS | FIXED | OTHERS | {"lr_scheduler_type": "cosine"}
        if self.random.random() < 0.3:  # some begin with a plateau
            self.config |= {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 2}}
        self.recorded: dict | None = None  # the settings that the run has now
        self.history: list[tuple[int, dict]] = []  # (step, settings that hold from there on)
        self.cuts: list[int] = []  # steps at which a start went on
        self.story: list[str] = []
        self.counts = {"refused": 0, "killed": 0, "ended": 0}

    # ---- what is done

    def start(self) -> None:
        edit = self.random.choice(EDITS) if self.recorded else {}
        config = self.config | {key: self.random.choice(values) for key, values in edit.items()}
        changed = [key for key in edit if key in SETTINGS]
        allowed = changed if self.random.random() < 0.6 else []
        ranks = 2 if self.random.random() < self.two_ranks else 1
        last, finished = self.last_checkpoint(), self.finished_step()
        until = (
            self.random.randint(last or 0, max(last or 0, config["max_steps"])) if self.random.random() < 0.7 else None
        )
        while_saving = self.random.random() < 0.3
        self.story.append(f"{edit and {key: config[key] for key in edit}} {allowed=} {ranks=} {until=} {while_saving=}")
        words = [self.write(config), *(["--allow_changes", ",".join(allowed)] if allowed else [])]
        refused = self.is_refused(config, allowed, last, finished)
        before = self.files()
        code, errors = self.run(words, ranks, until, while_saving)
        if refused:
            assert code == 2, errors
            assert len(errors) == 1
            assert self.files() == before
            self.counts["refused"] += 1
            return
        assert code in (0, None), errors
        self.config = config
        if finished is not None and finished >= config["max_steps"]:
            assert self.files() == before  # nothing to do
            return
        self.went_on_from(last or 0, config)
        self.counts["ended" if code == 0 else "killed"] += 1
        self.check(whole=code == 0)

    def run(self, words, ranks, until, while_saving) -> tuple[int | None, list[str]]:
        """(exit code, None where it was killed; lines of the error)."""
        return self.run_ranks(words, until) if ranks == 2 else self.run_here(words, until, while_saving)

    def run_here(self, words, until, while_saving):
        """In this process, until a step begins or a checkpoint is about to be published."""
        step, publish = S4Trainer.training_step, ssm_lm.training.checkpointing.publish

        def training_step(trainer, *args, **kwargs):
            if trainer.state.global_step == until and not while_saving:
                raise Killed
            return step(trainer, *args, **kwargs)

        def killed_publish(partial, checkpoint, facts):
            if while_saving and until is not None and facts["step"] >= until:
                raise Killed
            publish(partial, checkpoint, facts)

        errors = io.StringIO()
        with (
            mock.patch.object(S4Trainer, "training_step", training_step),
            mock.patch.object(ssm_lm.training.checkpointing, "publish", killed_publish),
            contextlib.redirect_stderr(errors),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            try:
                code = main(["train", *words])
            except Killed:
                code = None
        return code, errors.getvalue().strip().splitlines()

    def run_ranks(self, words, until):
        """Two processes, without DeepSpeed or with it, killed at some time after a step."""
        engine = self.random.choice([[], ["--deepspeed", zero(2)]])
        with forked.Ranks(["-m", "ssm_lm", "train", *words, *engine], 2) as ranks:
            if until is not None:
                deadline = time.monotonic() + 100
                while time.monotonic() < deadline and all(p.is_alive() for p in ranks.processes):
                    if any(int(step) >= until for step in re.findall(r"^step (\d+)/", ranks.said(), re.M)):
                        ranks.kill()
                        return (0 if self.finished_step() is not None else None), []
                    time.sleep(0.01)
            done = ranks.wait()
        lines = [line for line in done.stderr.splitlines() if line.startswith("ssm-lm: ")]
        return done.returncode, lines[:1] if len(set(lines)) <= 1 else lines

    # ---- what is known about it

    def is_refused(self, config, allowed, last, finished) -> bool:
        decay = (config["lr_scheduler_kwargs"] or {}).get("num_decay_steps", 0)
        if decay + config["warmup_steps"] > config["max_steps"] and decay:
            return True
        if self.recorded is None:
            return False
        if any(config[key] != FIXED[key] for key in FIXED):
            return True
        changed = {key for key in SETTINGS if config[key] != self.recorded[key]}
        if last is not None and last >= config["max_steps"]:
            changed.discard("max_steps")  # no step is taken
        longer = self.recorded | {"max_steps": config["max_steps"]}
        if all(factor(step, self.recorded) == factor(step, longer) for step in range(last or 0)):
            changed.discard("max_steps")
        if changed - set(allowed):
            return True
        return finished is not None and finished < config["max_steps"] and last is None

    def went_on_from(self, step: int, config: dict) -> None:
        settings = {key: config[key] for key in SETTINGS}
        if step >= config["max_steps"] and self.recorded is not None:
            settings["max_steps"] = self.recorded["max_steps"]
        self.recorded = settings
        self.history = [(at, old) for at, old in self.history if at < step] + [(step, settings)]
        self.cuts = [cut for cut in self.cuts if cut < step] + [step]

    def check(self, whole: bool) -> None:
        """Hold what the folder says against the plain loop."""
        entries = [entry for entry in self.metrics() if "loss" in entry]
        assert [entry["step"] for entry in entries] == sorted({entry["step"] for entry in entries})
        last = self.last_checkpoint() or 0
        loop = PlainLoop(self.corpus, self.config)
        steps = max([last, *(entry["step"] for entry in entries)])
        for step in range(steps):
            loop.take(next(settings for at, settings in reversed(self.history) if at <= step))
        begin = 0
        for entry in entries:  # the mean since the entry before, or since the run went on
            begin = max([begin, *(cut for cut in self.cuts if cut < entry["step"])])
            mean = sum(loop.losses[begin : entry["step"]]) / (entry["step"] - begin)
            assert entry["loss"] == pytest.approx(mean, rel=1e-4 if self.two_ranks else 1e-5)
            assert entry["learning_rate"] == pytest.approx(loop.rates[entry["step"] - 1], rel=1e-6, abs=1e-12)
            begin = entry["step"]
        if whole:
            assert self.finished_step() == steps
            weights = load_file(self.output / "model.safetensors")
            for name, parameter in loop.model.named_parameters():
                torch.testing.assert_close(weights[name], parameter.data, rtol=1e-3, atol=2e-5)

    # ---- the folder

    def write(self, config) -> str:
        path = self.folder / "run.yaml"
        path.write_text(yaml.safe_dump(base_config(self.corpus, self.output, **config)))
        return str(path)

    def files(self) -> dict:
        return {path: path.stat().st_mtime_ns for path in self.output.rglob("*")}

    def metrics(self) -> list[dict]:
        path = self.output / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    def last_checkpoint(self) -> int | None:
        marks = self.output.glob("checkpoint-*/complete.json")
        return max((json.loads(mark.read_text())["step"] for mark in marks), default=None)

    def finished_step(self) -> int | None:
        path = self.output / "run.json"
        return json.loads(path.read_text()).get("finished_step") if path.is_file() else None


def play(seeds, corpus, tmp_path, two_ranks: float) -> dict:
    """A sequence a seed; the counts of what happened. The story of one that fails is its message."""
    counts = {"sequences": 0, "starts": 0}
    for seed in seeds:
        sequence = Sequence(seed, corpus, tmp_path / str(seed), two_ranks)
        sequence.folder.mkdir()
        try:
            for _ in range(sequence.random.randint(3, 7)):
                sequence.start()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: " + "; ".join(sequence.story) + f": {error}") from error
        counts["sequences"] += 1
        counts["starts"] += len(sequence.story)
        for key, number in sequence.counts.items():
            counts[key] = counts.get(key, 0) + number
    print(f"seeds {seeds}: {counts}")
    return counts


def test_a_few_sequences_of_edits(corpus, tmp_path):
    counts = play(range(3), corpus, tmp_path, two_ranks=0.0)
    assert min(counts.values()) > 0


@pytest.mark.long
@pytest.mark.seconds(90)
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("first", [1000, 1100])
def test_many_sequences_of_edits(corpus, tmp_path, first):
    """Two hundred were played when they were written, these among them: 1,034 starts, none that failed."""
    counts = play(range(first, first + 12), corpus, tmp_path, two_ranks=0.1)
    assert min(counts.values()) > 5


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_new_settings_hold_under_deepspeed(corpus, tmp_path, stage):
    """A run made longer on a constant rate, with other rates, decay and betas: the plain loop's losses."""
    first = SETTINGS | FIXED | OTHERS | {"lr_scheduler_type": "constant_with_warmup", "max_steps": 4}
    then = first | {"max_steps": 8, "learning_rate": 5e-3, "ssm_learning_rate": 1e-3, "weight_decay": 0.5}
    then |= {"adam_beta2": 0.9, "max_grad_norm": 0.5}
    loop = PlainLoop(corpus, first)
    for config in (first, then):
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(base_config(corpus, tmp_path / "run", **config)))
        allowed = [key for key in SETTINGS if config[key] != first[key]]
        words = ["--allow_changes", ",".join(allowed)] if allowed else []
        forked.train(str(path), "--deepspeed", zero(stage), *words)
        for _ in range(4):
            loop.take(config)
    assert losses(tmp_path / "run") == pytest.approx(loop.losses, rel=1e-4)
