"""What stands around a state space in a block: each kind of sublayer is its equation."""

import torch
import torch.nn.functional as F
from tiny import prompt, tiny_model


def test_a_list_of_kinds_is_an_architecture():
    model = tiny_model(arch=["ssm", "swiglu", "ssm", "ffn"], ssm="s4d")
    names = [type(sublayer.inner).__name__ for sublayer in model.model.layers[1].sublayers]
    assert names == ["S4Mixer", "SwiGLU", "S4Mixer", "S4FeedForward"]
    ids = prompt(20, batch=2)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        cache = model(ids[:, :9], use_cache=True).past_key_values
        assert [len(layer.states) for layer in cache.layers] == [2, 2]
        torch.testing.assert_close(model(ids[:, 9:], past_key_values=cache).logits, expected[:, 9:])


def test_swiglu():
    layer = tiny_model(arch=["ssm", "swiglu"]).model.layers[0].sublayers[1].inner
    x = torch.randn(2, 5, 16)
    W = {name: parameter for name, parameter in layer.named_parameters()}
    assert W.keys() == {"gate_proj.weight", "up_proj.weight", "down_proj.weight"}  # no biases
    hidden = F.silu(x @ W["gate_proj.weight"].T) * (x @ W["up_proj.weight"].T)
    torch.testing.assert_close(layer(x), hidden @ W["down_proj.weight"].T)
