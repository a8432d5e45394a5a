"""Every file in configs/ is what it says."""

import json
from pathlib import Path

import pytest
import torch

from ssm_lm import S4Config, S4ForCausalLM
from ssm_lm.training.config import read_train_config, read_yaml
from ssm_lm.training.precision import deepspeed_config

REPO = Path(__file__).parents[1]
CONFIGS = REPO / "configs"


@pytest.mark.parametrize("path", sorted((CONFIGS / "train").glob("*.yaml")), ids=lambda path: path.name)
def test_training_configs(path, monkeypatch):
    monkeypatch.chdir(REPO)
    values = read_train_config(str(path), {})
    with torch.device("meta"):
        S4ForCausalLM(S4Config(**({"vocab_size": 100} | values["model"])))
    deepspeed_config(values.get("deepspeed"), values.get("bf16", False), False)
    assert {"model", "data", "output_dir", "sequence_length", "max_steps", "learning_rate", "seed"} <= set(values)


@pytest.mark.parametrize("path", sorted((CONFIGS / "model").glob("*.yaml")), ids=lambda path: path.name)
def test_every_key_of_a_model_is_explained(path):
    lines = [line for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]
    assert all("#" in line for line in lines)
    S4Config(**read_yaml(path))


def test_every_key_of_the_deepspeed_configs_is_explained():
    text = (CONFIGS / "deepspeed" / "README.md").read_text()
    stages = []
    for path in sorted((CONFIGS / "deepspeed").glob("*.json")):
        config = json.loads(path.read_text())
        assert f"`{path.name}`" in text
        for key, value in config.items():
            for name in value if isinstance(value, dict) else [key]:
                assert f"{name}`" in text, name
        stages.append(config["zero_optimization"]["stage"])
    assert stages == [0, 1, 2, 3]
