"""Runs that are made longer or shorter, and whose config is changed between two starts."""

import json
import math

import pytest
import torch
from harness import losses
from safetensors.torch import load_file

from ssm_lm.cli import main
from ssm_lm.data import windows
from ssm_lm.training.schedule import rate
from ssm_lm.training.trainer import S4Trainer

SAVED = {"save_strategy": "steps", "save_steps": 4, "max_steps": 8}
PLATEAU = {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 3}}


def refused(capsys, *command) -> str:
    """The one line that a start with this command ends in, before anything is written."""
    capsys.readouterr()
    assert main(["train", *command]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def entries(folder, key) -> list:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def record(folder) -> dict:
    return json.loads((folder / "run.json").read_text())


# ---- the schedule


@pytest.mark.parametrize(
    ("settings", "factor"),
    [
        ({"lr_scheduler_type": "cosine"}, lambda s: 0.5 * (1 + math.cos(math.pi * (s - 4) / 16))),
        ({"lr_scheduler_type": "linear"}, lambda s: (20 - s) / 16),
        ({"lr_scheduler_type": "constant_with_warmup"}, lambda s: 1.0),
        (PLATEAU, lambda s: 1.0 if s < 17 else 0.5 * (1 + math.cos(math.pi * (s - 17) / 3))),
    ],
)
def test_the_rate_is_a_function_of_the_step_and_the_config(settings, factor):
    settings = {"learning_rate": 0.01, "warmup_steps": 4, "max_steps": 20, "lr_scheduler_kwargs": None} | settings
    expected = [0.01 * (step / 4 if step < 4 else factor(step)) for step in range(20)]
    assert [rate(step, settings) for step in range(20)] == pytest.approx(expected)


def test_a_plateau_is_made_longer_without_a_jump(write_config, tmp_path, killed_after):
    """Before the decay has begun it is the run that was planned longer from the start."""
    short, long = SAVED | PLATEAU, SAVED | PLATEAU | {"max_steps": 12}
    assert main(["train", write_config("straight", **long)]) == 0
    killed_after(5, write_config("extended", **short))
    assert main(["train", write_config("extended", **long)]) == 0
    assert losses(tmp_path / "extended") == losses(tmp_path / "straight")
    assert record(tmp_path / "extended")["changes"] == [{"step": 4, "key": "max_steps", "from": 8, "to": 12}]


def test_a_finished_plateau_is_made_longer_from_before_its_decay(write_config, tmp_path):
    long = SAVED | PLATEAU | {"max_steps": 12}
    assert main(["train", write_config("straight", **long)]) == 0
    assert main(["train", write_config("short", **SAVED, **PLATEAU)]) == 0
    before = str(tmp_path / "short" / "checkpoint-4")
    assert main(["train", write_config("long", **long, resume_from_checkpoint=before)]) == 0
    assert losses(tmp_path / "long") == losses(tmp_path / "straight")


def test_a_cosine_is_made_longer_with_a_word_and_follows_the_new_curve(write_config, tmp_path, capsys):
    assert main(["train", write_config(**SAVED)]) == 0
    longer = write_config(**SAVED | {"max_steps": 12})
    line = refused(capsys, longer)
    assert "max_steps 8 -> 12 (the rate of step 8 goes from 0.0e+00 to" in line
    assert "--allow_changes max_steps" in line
    assert "finished_step" in record(tmp_path / "run")  # nothing was written
    assert main(["train", longer, "--allow_changes", "max_steps"]) == 0
    assert "max_steps 8 -> 12" in capsys.readouterr().out
    settings = record(tmp_path / "run")["identity"]
    expected = [rate(step, settings | {"max_steps": 8 if step < 8 else 12}) for step in range(12)]
    assert entries(tmp_path / "run", "learning_rate") == pytest.approx(expected)
    assert main(["train", longer]) == 0  # the word is said once
    assert "finished (12 steps)" in capsys.readouterr().out


def test_a_finished_run_without_a_checkpoint_is_not_begun_again(write_config, tmp_path, capsys):
    assert main(["train", write_config(max_steps=2)]) == 0
    assert "no checkpoint" in refused(capsys, write_config(max_steps=4), "--allow_changes", "max_steps")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"lr_scheduler_type": "warmup_stable_decay"}, "num_decay_steps"),
        (PLATEAU | {"warmup_steps": 6}, "more than max_steps, 8"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "no function of the step"),
        ({"lr_scheduler_kwargs": {"nonsense": 1}}, "nonsense"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(write_config, tmp_path, capsys, keys, words):
    line = refused(capsys, write_config(**SAVED | keys))
    assert "lr_scheduler" in line
    assert words in line
    assert not (tmp_path / "run").exists()


# ---- what changes the mathematics


CHANGED = {
    "learning_rate": 5e-3,
    "ssm_learning_rate": 1e-3,
    "weight_decay": 0.5,
    "lr_scheduler_type": "linear",
    "warmup_steps": 2,
    "adam_beta2": 0.9,
    "max_grad_norm": 0.1,
    "label_smoothing_factor": 0.1,
    "bf16": True,
    "spike_threshold": 5.0,
}


def test_what_changes_the_mathematics_needs_a_word_and_is_recorded(write_config, tmp_path, capsys, killed_after):
    killed_after(5, write_config(**SAVED))
    before = (tmp_path / "run" / "run.json").read_bytes()
    for key, value in CHANGED.items():
        line = refused(capsys, write_config(**SAVED | {key: value}))
        assert f"{key} " in line
        assert f"-> {value}" in line
        assert f"--allow_changes {key}" in line
    assert (tmp_path / "run" / "run.json").read_bytes() == before
    config = write_config(**SAVED | CHANGED)
    every = ",".join(CHANGED)
    line = refused(capsys, config, "--allow_changes", every.replace("weight_decay,", ""))
    assert "weight_decay 0.1 -> 0.5" in line
    assert "learning_rate" not in line.split("--allow_changes")[0]
    assert main(["train", config, "--allow_changes", every]) == 0
    recorded = record(tmp_path / "run")["changes"]
    assert {change["key"]: change["to"] for change in recorded} == CHANGED
    assert {change["step"] for change in recorded} == {4}


def test_the_new_values_are_used_and_adams_state_goes_on(write_config, tmp_path, killed_after, monkeypatch):
    killed_after(5, write_config(**SAVED))
    seen = {}
    plain = S4Trainer.training_step

    def training_step(self, *args, **kwargs):
        if not seen:
            optimizer = self.engine_optimizer()
            seen["groups"] = {group["name"]: group for group in optimizer.param_groups}
            seen["steps"] = {float(state["step"]) for state in optimizer.state.values()}
            seen["rates"] = [group["lr"] for group in optimizer.param_groups]
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(S4Trainer, "training_step", training_step)
    new = {"learning_rate": 5e-3, "weight_decay": 0.5, "adam_beta2": 0.9}
    assert main(["train", write_config(**SAVED | new), "--allow_changes", ",".join(new)]) == 0
    settings = record(tmp_path / "run")["identity"]
    assert seen["steps"] == {4.0}
    assert seen["groups"]["decay"]["weight_decay"] == 0.5
    assert all(group["betas"] == (0.9, 0.9) for group in seen["groups"].values())
    factor = rate(4, settings) / 5e-3
    assert seen["rates"] == pytest.approx([5e-3 * factor, 5e-3 * factor, 3e-3 * factor])


@pytest.mark.parametrize(
    ("key", "value"), [("seed", 9), ("optim", "sgd"), ("sequence_length", 20), ("per_device_train_batch_size", 2)]
)
def test_what_no_run_can_change_is_refused_whatever_is_allowed(write_config, capsys, killed_after, key, value):
    killed_after(5, write_config(**SAVED))
    assert "holds another run" in refused(capsys, write_config(**SAVED | {key: value}))
    assert "allow_changes" in refused(capsys, write_config(**SAVED | {key: value}), "--allow_changes", key)


def test_a_branch_with_another_rate_needs_the_word_too(write_config, tmp_path, capsys):
    assert main(["train", write_config(**SAVED)]) == 0
    earlier = str(tmp_path / "run" / "checkpoint-4")
    branch = write_config("branch", **SAVED | {"learning_rate": 5e-3, "resume_from_checkpoint": earlier})
    assert "learning_rate 0.01 -> 0.005" in refused(capsys, branch)
    assert not (tmp_path / "branch").exists()
    assert main(["train", branch, "--allow_changes", "learning_rate"]) == 0
    assert record(tmp_path / "branch")["changes"][0]["step"] == 4
    assert main(["train", branch]) == 0


# ---- checkpoints


def test_logging_and_saving_follow_the_config(write_config, tmp_path, capfd, killed_after):
    killed_after(5, write_config(**SAVED))
    assert main(["train", write_config(**SAVED | {"save_steps": 2, "logging_steps": 2})]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 6, 8]
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-8"]
    assert "do not match" not in "".join(capfd.readouterr())


def test_checkpoints_of_weights_alone_are_not_gone_on_from(write_config, tmp_path, capsys, killed_after):
    config = write_config(**SAVED, save_only_model=True)
    killed_after(5, config)
    line = refused(capsys, config)
    assert "save_only_model" in line
    assert "--init_from" in line
    assert "save_only_model" in refused(
        capsys, write_config("other", **SAVED, resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    )


def test_batches_that_were_passed_over_stay_so_in_another_folder(write_config, tmp_path, killed_after):
    """A branch of a run that went back sees what that run would have seen."""
    (tmp_path / "run").mkdir()
    config = write_config(**SAVED)
    killed_after(0, config)
    (tmp_path / "run" / "run.json").write_text(json.dumps(record(tmp_path / "run") | {"passed_over": [2, 6]}))
    assert main(["train", config]) == 0
    branch = write_config("branch", **SAVED, resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert main(["train", branch]) == 0
    assert losses(tmp_path / "branch") == losses(tmp_path / "run")
    assert record(tmp_path / "branch")["passed_over"] == [2, 6]


# ---- the order of the windows


def test_a_run_that_began_with_tables_goes_on_with_them(write_config, tmp_path, killed_after, monkeypatch):
    """A run of more than 65,536 windows from before the order was recorded; here, of more than four."""
    keys = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4}
    assert main(["train", write_config("tables", **keys)]) == 0
    monkeypatch.setattr(windows, "TABLE", 4)
    assert main(["train", write_config("keyed", **keys)]) == 0
    assert losses(tmp_path / "keyed")[0] != losses(tmp_path / "tables")[0]
    assert record(tmp_path / "keyed")["identity"]["order"] == "keyed"

    config = write_config("old", **keys)
    with monkeypatch.context() as patch:
        patch.setattr(windows, "TABLE", 1 << 16)
        killed_after(6, config)
    for path in (tmp_path / "old" / "run.json", tmp_path / "old" / "checkpoint-4" / "complete.json"):
        said = json.loads(path.read_text())
        del said["identity"]["order"]
        path.write_text(json.dumps(said))
    assert main(["train", config]) == 0
    assert losses(tmp_path / "old") == losses(tmp_path / "tables")
    assert record(tmp_path / "old")["identity"]["order"] == "tables"


def test_dropout_goes_on_where_the_data_begin_at_a_step(write_config, tmp_path, killed_after):
    """No batch is read and passed over, and the random numbers are those of a run that was not stopped."""
    model = {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 8, "ssm": "s4d", "dropout": 0.3}
    keys = SAVED | {"model": model, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    assert main(["train", write_config("straight", **keys)]) == 0
    config = write_config("killed", **keys)
    killed_after(6, config)
    assert main(["train", config]) == 0
    assert losses(tmp_path / "killed") == losses(tmp_path / "straight")


# ---- epochs


def test_each_epoch_is_saved_evaluated_and_logged(write_config, tmp_path, capsys, corpus):
    """The stream has 24 steps of these windows an epoch, and a little more."""
    from ssm_lm.data.stream import TokenStream
    from ssm_lm.data.windows import TokenWindows, WindowSampler

    windows = len(WindowSampler(TokenWindows(TokenStream.open(str(corpus), "train"), 250)))
    strategies = dict.fromkeys(("save_strategy", "eval_strategy", "logging_strategy"), "epoch")
    keys = {"max_steps": -1, "num_train_epochs": 3, "sequence_length": 250, "save_total_limit": None}
    assert main(["train", write_config(**strategies, **keys)]) == 0
    steps = int(3 * windows / 4)
    assert f"{steps} steps = {4 * steps / windows:.2f} epochs" in capsys.readouterr().out
    ends = [math.ceil(windows / 4), math.ceil(2 * windows / 4), steps]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval_loss" in line] == ends
    assert [line["step"] for line in lines if "loss" in line] == ends
    assert [line["epoch"] for line in lines if "loss" in line] == pytest.approx([1, 2, 3], abs=0.2)
    folders = {path.name for path in (tmp_path / "run").glob("checkpoint-*")}
    assert folders == {f"checkpoint-{step}" for step in ends}


# ---- the best checkpoint


BEST = SAVED | {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "save_total_limit": 1}


@pytest.fixture
def measured(monkeypatch):
    """measured({step: loss}): evaluation finds these."""

    def patch(by_step):
        plain = S4Trainer.evaluate

        def evaluate(self, *args, **kwargs):
            metrics = plain(self, *args, **kwargs)
            return metrics | {"eval_loss": by_step[self.state.global_step]}

        monkeypatch.setattr(S4Trainer, "evaluate", evaluate)

    return patch


@pytest.mark.parametrize(
    ("found", "best"),
    [
        ({2: 0.5, 4: 3.0, 6: 0.4, 8: 2.0}, 8),  # 2 and 6 were never saved
        ({2: 0.5, 4: 2.0, 6: 0.4, 8: 3.0}, 4),
    ],
)
def test_the_best_is_one_that_was_saved(write_config, tmp_path, measured, found, best):
    measured(found)
    assert main(["train", write_config(**BEST)]) == 0
    folder = tmp_path / "run"
    state = json.loads((folder / "trainer_state.json").read_text())
    assert (state["best_global_step"], state["best_metric"]) == (best, found[best])
    ours, theirs = (load_file(place / "model.safetensors") for place in (folder, folder / f"checkpoint-{best}"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_best_step_that_was_skipped_is_no_checkpoint(write_config, tmp_path, measured, monkeypatch, capsys):
    """A step that is skipped is not saved; where it was the best, another is."""
    measured({2: 5.0, 4: 1.0, 6: 5.0, 8: 3.0})
    plain = S4Trainer.compute_loss

    def compute_loss(self, model, *args, **kwargs):
        loss = plain(self, model, *args, **kwargs)
        if model.training and self.state.global_step == 3:
            self.faults.observe_loss(torch.tensor(math.nan))
        return loss

    monkeypatch.setattr(S4Trainer, "compute_loss", compute_loss)
    assert main(["train", write_config(**BEST)]) == 0
    assert "step 4: skipped" in capsys.readouterr().out
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert (state["best_global_step"], state["best_metric"]) == (8, 3.0)


def test_the_best_is_found_again_by_a_run_that_goes_on_elsewhere(write_config, tmp_path, measured):
    measured({2: 5.0, 4: 1.0, 6: 5.0, 8: 3.0})
    assert main(["train", write_config(**BEST)]) == 0
    (tmp_path / "run").rename(tmp_path / "moved")
    branch = write_config("branch", **BEST, resume_from_checkpoint=str(tmp_path / "moved" / "checkpoint-4"))
    assert main(["train", branch]) == 0
    state = json.loads((tmp_path / "branch" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / "moved" / "checkpoint-4")
    ours, theirs = (load_file(tmp_path / place / "model.safetensors") for place in ("branch", "moved/checkpoint-4"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
