"""Every file in configs/ is what it says."""

import json
from pathlib import Path

import pytest
import torch

from ssm_lm import S4Config, S4ForCausalLM, S4ForSequenceClassification
from ssm_lm.comparison.contest import read_contest
from ssm_lm.config.deepspeed import deepspeed_config
from ssm_lm.config.model import model_config, new_language_model
from ssm_lm.config.reading import read_train_config, read_yaml
from ssm_lm.data.recall import RECALL_TASKS
from ssm_lm.data.sequences import TASKS
from ssm_lm.modeling.mixers import make_state_space

REPO = Path(__file__).parents[1]
CONFIGS = REPO / "configs"


@pytest.mark.parametrize("path", sorted((CONFIGS / "train").glob("*.yaml")), ids=lambda path: path.name)
def test_training_configs(path, monkeypatch):
    monkeypatch.chdir(REPO)
    values = read_train_config(str(path), {})
    deepspeed_config(values.get("deepspeed"), values.get("bf16", False), False)
    assert {"model", "output_dir", "learning_rate", "seed"} <= set(values)
    if "init_from" in values:  # the model is of another run
        assert {"data", "sequence_length", "num_train_epochs", "early_stopping_patience"} <= set(values)
        return
    with torch.device("meta"):
        if values.get("task") in RECALL_TASKS:
            assert "max_steps" in values  # examples never end
            S4ForCausalLM(S4Config(**({"vocab_size": 100} | values["model"])))
        elif "task" in values:
            assert values["task"].split(":")[0] in TASKS
            assert "num_train_epochs" in values
            S4ForSequenceClassification(S4Config(**({"vocab_size": 100, "num_labels": 2} | values["model"])))
        else:
            assert {"data", "sequence_length", "max_steps"} <= set(values)
            S4ForCausalLM(S4Config(**({"vocab_size": 100} | values["model"])))


@pytest.mark.parametrize("path", sorted((CONFIGS / "compare").glob("*.yaml")), ids=lambda path: path.name)
def test_comparisons(path, monkeypatch):
    """Contenders of a size differ by less than a tenth in parameters; of families, the first of each, and so on."""
    monkeypatch.chdir(REPO)
    contest = read_contest(str(path), {})
    sizes = {}
    for name in contest.contenders:
        values = contest.first_runs(name)[0].values
        with torch.device("meta"):
            model = new_language_model(model_config({"vocab_size": 4096} | values["model"], name))
        sizes.setdefault(contest.families.get(name, name), []).append(sum(p.numel() for p in model.parameters()))
    for of_one_size in zip(*sizes.values(), strict=True):
        assert max(of_one_size) < 1.1 * min(of_one_size)


@pytest.mark.parametrize("path", sorted((CONFIGS / "model").glob("*.yaml")), ids=lambda path: path.name)
def test_models(path):
    """Every key is explained, and on a GPU, under autocast, the scan is one that a kernel does."""
    lines = [line for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]
    assert all("#" in line for line in lines)
    config = S4Config(**read_yaml(path))
    with torch.device("meta"):
        layer = make_state_space(config)
    _, unsupported, _ = layer.scan_kernel("sm_90", torch.bfloat16)
    assert unsupported is None


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
    assert sorted(set(stages)) == [0, 1, 2, 3]


def test_the_wikitext_103_recipe(monkeypatch):
    """The model and the schedule of the S4 paper's 20.95 run, as upstream's configs say."""
    monkeypatch.chdir(REPO)
    path = CONFIGS / "train" / "wikitext103.yaml"
    lines = [line for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]
    assert all("#" in line for line in lines if not line.startswith("model:"))
    values = read_train_config(str(path), {})
    config = S4Config(**values["model"])
    with torch.device("meta"):
        model = S4ForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) == 243_375_994
    assert [tuple(p.shape) for n, p in model.model.embed_tokens.named_parameters() if "weight" in n] == [
        (19997, 1024),
        (20000, 256),
        (160000, 64),
        (67738, 16),
    ]
    assert {config.dropout, config.embedding_dropout, config.head_dropout} == {0.25}
    args = {key: values[key] for key in ("learning_rate", "ssm_learning_rate", "weight_decay", "warmup_steps")}
    assert args == {"learning_rate": 5e-4, "ssm_learning_rate": 5e-4, "weight_decay": 0.1, "warmup_steps": 1000}
    assert (values["sequence_length"], values["per_device_train_batch_size"], values["max_steps"]) == (8192, 1, 800000)
    assert (values["bf16"], values["max_grad_norm"]) == (True, 0.0)
    assert json.loads(Path(values["deepspeed"]).read_text())["zero_optimization"]["stage"] == 1
