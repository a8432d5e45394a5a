"""What a run says about how it was started, and what a dry run prints of it."""

import json
import re
import subprocess

import pytest
from harness import REPO, base_config

from ssm_lm.cli import main
from ssm_lm.config.reading import read_train_config, read_yaml
from ssm_lm.runs.listing import read_run
from ssm_lm.training.record import commit, schedule_text, versions

SAVING = {"save_strategy": "steps", "save_steps": 10, "eval_strategy": "steps", "eval_steps": 10}


@pytest.fixture(scope="module")
def finished(straight):
    """An undisturbed run with checkpoints, to be read."""
    return straight(**SAVING)


def test_the_resolved_config_is_the_same_run(finished, capsys):
    """Whatever the defaults will be one day: all of them stand in it."""
    assert main(["train", str(finished / "config.yaml"), "--dry-run"]) == 0
    assert "this run is finished (20 steps)" in capsys.readouterr().out
    values = read_train_config(str(finished / "config.yaml"), {})
    assert (values["learning_rate"], values["weight_decay"], values["max_steps"]) == (1e-2, 0.1, 20)
    assert values["model"]["intermediate_size"] == 64  # which follows from hidden_size
    assert values["model"]["vocab_size"] > 10
    text = (finished / "config.yaml").read_text()
    assert re.search(r"^learning_rate: 0.01 +# config$", text, re.MULTILINE)
    assert re.search(r"^weight_decay: 0.1 +# default$", text, re.MULTILINE)
    assert re.search(r"^  vocab_size: \d+ +# data$", text, re.MULTILINE)


def test_a_start_is_described(finished):
    (start,) = map(json.loads, (finished / "starts.jsonl").read_text().splitlines())
    assert start["command"].startswith("ssm-lm train ")
    assert (start["ranks"], start["step"]) == (1, 0)
    assert start["versions"] == versions()
    assert {"python", "ssm_lm", "torch", "transformers", "deepspeed"} <= set(start["versions"])
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPO, capture_output=True, text=True, check=True).stdout
    assert commit().removesuffix("+") == start["commit"].removesuffix("+") == head.strip()


def test_runs_lists_a_real_run(finished):
    found = read_run(finished)
    assert (found.state, found.step, found.last_step, found.checkpoint.name) == ("finished", 20, 20, "checkpoint-20")
    assert found.best[0] == "perplexity"


def test_a_dry_run_shows_where_values_are_from_and_the_schedule(corpus, tmp_path, write_config, capsys):
    config = write_config(deepspeed=str(REPO / "configs/deepspeed/zero2.json"))
    assert main(["train", config, "--dry-run", "--learning_rate", "2e-2", "--model.state_size", "4"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^learning_rate: 0.02 +# command line$", said, re.MULTILINE)
    assert re.search(r"^  state_size: 4 +# command line$", said, re.MULTILINE)
    assert re.search(r"^deepspeed: \{.*stage: 2.*\} +# config$", said, re.MULTILINE)
    assert "at step 1: 0.00e+00 / 0.00e+00, 4: 2.00e-02 / 3.00e-03, " in said
    assert f"begins    a new run in {tmp_path / 'run'}" in said
    assert not (tmp_path / "run").exists()


def test_a_dry_run_says_what_going_on_would_do(finished, capsys):
    longer = ["train", str(finished / "config.yaml"), "--dry-run", "--max_steps", "30"]
    assert main(longer) == 2
    assert "max_steps 20 -> 30" in capsys.readouterr().err
    assert main([*longer, "--allow_changes", "max_steps"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^resuming  .*checkpoint-20$", said, re.MULTILINE)
    assert re.search(r"^changed   max_steps 20 -> 30 .* from step 20 on$", said, re.MULTILINE)
    assert read_yaml(finished / "config.yaml")["max_steps"] == 20


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"lr_scheduler_type": "constant", "warmup_steps": 0, "max_steps": 1}, "at step 1: 1.00e+00 / 1.00e+00"),
        (
            {"lr_scheduler_type": "linear", "warmup_steps": 2, "max_steps": 11},
            "at step 1: 0.00e+00 / 0.00e+00, 3: 1.00e+00 / 1.00e+00, 7: 5.56e-01 / 5.56e-01, 9: 3.33e-01 / 3.33e-01, "
            "11: 1.11e-01 / 1.11e-01",
        ),
    ],
)
def test_the_schedule_at_five_steps(settings, expected):
    given = {"learning_rate": 1.0, "ssm_learning_rate": None, "lr_scheduler_kwargs": None}
    assert schedule_text(given | settings).endswith(expected)


def test_a_run_from_a_model_writes_no_model_keys(finished, corpus, tmp_path, write_config, capsys):
    """Exactly one of the two is said."""
    path = tmp_path / "from.yaml"
    values = base_config(corpus, tmp_path / "from", init_from=str(finished))
    del values["model"]
    path.write_text(json.dumps(values))
    assert main(["train", str(path), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "\nmodel:\n" not in text.split("\nmodel     ")[0]
    assert re.search(rf"^init_from: {finished} +# config$", text, re.MULTILINE)
