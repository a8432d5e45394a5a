"""`ssm-lm export --int8`: what is saved is loaded as it was, by transformers alone."""

import sys
from pathlib import Path

import pytest
import torch

from ssm_lm.cli import main
from ssm_lm.data.bpe import train_bpe
from ssm_lm.hub.int8 import quantised

sys.path.append(str(Path(__file__).parents[1] / "modeling"))  # tiny.py
from tiny import ENDLESS, SSD, prompt, tiny_model

ARCHITECTURE = {"ssm": "ssd", "arch": SSD, "hidden_size": 64, **ENDLESS}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("int8") / "run"
    tokenizer = train_bpe(["the cat sat on the mat\n" * 5], 300)
    tokenizer.save_pretrained(folder)
    tiny_model(**ARCHITECTURE, vocab_size=len(tokenizer)).save_pretrained(folder)
    return folder


def test_an_export_in_int8_is_loaded_as_it_was_saved(run_folder, tmp_path):
    from transformers import AutoModelForCausalLM

    from ssm_lm.loading.model import load_model

    assert main(["export", str(run_folder), "--output", str(tmp_path / "int8"), "--int8"]) == 0
    plain = load_model(run_folder)
    ours, loaded = quantised(plain), AutoModelForCausalLM.from_pretrained(tmp_path / "int8", trust_remote_code=True)
    kinds = {name: type(value.data).__name__ for name, value in loaded.named_parameters()}
    assert {name for name, kind in kinds.items() if kind != "Tensor"} == {
        name for name, value in plain.named_parameters() if name.endswith("_proj.weight")
    }
    for name, value in loaded.named_parameters():
        if kinds[name] == "Tensor":
            assert torch.equal(value, dict(plain.named_parameters())[name]), name
    ids = prompt(30, batch=2)
    with torch.no_grad():
        exact, saved, found = (model.eval()(ids).logits for model in (plain, ours, loaded))
    assert torch.equal(saved, found)
    assert 0 < (exact - found).abs().max() < 0.1 * exact.abs().max()
    options = {"max_new_tokens": 12, "do_sample": False}
    stepped = loaded.generate(ids, **options)
    whole = ids
    with torch.no_grad():
        for _ in range(12):
            whole = torch.cat([whole, loaded(whole).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(stepped, whole)
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (run_folder, tmp_path / "int8")]
    assert sizes[1] < 0.6 * sizes[0]


def test_half_precision_around_it(run_folder, tmp_path):
    from transformers import AutoModelForCausalLM

    assert main(["export", str(run_folder), "--output", str(tmp_path / "half"), "--int8", "--dtype", "bfloat16"]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "half", trust_remote_code=True)
    assert {value.dtype for name, value in model.named_parameters() if ".ssm." in name} == {torch.float32}
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert model(prompt(10)).logits.isfinite().all()


def test_the_card_says_what_it_needs_and_the_commands_that_they_do_not_take_it(run_folder, tmp_path, capsys):
    folder = tmp_path / "int8"
    assert main(["export", str(run_folder), "--output", str(folder), "--int8"]) == 0
    card = (folder / "README.md").read_text()
    assert "pip install torchao accelerate" in card
    assert "ssm-lm generate" not in card
    assert main(["generate", str(folder), "--prompt", "the"]) == 2
    assert "the weights are quantised" in capsys.readouterr().err
    assert main(["export", str(run_folder), "--output", str(tmp_path / "x"), "--int8", "--format", "onnx"]) == 2
    assert "--int8: belongs to --format transformers" in capsys.readouterr().err
