"""What transformers 5 expects of every model class, where the tests of the model itself do not ask for it."""

import json

import pytest
import tiny
import torch
from huggingface_hub.errors import StrictDataclassError
from tiny import MIXTURE, SIZES, checkpoint_activations, tiny_model
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from ssm_lm import S4Config, S4ForCausalLM, S4ForSequenceClassification, S4Model

SSMS = ("s4", "s4d", "s5")
BLOCKS = {"ssm": "s4d", "arch": MIXTURE}


build = tiny_model


def prompt(length=12, batch=2):
    return tiny.prompt(length, batch)


# ---- configuration


def test_a_configuration_is_checked_when_it_changes_and_when_it_is_saved(tmp_path):
    config = S4Config(**SIZES)
    with pytest.raises(StrictDataclassError, match="hidden_size"):
        config.hidden_size = "wide"
    config.state_size = 7  # of the right type; whether it makes a model is asked when it is saved
    with pytest.raises((ValueError, StrictDataclassError), match="state_size"):
        config.save_pretrained(tmp_path)


def test_a_configuration_comes_back_from_its_file(tmp_path):
    config = S4Config(**SIZES, adaptive_cutoffs=(20, 40), num_labels=5, eos_token_id=[1, 2], dt_min=0.01)
    config.save_pretrained(tmp_path)
    assert S4Config.from_pretrained(tmp_path).to_dict() == config.to_dict() | {"adaptive_cutoffs": [20, 40]}


@pytest.mark.parametrize("kw", [{}, *({"ssm": ssm} for ssm in SSMS), {"arch": "gated", "expand": 2}], ids=str)
def test_a_config_without_heads_passes_over_their_size(kw):
    """transformers' own testers set head_dim on every config whose class knows the key."""
    names = dict(build(**kw).named_parameters())
    assert dict(build(head_dim=16, **kw).named_parameters()).keys() == names.keys()
    with pytest.raises((ValueError, StrictDataclassError), match="head_dim"):
        build(head_dim=0, **kw)


# ---- dtype


@pytest.mark.parametrize("kw", [*({"ssm": ssm} for ssm in SSMS), BLOCKS], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_state_spaces_in_float32(kw, dtype, tmp_path):
    model, ids = build(**kw), prompt()
    model.save_pretrained(tmp_path)
    halves = [
        S4ForCausalLM.from_pretrained(tmp_path, dtype=dtype),
        build(**kw).to(dtype),
        S4ForCausalLM._from_config(model.config, dtype=dtype),
    ]
    for half in halves:
        assert half.dtype == dtype
        for name, parameter in half.named_parameters():
            assert parameter.dtype == (torch.float32 if ".ssm." in name else dtype), name
    with torch.no_grad():
        out = halves[0](ids, use_cache=True)
        assert out.logits.dtype == dtype
        assert {state.dtype for layer in out.past_key_values.layers for state in layer.states} == {torch.float32}
        torch.testing.assert_close(out.logits.float(), model(ids).logits, rtol=0.1, atol=0.2)
    halves[0].save_pretrained(tmp_path / "again")
    again = S4ForCausalLM.from_pretrained(tmp_path / "again")
    assert again.dtype == dtype
    assert torch.equal(again(ids).logits, halves[0](ids).logits)


# ---- forward


@torch.no_grad()
def test_logits_to_keep():
    model, ids = build(), prompt()
    logits = model(ids).logits
    for keep, expected in (
        (0, logits),
        (1, logits[:, -1:]),
        (torch.tensor([0, 5, 11]), logits[:, [0, 5, 11]]),
    ):
        torch.testing.assert_close(model(ids, logits_to_keep=keep).logits, expected)


@pytest.mark.parametrize("cls", [S4Model, S4ForCausalLM, S4ForSequenceClassification])
@torch.no_grad()
def test_outputs(cls):
    model, ids = build(cls, kernels="torch"), prompt()  # what records goes the long way, which rounds otherwise
    out = model(ids, output_hidden_states=True)
    assert len(out.hidden_states) == 3
    backbone = model if cls is S4Model else model.model
    assert torch.equal(out.hidden_states[0], backbone.embed_tokens(ids))
    has_cache = cls is not S4ForSequenceClassification  # with one, few tokens go one by one, which rounds otherwise
    assert torch.equal(out.hidden_states[-1], backbone(ids, use_cache=has_cache).last_hidden_state)
    plain = model(ids, return_dict=False)
    assert isinstance(plain, tuple)
    assert torch.equal(plain[0], next(iter(out.values())))
    model.config.output_hidden_states = True
    assert len(model(ids, use_cache=False, return_dict=False)[-1]) == 3


@torch.no_grad()
def test_a_cache_is_made_where_it_is_asked_for():
    model, ids = build(), prompt()
    assert isinstance(model(ids).past_key_values, DynamicCache)
    assert model(ids, use_cache=False).past_key_values is None
    model.config.use_cache = False
    assert model(ids).past_key_values is None


def test_the_loss_over_several_batches():
    """num_items_in_batch: the sum over all tokens of an accumulated batch, whatever the micro-batches."""
    model, ids = build(), prompt(batch=3)
    labels = ids.clone()
    labels[0, :7] = -100
    labels[2, 4:] = -100
    items = (labels[:, 1:] != -100).sum()
    parts = [model(ids[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=items).loss for i in range(3)]
    torch.testing.assert_close(sum(parts), model(ids, labels=labels).loss)


# ---- embeddings


@pytest.mark.parametrize("tied", [True, False])
def test_resize_token_embeddings(tied, tmp_path):
    model, ids = build(tie_word_embeddings=tied), prompt()
    before = model(ids).logits
    model.resize_token_embeddings(70)
    assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == 70
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    after = model(ids, labels=ids)
    assert after.logits.shape[-1] == 70
    assert torch.isfinite(after.loss)
    torch.testing.assert_close(after.logits[..., :60], before)
    model.save_pretrained(tmp_path)
    assert torch.equal(S4ForCausalLM.from_pretrained(tmp_path)(ids).logits, after.logits)
    model.resize_token_embeddings(60)
    torch.testing.assert_close(model(ids).logits, before)


def test_embeddings_can_be_replaced():
    model = build(tie_word_embeddings=False)
    model.set_input_embeddings(torch.nn.Embedding(60, 16))
    head = torch.nn.Linear(16, 60, bias=False)
    model.set_output_embeddings(head)
    assert model.get_output_embeddings() is model.lm_head is head
    out = model.train()(prompt(), labels=prompt())
    out.loss.backward()
    assert head.weight.grad is not None


# ---- saving and loading


@pytest.mark.parametrize("kw", [{}, BLOCKS, {"ssm": "s5"}, {"adaptive_cutoffs": [20, 40]}], ids=str)
@pytest.mark.parametrize("device_map", [None, "cpu", "auto"])
def test_shards_and_device_maps(kw, device_map, tmp_path):
    model, ids = build(**kw), prompt()
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    loaded = S4ForCausalLM.from_pretrained(tmp_path, device_map=device_map)
    assert {parameter.device.type for parameter in loaded.parameters()} == {"cpu"}
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


# ---- activation checkpointing


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kw", [{"ssm": ssm} for ssm in SSMS] + [BLOCKS, {"mode": "fft"}], ids=str)
def test_activation_checkpointing_changes_nothing(kw, reentrant):
    ids, gradients = prompt(40), []
    for checkpointing in (False, True):
        model = build(**kw, chunk_size=16, dropout=0.1).train()
        if checkpointing:
            checkpoint_activations(model, {"use_reentrant": reentrant})
        torch.manual_seed(3)  # the same dropout, drawn again in the backward
        out = model(ids, labels=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        assert isinstance(out, CausalLMOutputWithPast)
        out.loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


# ---- frozen state spaces


@pytest.mark.parametrize("frozen", [(".ssm.",), (".C", ".log_dt"), ("",)], ids=str)
@pytest.mark.parametrize("kw", [*({"ssm": ssm} for ssm in SSMS), BLOCKS], ids=str)
def test_gradients_where_parameters_are_frozen(kw, frozen):
    ids = prompt(20)
    model = build(**kw, chunk_size=8).train()
    model(ids, labels=ids).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in frozen))
    embeddings = model.model.embed_tokens(ids).detach().requires_grad_()
    model(inputs_embeds=embeddings, labels=ids).loss.backward()
    assert embeddings.grad.abs().sum() > 0
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None
        elif "embed_tokens" not in name:  # its gradient came by way of the input, too
            torch.testing.assert_close(parameter.grad, expected[name])
