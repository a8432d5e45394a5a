"""State space parameters, operators and states stay float32 whatever happens to the model around them."""

from functools import partial

import pytest
import torch
from tiny import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from ssm_lm import S4ForCausalLM
from ssm_lm.modeling import dplr_operators
from ssm_lm.modeling.ssm import S4, S4D, StateSpace

tiny = partial(tiny_model, vocab_size=50, num_hidden_layers=1, initializer_range=0.02)


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
def test_autocast_rounds_the_signal_alone(cls, mode):
    """The signal is what a matrix product would take there; operators and states stay as they are."""
    torch.manual_seed(0)
    layer = cls(4, 16)
    u = torch.randn(1, 70, 4)
    with torch.no_grad():
        rounded, expected_state = layer(u.bfloat16(), mode=mode)
        whole, _ = layer(u, mode=mode)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, state = layer(u, mode=mode)
            advanced = layer.advance(u, layer.zero_state(1))
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(y, rounded)
    assert torch.equal(state, expected_state)
    torch.testing.assert_close(advanced, state, rtol=0, atol=1e-5)
    assert 1e-4 < (y - whole).abs().max() < 2e-2 * whole.abs().max()


def test_the_norm_before_a_gated_projection_has_one_dtype(recwarn):
    """torch has no fused RMS norm for bfloat16 with a float32 weight, which autocast leaves, and warns of it."""
    m = tiny(ssm="ssd", arch=["gated", "swiglu"], expand=1)
    norm = next(module for name, module in m.named_modules() if name.endswith("inner.norm"))
    seen = []
    norm.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0].dtype, output.dtype)))
    ids = torch.randint(1, m.config.vocab_size, (1, 20))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        m.train()(ids, labels=ids).loss.backward()
    assert seen == [(torch.bfloat16, torch.bfloat16)]
    assert norm.weight.grad.dtype == torch.float32
    assert not [w for w in recwarn if "Mismatch dtype" in str(w.message)]


def test_autocast_to_float16_keeps_the_signal():
    """A state leaves the range of float16."""
    layer, u = S4(4, 16), torch.randn(1, 70, 4)
    with torch.no_grad():
        expected, _ = layer(u)
        with torch.autocast("cpu", dtype=torch.float16):
            y, _ = layer(u)
    assert torch.equal(y, expected)


@pytest.mark.parametrize("cls", [S4, S4D])
def test_gradients_of_a_bfloat16_signal(cls):
    """In plain PyTorch: the signal, what is kept and what comes back are bfloat16, the products float32."""
    torch.manual_seed(0)
    layer, weight = cls(4, 16, chunk_size=8), torch.randn(2, 37, 4)
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        u = torch.randn(2, 37, 4, generator=torch.Generator().manual_seed(1)).bfloat16().to(dtype).requires_grad_()
        y, state = layer(u, mode="chunk")
        assert y.dtype == dtype
        loss = (y.float() * weight).sum() + state.square().sum()
        found.append([y, state, *torch.autograd.grad(loss, [u, *layer.parameters()])])
    assert torch.equal(found[0][1], found[1][1])
    assert found[0][2].dtype == torch.bfloat16
    for ours, expected in zip(*found, strict=True):
        assert (ours - expected).abs().max() < 1e-2 * expected.abs().max()


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


def as_tf32(x: torch.Tensor) -> torch.Tensor:
    """float32 numbers as tensor cores take them: 11 bits of a mantissa."""
    return ((x.view(torch.int32) + (1 << 12)) & ~((1 << 13) - 1)).view(torch.float32)


class TF32(TorchDispatchMode):
    """Matrix products of float32 numbers with inputs rounded so, as on a GPU with `tf32: true`."""

    def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
        if function in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
            arguments = [as_tf32(x.contiguous()) if x.dtype == torch.float32 else x for x in arguments]
        return function(*arguments, **(kwargs or {}))


def operators_and_gradients(layer):
    layer.zero_grad()
    found = [*layer.operators(64), layer.transition(100), layer.kernel(2048)]
    sum(x.square().mean() for x in found).backward()
    return [x.detach() for x in found] + [layer.C.grad.clone(), layer.Lambda_im.grad.clone()]


def test_powers_are_whole_where_float32_is_rounded(monkeypatch):
    """TF32 would leave A^64 two digits, for every squaring doubles its error."""
    torch.manual_seed(0)
    layer = S4(hidden_size=4, state_size=64)
    exact = operators_and_gradients(layer)

    def errors():
        with TF32():
            found = operators_and_gradients(layer)
        return [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, exact, strict=True)]

    assert max(errors()) > 1e-2
    monkeypatch.setattr(dplr_operators, "float32_is_rounded", lambda device_type: True)
    assert max(errors()) < 1e-3


def test_rounding_is_looked_for_on_a_gpu_alone(monkeypatch):
    assert not dplr_operators.float32_is_rounded("cuda")
    monkeypatch.setattr(torch.backends, "fp32_precision", "tf32")  # as transformers' enable_tf32 does
    assert dplr_operators.float32_is_rounded("cuda")
    assert not dplr_operators.float32_is_rounded("cpu")
