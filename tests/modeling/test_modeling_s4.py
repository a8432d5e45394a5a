from functools import partial

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from tiny import checkpoint_activations, tiny_config, tiny_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from ssm_lm import S4Config, S4ForCausalLM, S4Model

config = partial(tiny_config, initializer_range=0.2)
model = partial(tiny_model, initializer_range=0.2)


@pytest.mark.parametrize(("arch", "kinds"), [("s4", ["ssm", "ssm", "ffn"]), ("s4-ffn", ["ssm", "ffn"])])
@pytest.mark.parametrize("ssm", ["s4", "s4d", "s5"])
def test_block_layouts(arch, kinds, ssm):
    m = model(arch=arch, ssm=ssm)
    assert len(m.model.layers) == 2
    for layer in m.model.layers:
        assert ["ssm" if hasattr(s.inner, "ssm") else "ffn" for s in layer.sublayers] == kinds
        assert {s.inner.ssm.name for s in layer.sublayers if hasattr(s.inner, "ssm")} == {ssm}
    out = m(torch.randint(0, 60, (2, 11)), labels=torch.randint(0, 60, (2, 11)))
    assert out.logits.shape == (2, 11, 60)
    assert torch.isfinite(out.loss)


def test_parameter_count_of_the_wikitext_103_backbone():
    """The backbone of upstream's WikiText-103 model: 203,743,232 parameters (48 sublayers and the final norm)."""
    with torch.device("meta"):
        backbone = S4Model(S4Config(vocab_size=1, hidden_size=1024, num_hidden_layers=16, state_size=64))
    parameters = sum(p.numel() for n, p in backbone.named_parameters() if not n.startswith("embed_tokens"))
    assert parameters == 203_743_232


@pytest.mark.parametrize("mode", ["chunk", "fft", "recurrent"])
@pytest.mark.parametrize(
    "kw", [{}, {"ssm": "s5", "ssm_blocks": 2}, {"ssm_init": "legt"}, {"ssm": "s4d", "ssm_init": "real"}], ids=str
)
def test_modes_agree_in_the_model(mode, kw):
    ids = torch.randint(0, 60, (2, 90), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(model(mode=mode, **kw)(ids).logits, model(**kw)(ids).logits, rtol=1e-4, atol=1e-4)


def test_causal():
    m = model()
    ids = torch.randint(0, 60, (1, 30))
    changed = ids.clone()
    changed[0, 20] = (changed[0, 20] + 1) % 60
    with torch.no_grad():
        a, b = m(ids).logits, m(changed).logits
    torch.testing.assert_close(a[:, :20], b[:, :20], rtol=1e-5, atol=1e-5)
    assert (a[:, 20:] - b[:, 20:]).abs().amax(-1).min() > 1e-6


@pytest.mark.parametrize("ssm", ["s4", "s4d", "s5"])
def test_a_forward_goes_on_from_a_cache_at_every_split(ssm):
    m = model(chunk_size=8, ssm=ssm)
    ids = torch.randint(0, 60, (2, 21))
    with torch.no_grad():
        whole = m(ids).logits
        for cut in range(1, 21):
            first = m(ids[:, :cut], use_cache=True)
            second = m(ids[:, cut:], past_key_values=first.past_key_values, use_cache=True)
            torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole, rtol=1e-4, atol=1e-4)
            assert second.past_key_values.get_seq_length() == 21


def test_the_cache_does_not_grow():
    m = model()
    sizes = []
    for length in (5, 50):
        cache = m(torch.zeros(1, length, dtype=torch.long), use_cache=True).past_key_values
        sizes.append(sum(state.numel() for layer in cache.layers for state in layer.states))
    assert sizes[0] == sizes[1] == 2 * 2 * 16 * 8  # layers x state spaces x H x N


def test_logits_to_keep_inputs_embeds_hidden_states():
    m = model()
    ids = torch.randint(0, 60, (2, 12))
    with torch.no_grad():
        full = m(ids, output_hidden_states=True)
        torch.testing.assert_close(m(ids, logits_to_keep=3).logits, full.logits[:, -3:])
        torch.testing.assert_close(m(inputs_embeds=m.get_input_embeddings()(ids)).logits, full.logits)
    assert len(full.hidden_states) == 3
    with pytest.raises(ValueError, match="exactly one of"):
        m()


def test_loss_is_the_mean_over_the_shifted_labels():
    m = model()
    ids = torch.randint(0, 60, (2, 12))
    labels = ids.clone()
    labels[0, :5] = -100
    with torch.no_grad():
        out = m(ids, labels=labels)
    log_probabilities = out.logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    expected = -log_probabilities[labels[:, 1:] != -100].mean()
    torch.testing.assert_close(out.loss, expected)


def test_gradient_checkpointing_changes_nothing():
    ids = torch.randint(0, 60, (2, 40))
    gradients = []
    for checkpointing in (False, True):
        m = model().train()
        if checkpointing:
            checkpoint_activations(m)
        m(ids, labels=ids).loss.backward()
        gradients.append([p.grad.clone() for p in m.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kw", [{}, {"ssm": "s5", "ssm_blocks": 2, "norm": "rms", "glu": "half"}], ids=str)
def test_save_and_load(tmp_path, kw):
    m = model(**kw)
    m.save_pretrained(tmp_path)
    ids = torch.randint(0, 60, (2, 12))
    for cls in (S4ForCausalLM, AutoModelForCausalLM):
        loaded = cls.from_pretrained(tmp_path)
        assert type(loaded) is S4ForCausalLM
        assert torch.equal(loaded(ids).logits, m(ids).logits)
    assert type(AutoModel.from_pretrained(tmp_path)) is S4Model
    loaded = AutoConfig.from_pretrained(tmp_path).to_dict()
    assert loaded | {"_name_or_path": ""} == m.config.to_dict()
    assert m.lm_head.weight is m.model.embed_tokens.weight


@pytest.mark.parametrize("glu", ["glu", "half", "none"])
def test_what_mixes_the_channels(glu):
    m = model(glu=glu)
    mixer = m.model.layers[0].sublayers[0].inner
    x = torch.randn(2, 9, 16)
    with torch.no_grad():
        y = torch.nn.functional.gelu(mixer.ssm(x)[0])
        z = mixer.out_proj(y)
        expected = {
            "glu": lambda: z[..., :16] * z[..., 16:].sigmoid(),
            "half": lambda: y * z.sigmoid(),
            "none": lambda: z,
        }
        torch.testing.assert_close(mixer(x), expected[glu]())


def test_rms_norm():
    m = model(norm="rms")
    assert not any(isinstance(module, torch.nn.LayerNorm) for module in m.modules())
    norms = [module for module in m.modules() if isinstance(module, torch.nn.RMSNorm)]
    assert len(norms) == 2 * 3 + 1
    assert all(torch.equal(norm.weight, torch.ones(16)) for norm in norms)


def test_tied_dropout_drops_a_channel_everywhere():
    torch.manual_seed(0)
    m = model(tie_dropout=True, dropout=0.5)
    dropout = m.model.layers[0].sublayers[0].dropout
    x = torch.ones(3, 7, 16)
    assert torch.equal(dropout(x), x)
    y = dropout.train()(x)
    assert set(y.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(y, y[:, :1].expand_as(y))
    assert not torch.equal(y[0], y[1])


def test_a_language_model_is_causal_and_reads_tokens():
    for kw in ({"bidirectional": True}, {"input_size": 3}):
        with pytest.raises(ValueError, match=next(iter(kw))):
            S4ForCausalLM(config(**kw))


def test_the_config_says_what_was_built():
    assert (config().discretization, config().n_ssm, config().intermediate_size) == ("bilinear", 1, 64)
    assert (config(ssm="s5").discretization, config(ssm="s5").n_ssm) == ("zoh", 1)
    assert (config(ssm="s4d").discretization, config(ssm="s4d").n_ssm) == ("zoh", 16)
    # two matrices of 4 H, or three of about 8/3 H
    assert config(arch=["ssm", "swiglu"], hidden_size=128).intermediate_size == 344
    assert config(arch=["ssm", "swiglu", "ffn"], hidden_size=128).intermediate_size == 512


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"arch": "mamba"}, "arch is one of"),
        ({"arch": ["ssm", "mamba"]}, "arch as a list"),
        ({"arch": ["ffn"]}, "at least one with a state space"),
        ({"ssm": "s6"}, "ssm is one of"),
        ({"mode": "scan"}, "mode is one of"),
        ({"ssm_init": "lin"}, "ssm_init is one of"),
        ({"discretization": "zoh"}, "discretization is one of"),
        ({"state_size": 3}, "state_size"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"n_ssm": 5}, "n_ssm"),
        ({"dropout": 1.5}, "dropout"),
        ({"glu": "gated"}, "glu is one of"),
        ({"norm": "batch"}, "norm is one of"),
        ({"pooling": "first"}, "pooling is one of"),
        ({"ssm": "s5", "ssm_blocks": 3}, "ssm_blocks"),
        ({"ssm_blocks": 2}, "ssm_blocks"),
        ({"ssm": "s5", "n_ssm": 4}, "n_ssm"),
        ({"ssm": "s5", "b_clip": 2.0}, "b_clip"),
        ({"b_clip": -2.0}, "b_clip"),
        ({"input_size": 0}, "input_size"),
        ({"dt_min": 1.0}, "dt_min"),
        ({"hidden_size": "large"}, "hidden_size"),
        ({"conv_size": 0}, "conv_size"),
        ({"expand": 0}, "expand"),
        ({"arch": "h3", "head_dim": 3}, "head_dim must divide"),
    ],
)
def test_bad_configs_name_the_key(kwargs, message):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        config(**kwargs)
