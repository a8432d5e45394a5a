"""Sequence classification through the same command."""

import json

import pytest
import yaml
from harness import REPO, losses

from ssm_lm.cli import main

pytest.importorskip("sklearn")


@pytest.fixture
def digits_config(tmp_path):
    def write(**overrides):
        values = yaml.safe_load((REPO / "configs" / "train" / "digits.yaml").read_text())
        values |= {"output_dir": str(tmp_path / "run"), "report_to": [], "disable_tqdm": True}
        model = values["model"] | overrides.pop("model", {})
        path = tmp_path / "digits.yaml"
        path.write_text(yaml.safe_dump(values | overrides | {"model": model}))
        return str(path)

    return write


EPOCHS = {"s4": 20, "s4d": 15, "s5": 30}  # of the config's 40


@pytest.mark.long
@pytest.mark.seconds(85)
@pytest.mark.parametrize("ssm", EPOCHS)
def test_digits_are_learnt(digits_config, tmp_path, ssm):
    """The config with each layer, in less than its time: 96% of the test digits."""
    assert main(["train", digits_config(num_train_epochs=EPOCHS[ssm], model={"ssm": ssm})]) == 0
    results = json.loads((tmp_path / "run" / "test_results.json").read_text())
    assert results["examples"] == 360
    assert results["test_accuracy"] >= 0.96


def test_a_short_run_writes_a_classifier(digits_config, tmp_path):
    from ssm_lm import S4ForSequenceClassification

    config = digits_config(max_steps=8, logging_steps=1, eval_strategy="no", model={"hidden_size": 8})
    assert main(["train", config]) == 0
    assert len(losses(tmp_path / "run")) == 8
    model = S4ForSequenceClassification.from_pretrained(tmp_path / "run")
    assert model.score.out_features == 10


def test_an_unknown_task_is_one_line(digits_config, capsys):
    assert main(["train", digits_config(task="cifar")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
