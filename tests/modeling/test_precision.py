"""State space parameters, operators and states stay float32 whatever happens to the model around them."""

import pytest
import torch

from ssm_lm import S4Config, S4ForCausalLM
from ssm_lm.modeling.ssm import S4, S4D, StateSpace


def tiny(**kw):
    torch.manual_seed(0)
    return S4ForCausalLM(S4Config(vocab_size=50, hidden_size=16, num_hidden_layers=1, state_size=8, **kw)).eval()


def ssm_parameters(model):
    return [p for m in model.modules() if isinstance(m, StateSpace) for p in m.parameters()]


@pytest.mark.parametrize("move", [lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.to(torch.bfloat16)])
def test_moving_the_model_to_half_precision(move):
    model = tiny()
    before = [p.detach().clone() for p in ssm_parameters(model)]
    move(model)
    after = ssm_parameters(model)
    assert all(p.dtype == torch.float32 for p in after)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert model.lm_head.weight.dtype in (torch.float16, torch.bfloat16)


def test_double_goes_up():
    assert all(p.dtype == torch.float64 for p in ssm_parameters(tiny().double()))


def test_loading_in_bfloat16(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    loaded = S4ForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.lm_head.weight.dtype == torch.bfloat16
    for ours, theirs in zip(ssm_parameters(loaded), ssm_parameters(model), strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("mode", ["chunk", "fft", "recurrent"])
@pytest.mark.parametrize("cls", [S4, S4D])
def test_autocast_leaves_the_state_space_alone(cls, mode):
    torch.manual_seed(0)
    layer = cls(4, 16)
    u = torch.randn(1, 70, 4)
    with torch.no_grad():
        expected, _ = layer(u, mode=mode)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, state = layer(u, mode=mode)
    assert torch.equal(y, expected)
    assert state.dtype == torch.float32


def test_output_has_the_dtype_of_the_input_and_the_state_does_not():
    y, state = S4(4, 16)(torch.randn(1, 9, 4, dtype=torch.bfloat16))
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)


def test_loaded_parameters_are_not_initialised_again(tmp_path):
    model = tiny()
    with torch.no_grad():
        for parameter in ssm_parameters(model):
            parameter.add_(0.1)
    model.save_pretrained(tmp_path)
    loaded = S4ForCausalLM.from_pretrained(tmp_path)
    for (name, ours), theirs in zip(loaded.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
