import pytest
import torch

from ssm_lm import S4Config, S4ForCausalLM
from ssm_lm.training.param_groups import check_ssm_precision, parameter_groups


@pytest.fixture
def model():
    return S4ForCausalLM(S4Config(vocab_size=20, hidden_size=8, num_hidden_layers=1, state_size=4))


def test_every_parameter_is_in_the_right_group_once(model):
    groups = {g["name"]: g for g in parameter_groups(model, 1e-3, 1e-4, 0.1)}
    names = {id(p): n for n, p in model.named_parameters()}
    placed = {name: {names[id(p)] for p in group["params"]} for name, group in groups.items()}
    assert sorted(n for group in placed.values() for n in group) == sorted(names.values())
    assert placed["ssm"] == {n for n in names.values() if ".ssm." in n}
    assert {n.rsplit(".", 1)[1] for n in placed["ssm"]} == {"log_dt", "Lambda_log_re", "Lambda_im", "B", "C", "D", "P"}
    assert placed["no_decay"] == {n for n in names.values() if n.endswith("bias") or "norm" in n}
    assert "model.embed_tokens.weight" in placed["decay"]
    settings = {name: (group["lr"], group["weight_decay"]) for name, group in groups.items()}
    assert settings == {"decay": (1e-3, 0.1), "no_decay": (1e-3, 0.0), "ssm": (1e-4, 0.0)}


def test_frozen_parameters_are_left_out(model):
    model.model.requires_grad_(False)
    model.model.embed_tokens.weight.requires_grad_(True)
    groups = parameter_groups(model, 1e-3, 1e-4, 0.1)
    assert [g["name"] for g in groups] == ["decay"]


def test_a_state_space_in_half_precision_is_refused(model):
    check_ssm_precision(model)
    layer = model.model.layers[0].sublayers[0].inner.ssm
    layer.log_dt = torch.nn.Parameter(layer.log_dt.detach().bfloat16())
    with pytest.raises(RuntimeError, match=r"log_dt is torch.bfloat16"):
        check_ssm_precision(model)
