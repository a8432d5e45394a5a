"""Checkpoints that go on under another engine, or with another number of ranks: the losses stay the same."""

import json
import os
import re

import forked
import pytest
import torch
from harness import REPO, losses, rewind, zero
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

ENGINES = ("torch", "zero0", "zero1", "zero2", "zero3")
# enough layers for several buffers, an odd size for padding, two learning rates for the parameter groups
MODEL = {"hidden_size": 15, "num_hidden_layers": 1, "state_size": 6, "ssm": "s4", "chunk_size": 16}
SETTINGS = {"model": MODEL, "max_steps": 12, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 9}


def engine_options(engine: str) -> list[str]:
    return [] if engine == "torch" else ["--deepspeed", str(REPO / f"configs/deepspeed/{engine}.json")]


def assert_same_run(ours, theirs):
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-5)
    weights, reference = (load_file(folder / "model.safetensors") for folder in (ours, theirs))
    for key in weights.keys() & reference.keys():  # ZeRO 3 writes a tied weight once, the others twice
        torch.testing.assert_close(weights[key], reference[key], rtol=1e-4, atol=1e-5)


def test_every_engine_goes_on_from_the_one_before_it(write_config, tmp_path, straight):
    """One rank: torch to step 2, ZeRO 0 to step 4, ..., ZeRO 3 to step 10, and torch to the end."""
    config, start = write_config(**SETTINGS), straight(**SETTINGS)
    before = start
    for number, engine in enumerate([*ENGINES[1:], "torch"], 1):
        place = tmp_path / f"{number} {engine}"
        rewind(before, place, 2 * number)
        forked.train(config, "--output_dir", str(place), *engine_options(engine))
        assert_same_run(place, start)
        mark = json.loads((place / f"checkpoint-{2 * number + 2}" / "complete.json").read_text())
        assert mark["engine"] == engine
        before = place


@pytest.mark.parametrize(("stage", "others"), [(2, [(1, 0), (2, 3)]), (3, [(1, 2)])])
def test_two_ranks_and_then_another_number_or_stage(write_config, tmp_path, stage, others):
    settings = SETTINGS | {"train_batch_size_total": 4, "per_device_train_batch_size": 2}
    start = write_config("start", **settings)
    forked.train(start, *engine_options(f"zero{stage}"), ranks=2)
    for ranks, other in others:
        place = tmp_path / f"{ranks} ranks at stage {other}"
        rewind(tmp_path / "start", place, 4)
        done = forked.train(start, "--output_dir", str(place), *engine_options(f"zero{other}"), ranks=ranks)
        assert done.stdout.count("in one process\n") == 1
        assert "resuming" in done.stdout
        assert_same_run(place, tmp_path / "start")


class Shell:
    """What a pickle can hold: a call that is made when it is read."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize(
    ("writer", "reader", "file"),
    [
        ("torch", "zero2", "optimizer.pt"),  # read here
        ("zero2", "zero3", "*_optim_states.pt"),  # read by DeepSpeed's converter
        ("zero2", "zero2", "*_optim_states.pt"),  # read by DeepSpeed's engine
    ],
)
def test_no_checkpoint_can_run_a_command(write_config, tmp_path, straight, writer, reader, file):
    settings = SETTINGS if writer == "torch" else SETTINGS | {"deepspeed": zero(2)}
    place, ran = tmp_path / "run", tmp_path / "ran"
    rewind(straight(**settings), place, 4)
    (path,) = (place / "checkpoint-4").rglob(file)
    torch.save({"first": Shell(f"touch {ran}"), **torch.load(path, weights_only=False)}, path)
    mark = json.loads((place / "checkpoint-4" / "complete.json").read_text())
    mark["files"][str(path.relative_to(place / "checkpoint-4"))] = path.stat().st_size
    (place / "checkpoint-4" / "complete.json").write_text(json.dumps(mark))
    done = forked.attempt(["-m", "ssm_lm", "train", write_config("run", **SETTINGS), *engine_options(reader)])
    assert not ran.exists()
    assert done.returncode == 2, done.stderr
    assert re.search(r"checkpoint-4: a file in it holds \w+.system, which", done.stderr.splitlines()[-1])


@pytest.mark.parametrize("config", ["zero2_offload", "zero3_offload"])
def test_offload_changes_nothing(write_config, tmp_path, straight, config):
    forked.train(write_config("offloaded", **SETTINGS, deepspeed=str(REPO / f"configs/deepspeed/{config}.json")))
    assert_same_run(tmp_path / "offloaded", straight(**SETTINGS))
