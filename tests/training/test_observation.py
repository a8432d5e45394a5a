"""What TensorBoard gets beside the log: histograms and norms by layer, a text."""

import math

import pytest
import torch
from harness import base_config, losses

from ssm_lm import S4Config, S4ForCausalLM
from ssm_lm.cli import main
from ssm_lm.modeling.ssm import S4, S4D, S5, SSD
from ssm_lm.training.observation import distributions, gradient_norms, state_norms


def test_tensorboard_gets_layers_and_texts_and_the_run_stays_the_same(write_config, tmp_path):
    model = base_config("", "")["model"] | {"dropout": 0.1}
    keys = {"max_steps": 4, "model": model}
    assert main(["train", write_config("plain", **keys, observe_steps=0)]) == 0
    looked = {"observe_steps": 2, "sample_text_steps": 2, "sample_text_prompt": "the cat", "report_to": ["tensorboard"]}
    assert main(["train", write_config("looked", **keys, **looked)]) == 0
    assert losses(tmp_path / "looked") == losses(tmp_path / "plain")  # dropout draws the same numbers
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "looked" / "runs"), size_guidance={"histograms": 0, "tensors": 0}).Reload()
    layer = "model.layers.0.sublayers.0.inner.ssm"
    for name in (f"log10_dt/{layer}", f"log10_time_constant/{layer}"):
        assert [event.step for event in events.Histograms(name)] == [0, 2]
    histogram = events.Histograms(f"log10_dt/{layer}")[0].histogram_value
    assert histogram.num == 16  # a step a channel
    assert -3 <= histogram.min <= histogram.max <= -1  # dt_min and dt_max
    scalars = set(events.Tags()["scalars"])
    assert {f"state_norm/{layer}", "gradient_norm/model.layers.0", "gradient_norm/model.embed_tokens"} <= scalars
    rates = {k: [e.value for e in events.Scalars(f"train/{k}")] for k in ("learning_rate", "ssm_learning_rate")}
    assert rates["ssm_learning_rate"] == pytest.approx([0.3 * rate for rate in rates["learning_rate"]])
    (text,) = [tag for tag in events.Tags()["tensors"] if tag.startswith("sample")]
    texts = events.Tensors(text)
    assert [event.step for event in texts] == [2, 4]
    assert all(event.tensor_proto.string_val[0].decode().startswith("    the cat ") for event in texts)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (S4(6, 8, n_ssm=2), (6, 4)),
        (S4D(6, 8, discretization="zoh"), (6, 4)),
        (S5(6, 8), (4,)),
        (SSD(6, 8, head_dim=2), (3,)),
    ],
)
def test_a_time_constant_is_when_a_state_has_lost_all_but_its_eth_part(layer, shape):
    constants = layer.time_constants()
    assert constants.shape == shape
    if isinstance(layer, S4):  # the low rank makes its states forget faster
        assert torch.allclose(constants * layer.log_dt.exp()[:, None], torch.tensor(2.0))  # Re Lambda is -1/2
        return
    turned = layer.transition(1).unflatten(-1, (2, -1)).norm(dim=-2)  # |A_bar| of each pair
    turned = turned[:: layer.head_dim, 0] if isinstance(layer, SSD) else turned
    assert torch.allclose(turned.log(), -1 / constants, rtol=1e-3)


def test_norms_are_of_what_they_say():
    config = S4Config(vocab_size=20, hidden_size=8, num_hidden_layers=2, state_size=8, ssm="s4d", arch="s4-ffn")
    model = S4ForCausalLM(config)
    tokens = torch.randint(0, 20, (1, 30))
    model(input_ids=tokens, labels=tokens).loss.backward()
    norms = gradient_norms(model)
    second = [p.grad for name, p in model.named_parameters() if name.startswith("model.layers.1.")]
    assert norms["gradient_norm/model.layers.1"].item() == pytest.approx(
        math.sqrt(sum(float(grad.double().pow(2).sum()) for grad in second)), rel=1e-5
    )
    whole = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    assert math.hypot(*(float(norm) for norm in norms.values())) == pytest.approx(float(whole), rel=1e-5)
    states = state_norms(model, tokens)
    cache = model.eval()(input_ids=tokens, use_cache=True).past_key_values
    assert len(states) == 2
    for found, layer in zip(states.values(), cache.layers, strict=True):
        assert found.item() == pytest.approx(layer.states[0].norm().item(), rel=1e-5)
    model.model.layers[0].sublayers[0].inner.ssm.log_dt.data[0] = math.inf
    assert len(next(iter(distributions(model).values()))) == 7  # what is finite
    parted = model.model.layers[0].sublayers[0].inner.ssm.Lambda_log_re  # by ZeRO 3, which may leave log_dt whole
    parted.data = parted.data.new_empty(0)
    assert {name.split(".")[2] for name in distributions(model)} == {"1"}


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"observe_steps": -1}, "observe_steps must not be negative"),
        ({"sample_text_steps": 2, "task": "induction", "data": None}, "sample_text_steps does not go with task"),
    ],
)
def test_mistakes_are_one_line(write_config, capsys, keys, named):
    assert main(["train", write_config(**keys)]) == 2
    said = capsys.readouterr().err
    assert named in said
    assert said.count("\n") == 1
