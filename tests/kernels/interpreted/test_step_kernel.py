"""The decode step's kernels, interpreted, against their twins in float64, and models that decode with them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import assert_close, assert_passes, compare_with_twin, gapped
from torch.library import opcheck
from transformers import GenerationConfig

from ssm_lm import S4Config, S4ForCausalLM
from ssm_lm.modeling import triton_ssd_step
from ssm_lm.modeling.activations import ACTIVATIONS
from ssm_lm.modeling.discrete import DiscreteDiagonal, DiscreteDPLR, DiscreteMIMO
from ssm_lm.modeling.single_steps import Memo
from ssm_lm.modeling.ssd import SSD
from ssm_lm.modeling.ssm import S4, S4D, S5
from ssm_lm.modeling.triton_ssd_step import ssd_step_
from ssm_lm.modeling.triton_step import mimo_step_, self_check_cases, siso_step_

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def siso(K, B, H, N, dtype=torch.float32):
    """u, state, coefficients, skip"""
    return torch.randn(B, H).to(dtype), torch.randn(B, H, N), torch.randn(K, H, N) / N**0.5, torch.randn(H)


def mimo(B, H, P, dtype=torch.float32):
    """u, state, Lambda, weight_in, weight_out, skip"""
    weights = torch.randn(P, H) / H**0.5, torch.randn(H, P) / P**0.5
    return torch.randn(B, H).to(dtype), torch.randn(B, 1, P), torch.randn(P), *weights, torch.randn(H)


def siso_step(u, state, coefficients, skip):
    """The twin, of the discrete system that has these coefficients."""
    E, C_row, *others = coefficients
    if others:
        B_bar, *pairs = others
        system = DiscreteDPLR(E, torch.stack(pairs[::2], -1), torch.stack(pairs[1::2], -1), B_bar, C_row)
    else:
        system = DiscreteDiagonal(None, None, None, None, E, C_row)
    y, state = system.step(u, state)
    return y + skip * u, state


def mimo_step(u, state, Lambda, weight_in, weight_out, skip):
    y, state = DiscreteMIMO(None, None, Lambda, weight_in.T, weight_out.T).step(u, state)
    return y + skip * u, state


def compare(kernel, twin, inputs, activation="gelu"):
    def in_place(u, state, *system):
        state = state.clone()
        return kernel(u, state, *system, activation), state

    def naive(u, state, *system):
        y, state = twin(u, state, *system)
        return ACTIVATIONS[activation].function(y), state

    compare_with_twin(in_place, naive, inputs, TOLERANCE[inputs[0].dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("K", [2, 5, 7])
def test_siso(K, dtype):
    compare(siso_step_, siso_step, siso(K, 3, 13, 34, dtype))


def test_siso_of_a_batch_that_fills_no_block():
    compare(siso_step_, siso_step, siso(5, 33, 7, 64))


def test_siso_of_a_state_beyond_one_warp():
    compare(siso_step_, siso_step, siso(5, 2, 3, 600))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("B", [3, 19])  # a row a program, and tiles of 16
def test_mimo(B, dtype):
    compare(mimo_step_, mimo_step, mimo(B, 45, 70, dtype))


def test_mimo_of_more_channels_than_a_block():
    compare(mimo_step_, mimo_step, mimo(1, 1100, 6))


def compare_ssd(B, E, P, N, selective=False, dtype=torch.float32, activation="identity"):
    """The whole operator against the system's own step, in float64."""
    state, system, shape = triton_ssd_step.example(B, E, P, N, selective)
    skip = torch.randn(E * P)

    def in_place(x, state):
        state = state.clone()
        return ssd_step_(x, state, *system.coefficients(), skip.float(), activation), state

    def naive(x, state):
        y, state = system.in_double().step(x, state)
        return ACTIVATIONS[activation].function(y + skip.double() * x[:, : E * P]), state

    compare_with_twin(in_place, naive, (torch.randn(shape).to(dtype), state), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("selective", [False, True], ids=["constant", "selective"])
def test_ssd(selective, dtype):
    compare_ssd(3, 2, 20, 34, selective, dtype)


@pytest.mark.parametrize("sizes", [(1, 1, 64, 64), (2, 3, 1, 2), (33, 2, 4, 6)], ids=str)
def test_ssd_of_other_sizes(sizes):
    compare_ssd(*sizes)


def test_a_turn_of_any_size():
    """Over all quarters of a turn, either way, and far: no further off than the angle itself is in float32."""
    angles = torch.cat([torch.linspace(-7, 7, 2000), torch.linspace(-20000, 20000, 48)])
    system = triton_ssd_step.example(1, 1, 1, 4096, True)[1]
    one = {"dt": torch.ones(1).double(), "inverse": torch.tensor([1.0]).expm1().log().double()}
    system = system._replace(decay=torch.zeros(1).double(), omega=angles[None].double(), **one)
    state = torch.cat([torch.ones(2048), torch.zeros(2048)])[None, None]
    ssd_step_(torch.zeros(1, 1 + 2 * 4096 + 1), state, *system.coefficients(), torch.zeros(1), "identity")
    exact = torch.cat([angles.double().cos(), angles.double().sin()])
    assert (state[0, 0] - exact)[:2000].abs().max() < 1e-6
    assert ((state[0, 0] - exact).abs() < 2.4e-7 * (1 + angles.abs().repeat(2))).all()


@pytest.mark.parametrize("raw", [-90.0, -30.0, 0.0, 30.0, 90.0])
def test_a_step_that_the_token_chooses_at_its_ends(raw):
    """softplus neither overflows nor loses a small step: what it drives a state to is what float64 says."""
    state, system, shape = triton_ssd_step.example(1, 1, 4, 4, True)
    x, skip = torch.cat([torch.randn(1, shape[1] - 1), torch.tensor([[raw]])], 1), torch.zeros(4)
    state.zero_()
    _, exact = system.in_double().step(x.double(), state.double())
    ssd_step_(x, state, *system.coefficients(), skip, "identity")
    torch.testing.assert_close(state.double(), exact, rtol=2e-5, atol=0)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    compare(siso_step_, siso_step, siso(2, 2, 5, 4), activation)
    compare(mimo_step_, mimo_step, mimo(2, 5, 4), activation)
    compare_ssd(2, 2, 3, 4, activation=activation)


def test_strides():
    u, state, *system = siso(5, 2, 5, 6)
    compare(siso_step_, siso_step, (gapped(u), state, *map(gapped, system)))
    u, state, *system = mimo(2, 5, 6)
    compare(mimo_step_, mimo_step, (gapped(u), state, *map(gapped, system)))


@pytest.mark.parametrize(("B", "H"), [(0, 5), (2, 0)])
def test_nothing_to_do(B, H):
    compare(siso_step_, siso_step, siso(5, B, H, 4))
    compare(mimo_step_, mimo_step, mimo(B, max(H, 1), 4) if B == 0 else mimo(0, 3, 4))
    compare_ssd(0, 2, 3, 4)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    K=st.sampled_from([2, 5, 7]),
    B=st.integers(1, 5),
    H=st.integers(1, 20),
    half=st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_shape(K, B, H, half, dtype):
    compare(siso_step_, siso_step, siso(K, B, H, 2 * half, dtype))
    compare(mimo_step_, mimo_step, mimo(4 * B, H, 2 * half, dtype), "identity")


def test_bad_arguments():
    u, state, coefficients, skip = siso(5, 2, 5, 6)
    for arguments, message in (
        ((u, gapped(state), coefficients, skip, "gelu"), "contiguous"),
        ((u, state.double(), coefficients, skip, "gelu"), "float32"),
        ((u, state[:1], coefficients, skip, "gelu"), "state is"),
        ((u, state, coefficients[:4], skip, "gelu"), "coefficients"),
        ((u, state, coefficients, skip, "tanh"), "activation"),
    ):
        with pytest.raises(ValueError, match=message):
            siso_step_(*arguments)


def test_bad_arguments_of_ssd():
    state, system, shape = triton_ssd_step.example(2, 2, 3, 4, False)
    x, coefficients, skip = torch.randn(shape), system.coefficients(), torch.randn(6)
    for arguments, message in (
        ((x[:, 1:], state, *coefficients, skip, "gelu"), "a token is 14 numbers or 16"),
        ((x, state[:1], *coefficients, skip, "gelu"), "state is"),
        ((x, gapped(state), *coefficients, skip, "gelu"), "contiguous"),
        ((x, state, coefficients[0], coefficients[1][:1], coefficients[2], skip, "gelu"), "as many steps"),
        ((x, state, *coefficients, skip, "tanh"), "activation"),
    ):
        with pytest.raises(ValueError, match=message):
            ssd_step_(*arguments)


def test_custom_operators():
    opcheck(siso_step_, (*siso(5, 2, 3, 4), "gelu"))
    opcheck(mimo_step_, (*mimo(2, 3, 4, torch.bfloat16), "gelu"))
    state, system, shape = triton_ssd_step.example(2, 2, 3, 4, True)
    opcheck(ssd_step_, (torch.randn(shape), state, *system.coefficients(), torch.randn(6), "silu"))


def test_self_check():
    assert_passes(self_check_cases)
    assert_passes(triton_ssd_step.self_check_cases)


# ---- layers and models

LAYERS = {
    "s4": lambda: S4(6, 10),
    "s4, rank 2": lambda: S4(6, 10, init="legt"),
    "s4, shared": lambda: S4(6, 10, n_ssm=2),
    "s4d": lambda: S4D(6, 10),
    "s4d, bilinear": lambda: S4D(6, 10, init="lin", discretization="bilinear", n_ssm=3),
    "s5": lambda: S5(6, 10),
    "ssd": lambda: SSD(6, 10, head_dim=3),
    "ssd, selective": lambda: SSD(6, 10, head_dim=3, selective=True, init="lin+real"),
}


@torch.no_grad()
@pytest.mark.parametrize("name", LAYERS)
def test_layer(name):
    """The recurrent mode, several tokens from a state, with documents and padding: as in PyTorch."""
    layer = LAYERS[name]()
    u = torch.randn(2, 5, layer.input_size)
    start = torch.randn(2, *layer.state_shape)
    seq_idx = torch.tensor([[0, 0, 1, 1, 1], [3, -1, -1, 4, 4]])
    for options in ({}, {"seq_idx": seq_idx}, {"initial_state": start, "seq_idx": seq_idx}, {"initial_state": start}):
        layer.kernels = "torch"
        expected = layer(u, mode="recurrent", **options)
        layer.kernels = "triton"
        for ours, theirs in zip(layer(u, mode="recurrent", **options), expected, strict=True):
            assert_close(ours, theirs, 1e-5)
    assert torch.equal(start, options["initial_state"])


@torch.no_grad()
@pytest.mark.parametrize("name", LAYERS)
def test_the_state_stays_in_place_only_where_that_is_allowed(name):
    layer = LAYERS[name]()
    u = torch.randn(2, layer.input_size)
    layer.kernels = "triton"
    state = torch.randn(2, *layer.state_shape)
    before = state.clone()
    y, after = layer.step(u, state)
    assert torch.equal(state, before)
    memo = Memo()
    again, same = layer(u[:, None], mode="recurrent", initial_state=state, in_place=True, memo=memo)
    assert same is state
    assert torch.equal(same, after)
    assert torch.equal(again[:, 0], y)
    assert memo.step is not None


def test_a_gradient_is_a_matter_for_pytorch():
    layer, u = S4(3, 4), torch.randn(1, 2, 3, requires_grad=True)
    layer.kernels = "triton"
    layer(u, mode="recurrent")[0].sum().backward()
    assert u.grad is not None
    assert layer.Lambda_im.grad is not None


@torch.no_grad()
@pytest.mark.parametrize("name", ["s4", "s5", "ssd, selective"])
def test_compiled_without_a_graph_break(name):
    layer = LAYERS[name]()
    u, state = torch.randn(2, 1, layer.input_size), torch.randn(2, *layer.state_shape)
    layer.kernels = "triton"
    expected, after = layer(u, mode="recurrent", initial_state=state)

    def decode(u, state):
        return layer(u, mode="recurrent", initial_state=state, in_place=True)[0]

    y = torch.compile(decode, backend="aot_eager", fullgraph=True)(u, state)
    assert_close(y, expected, 1e-6)
    assert_close(state, after, 1e-6)


def build(ssm, **values):
    torch.manual_seed(1)
    config = S4Config(
        **{"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "state_size": 6, "ssm": ssm},
        **{"initializer_range": 0.3, "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None},
        **{"arch": "s4-ffn", **values},
    )
    return S4ForCausalLM(config).eval()


def use(model, setting):
    for module in model.modules():
        if hasattr(module, "kernels"):
            module.kernels = setting


def decode(model, ids, **options):
    config = GenerationConfig(
        max_new_tokens=6, pad_token_id=0, return_dict_in_generate=True, output_logits=True, **options
    )
    return model.generate(ids, generation_config=config)


@pytest.mark.parametrize(
    ("ssm", "options"),
    [
        ("s4", {}),
        ("s4d", {}),
        ("s5", {}),
        ("s4", {"num_beams": 2, "do_sample": False}),
        ("ssd", {"num_beams": 2, "do_sample": False}),
    ],
)
def test_generate(ssm, options):
    of_ssd = {"arch": ["gated", "swiglu"], "head_dim": 4} if ssm == "ssd" else {}
    model, ids = build(ssm, mode="recurrent", **of_ssd), torch.randint(1, 61, (2, 4))
    use(model, "torch")
    expected = decode(model, ids, **options)
    use(model, "triton")
    ours = decode(model, ids, **options)
    assert torch.equal(ours.sequences, expected.sequences)
    assert len(expected.sequences[0].unique()) > 3
    for a, b in zip(ours.logits, expected.logits, strict=True):
        assert_close(a, b, 1e-5)


@torch.no_grad()
def test_the_states_of_a_cache_stay_at_their_address():
    model = build("s4", mode="recurrent")
    use(model, "triton")
    cache = model(torch.tensor([[5, 6]])).past_key_values
    addresses = [state.data_ptr() for layer in cache.layers for state in layer.states]
    before = [state.clone() for layer in cache.layers for state in layer.states]
    model(torch.tensor([[7]]), past_key_values=cache)
    after = [state for layer in cache.layers for state in layer.states]
    assert [state.data_ptr() for state in after] == addresses
    assert not any(map(torch.equal, before, after))


@torch.no_grad()
def test_a_past_that_is_recorded_can_be_cropped():
    """The record needs the states that a step in place would overwrite."""
    model = build("s4", mode="recurrent")
    use(model, "triton")
    cache = model(torch.tensor([[5, 6, 7]])).past_key_values
    expected = [state.clone() for layer in cache.layers for state in layer.states]
    for layer in cache.layers:
        layer.activate_past_recording()
    model(torch.tensor([[8, 9]]), past_key_values=cache)
    cache.crop(-2)
    for layer_state, state in zip([x for layer in cache.layers for x in layer.states], expected, strict=True):
        assert_close(layer_state, state, 1e-6)
