"""Loading a model folder: the same logits back, and one clear line for everything that is wrong with it."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ssm_lm import S4Config, S4ForCausalLM
from ssm_lm.errors import UserError
from ssm_lm.loading.model import load_model
from ssm_lm.loading.tokenizer import check_vocabulary_fits, has_tokenizer, load_tokenizer

SIZES = dict(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=8, initializer_range=0.3)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    torch.manual_seed(0)
    S4ForCausalLM(S4Config(**SIZES)).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def save_tokenizer(folder, size=50):
    vocabulary = {f"w{number}": number for number in range(size)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="w1"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="w0", unk_token="w1").save_pretrained(folder)


def message(path, load=load_model, **kwargs):
    with pytest.raises(UserError) as caught:
        load(path, **kwargs)
    text = str(caught.value)
    assert "\n" not in text
    return text


def edit_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def edit_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_loads_what_was_saved(saved):
    torch.manual_seed(0)
    expected = S4ForCausalLM(S4Config(**SIZES))
    model = load_model(saved)
    assert not model.training
    for (name, ours), (_, theirs) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_half_precision_spares_the_state_spaces(saved):
    model = load_model(saved, "bfloat16")
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert {p.dtype for n, p in model.named_parameters() if ".ssm." in n} == {torch.float32}
    assert "--dtype int8" in message(saved, dtype="int8")


def test_training_output_folder(saved, tmp_path):
    for step in (5, 20, 100):
        shutil.copytree(saved, tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-100" / "config.json").unlink()  # not a whole checkpoint
    edit_weights(tmp_path / "checkpoint-20", lambda weights: weights["model.norm.bias"].fill_(7.0))
    assert load_model(tmp_path).model.norm.bias[0] == 7.0  # 20, not 5, which sorts after it as text
    assert load_model(tmp_path / "checkpoint-5").model.norm.bias[0] == 0.0
    (tmp_path / "checkpoint-5" / "complete.json").write_text("{}")
    assert load_model(tmp_path).model.norm.bias[0] == 0.0  # 20 was being written when the run was killed
    save_tokenizer(tmp_path)
    assert load_tokenizer(tmp_path / "checkpoint-5").eos_token_id == 0
    assert load_tokenizer(tmp_path).eos_token_id == 0


def test_missing_folder_and_config(folder, tmp_path):
    assert "no such folder" in message(tmp_path / "nothing")
    assert "no such folder" in message("nothing-of-this-name")
    assert "is a file" in message(folder / "config.json")
    (folder / "config.json").unlink()
    assert "config.json: no such file" in message(folder)


def test_typing_error_in_a_relative_path_does_not_ask_the_hub(tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    assert "no such folder" in message("runs/one")


def test_hub_id_without_network(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "no-such-user/no-such-model: config.json: cannot be read" in message("no-such-user/no-such-model")


def test_another_architecture(folder):
    edit_config(folder, model_type="gpt2")
    text = message(folder)
    assert "another architecture" in text
    assert "'gpt2'" in text
    assert "'s4'" in text


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"state_size": 7}, "state_size"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"chunk_size": 4096}, "chunk_size 4096 costs gigabytes"),
    ],
)
def test_config_that_makes_no_model(folder, change, expected):
    edit_config(folder, **change)
    assert expected in message(folder)
    if "chunk_size" not in change:  # the verbs load the tokenizer first, for which transformers reads config.json
        save_tokenizer(folder)
        text = message(folder, load_tokenizer)
        assert f"{folder}/config.json: describes no model" in text
        assert expected in text
        assert "Class validation" not in text


def test_config_that_is_not_json(folder):
    (folder / "config.json").write_text("{")
    assert "config.json: cannot be read" in message(folder)


def test_weights_of_another_shape(folder):
    edit_config(folder, vocab_size=98)
    text = message(folder)
    assert "97x32, not 98x32" in text


def test_missing_and_unexpected_weights(folder):
    edit_weights(folder, lambda weights: weights.pop("model.norm.bias"))
    assert "missing: model.norm.bias" in message(folder)
    edit_weights(folder, lambda weights: weights.update({"model.norm.bias": torch.zeros(32), "extra": torch.ones(1)}))
    assert "unexpected: extra" in message(folder)


def test_fewer_layers_than_the_weights_have(folder):
    edit_config(folder, num_hidden_layers=1)
    assert "unexpected: model.layers.1" in message(folder)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_weights(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    text = message(folder)
    assert str(file) in text
    assert "truncated or damaged" in text


def test_missing_shard(folder, saved):
    load_model(saved).save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    load_model(folder)
    shards[1].unlink()
    assert shards[1].name in message(folder)


def test_pickles_are_refused_unread(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pickle" in message(folder)
    (folder / "pytorch_model.bin").rename(folder / "training_args.bin")
    assert "model.safetensors: no such file" in message(folder)


def test_code_in_the_folder_is_not_run(folder):
    edit_config(folder, auto_map={"AutoConfig": "evil.S4Config", "AutoModelForCausalLM": "evil.S4ForCausalLM"})
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    assert type(load_model(folder)) is S4ForCausalLM


def test_tokenizer(folder):
    assert not has_tokenizer(folder)
    assert "tokenizer.json: no such file" in message(folder, load_tokenizer)
    save_tokenizer(folder, size=97)
    assert has_tokenizer(folder)
    check_vocabulary_fits(load_tokenizer(folder), load_model(folder), folder)
    save_tokenizer(folder, size=98)
    with pytest.raises(UserError, match="up to 97"):
        check_vocabulary_fits(load_tokenizer(folder), load_model(folder), folder)
    (folder / "tokenizer.json").write_text("{}")
    assert "cannot be loaded" in message(folder, load_tokenizer)
