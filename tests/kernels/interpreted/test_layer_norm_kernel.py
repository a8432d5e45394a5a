"""The layer norm before a residual connection, interpreted, forward and backward, against its twin in float64."""

import pytest
import torch
from kernel_checks import (
    assert_passes,
    assert_the_same_bits_again,
    compare_in_a_model,
    compare_with_twin,
    gapped,
)
from torch.library import opcheck

from ssm_lm import S4Config, S4ForCausalLM
from ssm_lm.modeling import triton_layer_norm as module
from ssm_lm.modeling.layer_norm import layer_norm as twin
from ssm_lm.modeling.norms_and_dropout import LayerNorm
from ssm_lm.modeling.triton_layer_norm import layer_norm, norm_rows, norm_rows_backward, self_check_cases

EPS = 1e-3  # large enough to be seen


def problem(*shape, dtype=torch.float32, weights=torch.float32):
    """x, weight, bias; the last two rows are one number, which eps alone norms."""
    x = (3 + torch.randn(shape)).to(dtype)
    x.view(-1, shape[-1])[-2:] = 2
    return tuple(part.requires_grad_() for part in (x, *(torch.randn(shape[-1]).to(weights) for _ in range(2))))


def compare(inputs, tolerance=1e-5, dtype=None, turned=False):
    compare_with_twin(lambda *x: layer_norm(*x, EPS, dtype, turned), lambda *x: twin(*x, EPS), inputs, tolerance)


@pytest.mark.parametrize("shape", [(1, 1, 7), (2, 5, 16), (3, 1, 33), (1, 40, 100), (6, 12), (2, 4, 2)])
def test_rows(shape):
    """Both outputs, the norm and what goes past, with a gradient each."""
    compare(problem(*shape))


@pytest.mark.parametrize("shape", [(1, 16, 7), (2, 40, 16), (16, 5, 33)])
def test_turned(shape, monkeypatch):
    """As rows of channels, of one block, of several, of more than there are programs; gradients in rows and others."""
    monkeypatch.setattr(module, "programs_of_a_norm", lambda rows, C, turned: min(2, rows // 16))
    inputs = problem(*shape)
    compare(inputs, turned=True)
    compare(inputs, 1e-2, torch.bfloat16, turned=True)
    y, past = layer_norm(*inputs, EPS, None, turned=True)
    assert y.movedim(-1, 0).is_contiguous()
    in_rows = torch.randn(shape[-1], *shape[:-1])
    ours = torch.autograd.grad([y, past], inputs, [in_rows.movedim(0, -1), torch.ones(shape)])
    theirs = torch.autograd.grad(layer_norm(*inputs, EPS), inputs, [in_rows.movedim(0, -1), torch.ones(shape)])
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, expected)
    assert_the_same_bits_again(lambda *x: layer_norm(*x, EPS, None, True), inputs)


def test_none():
    """Of no rows nothing is launched, and the parameters' gradients are zero."""
    inputs = problem(2, 0, 5)
    outputs = layer_norm(*inputs, EPS)
    found = torch.autograd.grad([x.sum() for x in outputs], inputs)
    assert [part.shape for part in found] == [part.shape for part in inputs]
    assert not found[1].any()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)], ids=str)
def test_half_precision(dtype, tolerance):
    """All, and what comes out alone. Nothing between is rounded."""
    compare(problem(1, 9, 12, dtype=dtype, weights=dtype), tolerance)
    inputs = problem(2, 3, 12)
    compare(inputs, tolerance, dtype)
    assert [x.dtype for x in layer_norm(*inputs, EPS, dtype)] == [dtype, torch.float32]


def test_more_blocks_than_programs(monkeypatch):
    monkeypatch.setattr(module, "programs_of_a_norm", lambda rows, C, turned: 2)
    monkeypatch.setattr(module, "rows_of_a_norm", lambda C, turned: 4)
    compare(problem(1, 27, 9))


def test_strides_of_any_kind_and_an_output_alone():
    inputs = [gapped(part) for part in problem(2, 6, 5)]
    compare(inputs)
    compare_with_twin(lambda *x: layer_norm(*x, EPS)[0], lambda *x: twin(*x, EPS)[0], inputs, 1e-5)


def test_the_same_bits_again():
    assert_the_same_bits_again(lambda *x: layer_norm(*x, EPS), problem(2, 30, 12))


@pytest.mark.slow
def test_custom_operators():
    x, weight, bias = (part.detach() for part in problem(2, 8, 6))
    for dtype, turned in ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)):
        opcheck(norm_rows, (x, weight, bias, EPS, dtype, turned))
        grad_y = torch.randn((6, 2, 8) if turned else x.shape, dtype=dtype)
        opcheck(norm_rows_backward, (grad_y, torch.randn(x.shape), x, weight, EPS, turned))


@pytest.mark.slow
def test_self_check():
    assert_passes(self_check_cases)


def test_before_a_sublayer_in_training_alone(monkeypatch):
    """Under autocast in its dtype; without what goes past, in evaluation, and by PyTorch as ever."""
    launched = []
    monkeypatch.setattr(module, "norm_rows", lambda *x: launched.append(x[-2]) or norm_rows(*x))
    norm, x = LayerNorm(8, eps=EPS), torch.randn(2, 3, 8)
    norm.kernels = "triton"
    with torch.autocast("cpu", torch.bfloat16):
        y, past = norm(x, with_input=True)
        assert (y.dtype, past.dtype) == (torch.bfloat16, torch.float32)
        assert norm(x).dtype == torch.float32
    norm(x, with_input=True)
    assert launched == [torch.bfloat16, torch.float32]
    with torch.no_grad():
        y, past = norm.eval()(x, with_input=True)
        assert past is x
        assert torch.equal(y, norm(x))
    assert len(launched) == 2


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_model(autocast, monkeypatch):
    """Loss and gradients of a layer's three sublayers; the norm behind them is PyTorch's."""
    launched = []
    monkeypatch.setattr(module, "norm_rows", lambda *x: launched.append(x[-2]) or norm_rows(*x))
    config = S4Config(
        vocab_size=19, hidden_size=8, num_hidden_layers=1, state_size=6, arch="s4", intermediate_size=12, chunk_size=8
    )
    torch.manual_seed(0)
    model = S4ForCausalLM(config)
    norms = [part for part in model.modules() if isinstance(part, LayerNorm)]
    compare_in_a_model(model, norms, torch.randint(0, 19, (2, 13)), autocast, 5e-2 if autocast else 2e-5)
    assert launched == [torch.bfloat16 if autocast else torch.float32] * 3
