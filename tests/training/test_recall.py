"""The tasks of recall through the same command, by our models and by transformers'."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from harness import REPO

from ssm_lm.cli import main
from ssm_lm.training.trainer import most_likely, recall_accuracy

LLAMA = {"type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def config(tmp_path):
    """config(name="induction", **overrides) -> a recipe of configs/train as a short run in tmp_path."""

    def write(name="induction", **overrides):
        values = yaml.safe_load((REPO / "configs" / "train" / f"{name}.yaml").read_text())
        short = {"output_dir": str(tmp_path / "run"), "report_to": [], "disable_tqdm": True, "max_steps": 3}
        short |= {"per_device_train_batch_size": 4, "eval_strategy": "no", "logging_steps": 1}
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(values | short | overrides))
        return str(path)

    return write


def test_accuracy_is_of_the_tokens_that_are_asked_for():
    labels = np.array([[-100, -100, 5, 6], [-100, 7, -100, -100]])
    predictions = np.array([[0, 5, 0, 9], [7, 0, 0, 0]])  # at the place before: right, wrong, right
    found = recall_accuracy(SimpleNamespace(predictions=predictions, label_ids=labels))
    assert found == {"accuracy": pytest.approx(2 / 3)}
    logits = torch.tensor([[[0.0, 2.0, 1.0]]])
    assert most_likely(logits, None).tolist() == most_likely((logits, "a cache"), None).tolist() == [[1]]


OURS = {"hidden_size": 8, "num_hidden_layers": 1, "state_size": 4}


@pytest.mark.parametrize("model", [OURS, LLAMA], ids=["ours", "llama"])
def test_a_short_run(config, tmp_path, model):
    assert main(["train", config(model=model)]) == 0
    found = json.loads((tmp_path / "run" / "test_results.json").read_text())
    assert found["task"] == "induction"
    assert found["examples"] == 2000
    assert 0 <= found["test_accuracy"] < 0.2  # one token of 20
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[2])
    assert last["tokens"] == 3 * 4 * 31
    assert last["flops_per_second"] > 0


@pytest.mark.slow
def test_attention_learns_induction(config, tmp_path):
    """So that the task can be learnt, and from its examples: two layers of attention do it."""
    model = LLAMA | {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128}
    short = {"max_steps": 250, "per_device_train_batch_size": 64, "warmup_steps": 25, "logging_steps": 50}
    assert main(["train", config(model=model, **short, save_strategy="no")]) == 0
    assert json.loads((tmp_path / "run" / "test_results.json").read_text())["test_accuracy"] > 0.9


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": LLAMA | {"vocab_size": 20}}, "model.vocab_size must be 21"),
        ({"model": {"type": "gpt2", "hidden_size": 16, "n_head": 2, "n_positions": 30}}, "n_positions 30"),
        ({"task": "inductoin"}, "induction"),
    ],
    ids=["vocabulary", "positions", "name"],
)
def test_mistakes_are_one_line(config, changes, words, capsys):
    assert main(["train", config(**changes)]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_estimate_knows_the_tasks(config, tmp_path):
    assert main(["estimate", config(), "--gpus", "1", "--json", str(tmp_path / "report.json")]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["run"]["sequence_length"] == 31
