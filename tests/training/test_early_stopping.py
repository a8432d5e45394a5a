"""A run that no longer gets better ends by itself, with its best model."""

import json
from types import SimpleNamespace

import pytest

from ssm_lm.cli import main
from ssm_lm.runs.listing import read_run
from ssm_lm.training.early_stopping import EarlyStopping, since_best

PATIENT = {
    "load_best_model_at_end": True,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "early_stopping_patience": 2,
}


@pytest.mark.parametrize(
    ("values", "since"),
    [([], 0), ([3.0], 0), ([3.0, 2.0], 0), ([2.0, 3.0], 1), ([2.0, 3.0, 2.0], 2), ([2.0, 3.0, 1.0], 0)],
)
def test_evaluations_since_the_best(values, since):
    assert since_best(values) == since
    assert since_best([-value for value in values], greater_is_better=True) == since


def test_what_is_no_number_is_never_better():
    assert since_best([2.0, float("nan"), float("nan")]) == 2
    assert since_best([float("nan"), 2.0]) == 0


def test_it_counts_in_the_log_and_each_step_once():
    """As a resumed run has it, which may have evaluated the step of its checkpoint a second time."""
    args = SimpleNamespace(metric_for_best_model="loss", greater_is_better=False)
    log = [{"step": 2, "eval_loss": 1.0}, {"step": 3, "loss": 9.0}, {"step": 4, "eval_loss": 1.5}]
    for again, stops in (
        ([], False),
        ([{"step": 4, "eval_loss": 1.5}], False),
        ([{"step": 6, "eval_loss": 1.1}], True),
    ):
        control = SimpleNamespace(should_training_stop=False)
        EarlyStopping(2).on_evaluate(args, SimpleNamespace(log_history=log + again), control)
        assert control.should_training_stop is stops


def test_a_run_ends_early_with_its_best_model(write_config, tmp_path, capsys):
    still = {"learning_rate": 1e-15, "ssm_learning_rate": 1e-15}  # less than the digits of the weights: nothing moves
    config = write_config(**PATIENT, **still)
    assert main(["train", config]) == 0
    said = capsys.readouterr().out
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    losses = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    assert list(losses) == [2, 4, 6]
    assert len(set(losses.values())) == 1
    assert "early end    step 6 of 20" in said
    assert json.loads((tmp_path / "run" / "trainer_state.json").read_text())["best_global_step"] == 2
    checkpoint = tmp_path / "run" / "checkpoint-2" / "model.safetensors"
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == checkpoint.read_bytes()
    assert read_run(tmp_path / "run").state == "finished"
    assert main(["train", config]) == 0
    assert "this run is finished (6 steps)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"early_stopping_patience": 0}, "must be at least 1"),
        ({"load_best_model_at_end": False}, "needs load_best_model_at_end"),
        ({"eval_strategy": "no"}, "needs load_best_model_at_end: true, and eval_strategy"),
    ],
)
def test_it_needs_evaluations_and_a_best_model(write_config, tmp_path, capsys, change, message):
    assert main(["train", write_config(**PATIENT | change)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
