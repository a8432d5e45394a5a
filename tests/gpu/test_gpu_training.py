"""Training by the command line on whatever device is there: a resumed run and ZeRO 2 on one rank."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from ssm_lm.cli import main

REPO = Path(__file__).parents[2]
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")]
SIZES = [
    pytest.param(
        {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 8, "chunk_size": 16},
        id="tiny",
        marks=pytest.mark.skipif(
            "SSM_LM_FIRST_DAY" not in os.environ, reason="a part of the rehearsal in test_first_day.py"
        ),
    ),
    pytest.param(
        {"hidden_size": 512, "num_hidden_layers": 4, "state_size": 64}, id="gpu", marks=[*GPU, pytest.mark.slow]
    ),
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    (folder / "text").mkdir()
    for split in ("train", "valid", "test"):
        (folder / "text" / f"{split}.txt").write_text("the cat sees the moon at night .\n" * 400)
    data = folder / "data"
    assert main(["prepare", "--dataset", str(folder / "text"), "--tokenizer", "words", "--output", str(data)]) == 0
    return data


def losses(folder: Path, corpus: Path, model: dict, **keys) -> list[float]:
    """Train six steps in a process of their own; the losses of the steps that it took."""
    config = {
        "model": model,
        "data": str(corpus),
        "output_dir": str(folder),
        "sequence_length": 64,
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "save_steps": 3,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "warmup_steps": 2,
        "report_to": [],
        "disable_tqdm": True,
        "seed": 1,
    }
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config | keys))
    environment = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "ssm_lm", "train", str(path)]
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ("resuming  " in done.stdout) == ("resume_from_checkpoint" in keys)
    assert f"engine    {'DeepSpeed ZeRO 2' if 'deepspeed' in keys else 'torch'}" in done.stdout
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


@pytest.mark.parametrize("model", SIZES)
def test_a_resumed_run_and_zero_2(model, corpus, tmp_path):
    straight = losses(tmp_path / "straight", corpus, model)
    assert len(straight) == 6
    assert straight[-1] < straight[0]
    keys = {"resume_from_checkpoint": str(tmp_path / "straight" / "checkpoint-3")}
    has_deepspeed = importlib.util.find_spec("deepspeed") is not None
    if has_deepspeed:  # which the plain checkpoint is converted to
        keys["deepspeed"] = str(REPO / "configs" / "deepspeed" / "zero2.json")
    resumed = losses(tmp_path / "resumed", corpus, model, **keys)
    assert resumed[-3:] == pytest.approx(straight[-3:], rel=1e-4)
    if not has_deepspeed:
        pytest.skip("resumed alike; without ZeRO 2, for DeepSpeed is not installed")
