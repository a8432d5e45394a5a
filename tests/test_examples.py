"""The programs in examples/ do what they claim, on a model small enough for seconds."""

import importlib.util
import json
import random
from pathlib import Path

import pytest
import torch
import transformers.dynamic_module_utils

from ssm_lm import S4Config, S4ForCausalLM
from ssm_lm.cli import main
from ssm_lm.data.bpe import train_bpe

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str):
    """The module examples/NAME.py."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def text() -> str:
    rng = random.Random(0)
    lines = [f"the {rng.choice(['cat', 'dog'])} sees the {rng.choice(['moon', 'river'])} .\n" for _ in range(400)]
    return "".join(lines)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A fresh model and its tokenizer, with the code beside them, as `ssm-lm export` writes it."""
    folder = tmp_path_factory.mktemp("examples") / "model"
    tokenizer = train_bpe([text()], 300)
    torch.manual_seed(0)
    config = S4Config(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, state_size=8, arch="s4-ffn")
    S4ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tuned(exported, tmp_path_factory):
    """What examples/finetune.py makes of it: (folder, losses)."""
    folder = exported.with_name("tuned")
    source = exported.with_name("text.txt")
    source.write_text(text())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        arguments = [str(exported), "--text", str(source), "--output", str(folder)]
        losses = example("finetune").main([*arguments, "--steps", "40", "--length", "64", "--learning-rate", "0.02"])
    return folder, losses


def test_every_example_has_a_test():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {
        "finetune",
        "layer_on_a_signal",
        "drafts",
        "perplexity",
    }
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 70, path.name


def test_finetune_lowers_the_loss_of_an_export(tuned):
    folder, losses = tuned
    assert len(losses) == 40
    assert losses[-1] < 0.6 * losses[0]
    assert {"model.safetensors", "modeling_s4.py", "tokenizer.json"} <= {path.name for path in folder.iterdir()}


def test_finetune_leaves_the_state_spaces_out_of_the_weight_decay(exported, tmp_path):
    finetune = example("finetune")
    model = S4ForCausalLM.from_pretrained(exported)
    arguments = finetune.TrainingArguments(output_dir=str(tmp_path), report_to=[])
    decayed = finetune.StateSpaceTrainer(model=model, args=arguments).get_decay_parameter_names(model)
    assert decayed
    assert not set(decayed) & set(model.no_weight_decay())


def test_the_layer_learns_the_filter_and_streams_it():
    found = example("layer_on_a_signal").main()
    assert found["before"] > 0.5
    assert found["after"] < 0.01
    assert found["streaming"] < 1e-5


def test_drafts_give_the_tokens_of_greedy_search_in_fewer_forwards(tuned, monkeypatch, tmp_path):
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path))
    found = example("drafts").main([str(tuned[0]), "--prompt", "the cat sees", "--tokens", "40"])
    greedy, forwards = found.pop("greedy")
    assert forwards == len(greedy) == 40
    assert len(set(greedy)) > 3
    assert len(found) == 2
    for tokens, fewer in found.values():
        assert tokens == greedy
        assert fewer < 0.8 * forwards


def test_perplexity_is_that_of_eval(exported, tmp_path, monkeypatch):
    """Counted by plain transformers, and by `ssm-lm eval` on the same file."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    source = tmp_path / "test.txt"  # a split by its name, and so whole
    source.write_text(text())
    theirs = example("perplexity").main([str(exported), str(source), "--chunk", "100"])
    command = ["eval", str(exported), "--data", str(tmp_path), "--json", str(tmp_path / "found.json")]
    assert main(command) == 0
    ours = json.loads((tmp_path / "found.json").read_text())
    for name, value in theirs.items():
        assert value == pytest.approx(ours[name.replace(" ", "_")], rel=1e-5), name
