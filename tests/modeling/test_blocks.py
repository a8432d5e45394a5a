"""What stands around a state space in a block: each kind of sublayer is its equation, in every mode, at every split."""

import pytest
import torch
import torch.nn.functional as F
from tiny import MIXTURE, prompt, tiny_config, tiny_model

MIXERS = {"h3": {}, "h3 of heads": {"head_dim": 4}, "gated": {}}
SSMS = ("s4", "s4d", "s5")


def mixer(kind, **values):
    return tiny_model(arch=[kind], num_hidden_layers=1, **values).model.layers[0].sublayers[0].inner


def test_a_list_of_kinds_is_an_architecture():
    model = tiny_model(arch=["ssm", "swiglu", "h3", "gated", "ffn"], ssm="s4d")
    names = [type(sublayer.inner).__name__ for sublayer in model.model.layers[1].sublayers]
    assert names == ["S4Mixer", "SwiGLU", "H3Mixer", "GatedMixer", "S4FeedForward"]
    cache = model(prompt(9), use_cache=True).past_key_values
    shapes = [(1, 16, 8), (1, 3, 48), (1, 16, 8), (1, 3, 32), (1, 32, 8)]  # (B, H, N), tails before their states
    assert [[tuple(state.shape) for state in layer.states] for layer in cache.layers] == [shapes] * 2


def test_names_of_architectures():
    assert tiny_config(arch="h3").sublayers == ("h3", "ffn")
    assert tiny_config(arch="gated").sublayers == ("gated",)
    for arch, norm in (("s4", "layer"), ("h3", "rms"), ("gated", "rms"), (["ssm", "swiglu"], "rms")):
        assert tiny_config(arch=arch).norm == norm
        assert tiny_config(arch=arch, norm="layer").norm == "layer"


def test_swiglu():
    layer = tiny_model(arch=["ssm", "swiglu"]).model.layers[0].sublayers[1].inner
    x = torch.randn(2, 5, 16)
    W = {name: parameter for name, parameter in layer.named_parameters()}
    assert W.keys() == {"gate_proj.weight", "up_proj.weight", "down_proj.weight"}  # no biases
    hidden = F.silu(x @ W["gate_proj.weight"].T) * (x @ W["up_proj.weight"].T)
    torch.testing.assert_close(layer(x), hidden @ W["down_proj.weight"].T)


def convolved(layer, x):
    """A causal depthwise convolution by torch."""
    padded = F.pad(x.transpose(1, 2), (layer.size - 1, 0))
    return F.conv1d(padded, layer.weight[:, None], layer.bias, groups=layer.channels).transpose(1, 2)


@pytest.mark.parametrize("ssm", SSMS)
def test_h3(ssm):
    layer = mixer("h3", ssm=ssm)
    assert layer.in_proj.bias is layer.out_proj.bias is None
    x = torch.randn(2, 9, 16)
    q, k, v = convolved(layer.conv, layer.in_proj(x)).split(16, -1)
    torch.testing.assert_close(layer(x), layer.out_proj(q * layer.ssm(k * v)[0]))


@pytest.mark.parametrize("ssm", SSMS)
def test_h3_of_heads(ssm):
    """Each of a head's keys with each of its values, one pair after the other."""
    layer = mixer("h3", ssm=ssm, head_dim=4)
    x = torch.randn(2, 9, 16)
    q, k, v = convolved(layer.conv, layer.in_proj(x)).split(16, -1)
    pairs = [(4 * head + c, 4 * head + e) for head in range(4) for c in range(4) for e in range(4)]
    y = layer.ssm(torch.stack([k[..., c] * v[..., e] for c, e in pairs], -1))[0]
    expected = torch.zeros_like(q)
    for number, (c, e) in enumerate(pairs):
        expected[..., e] += q[..., c] * y[..., number]
    torch.testing.assert_close(layer(x), layer.out_proj(expected))


@pytest.mark.parametrize("ssm", SSMS)
def test_gated(ssm):
    layer = mixer("gated", ssm=ssm, expand=3)
    assert layer.in_proj.bias is layer.out_proj.bias is None
    x = torch.randn(2, 9, 16)
    u, gate = layer.in_proj(x).split(48, -1)
    y = layer.ssm(F.silu(convolved(layer.conv, u)))[0] * F.silu(gate)
    normed = layer.norm.weight * y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(layer(x), layer.out_proj(normed))


def test_a_wider_block_has_a_system_a_channel_where_the_config_says_so():
    assert mixer("gated", ssm="s4d").ssm.n_ssm == 32
    assert mixer("gated", ssm="s4d", n_ssm=4).ssm.n_ssm == 4


@pytest.mark.parametrize("kind", MIXERS)
@pytest.mark.parametrize("ssm", SSMS)
@torch.no_grad()
def test_modes_and_splits_agree_in_float64(ssm, kind):
    """One forward in a mode, and two with the states handed over, at every cut."""
    keys = {"arch": [kind.split()[0], "swiglu"], "ssm": ssm, "chunk_size": 8, "num_hidden_layers": 1} | MIXERS[kind]
    ids, expected = prompt(21, batch=2), None
    for mode in ("chunk", "fft", "recurrent"):
        model = tiny_model(mode=mode, **keys).double()
        whole = model(ids, use_cache=False).logits
        expected = whole if expected is None else expected
        torch.testing.assert_close(whole, expected, rtol=1e-10, atol=1e-10)
        for cut in range(1, 21):
            first = model(ids[:, :cut], use_cache=True)
            second = model(ids[:, cut:], past_key_values=first.past_key_values)
            logits = torch.cat([first.logits, second.logits], 1)
            torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_a_padded_token_drives_no_state():
    """Though a convolution's bias would: a row of padding leaves every state at zero."""
    model, ids = tiny_model(arch=MIXTURE), prompt(9, batch=2)
    mask = torch.ones_like(ids)
    mask[1] = 0
    cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
    for state in cache.layers[0].states:
        assert state[0].abs().max() > 0 == state[1].abs().max()


def test_convolutions_start_as_those_of_torch_and_are_in_the_models_dtype():
    layer = mixer("h3", hidden_size=64, initializer_range=0.02).conv
    for parameter in layer.parameters():
        assert 0.45 < parameter.abs().max() <= 0.5
        assert parameter.std().item() == pytest.approx(0.5 / 3**0.5, rel=0.1)
    half = tiny_model(arch="h3").bfloat16()
    dtypes = {".ssm." in name: parameter.dtype for name, parameter in half.named_parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    assert torch.isfinite(half(prompt(9)).logits).all()
