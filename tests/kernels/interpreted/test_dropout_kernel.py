"""Dropout with what stands beside it, interpreted, against its twin in float64 with the same factors; models."""

import math

import pytest
import torch
from kernel_checks import assert_close, assert_passes, assert_the_same_bits_again, compare_with_twin, gapped
from torch.library import opcheck

from ssm_lm import S4Config, S4ForCausalLM
from ssm_lm.modeling import triton_dropout as module
from ssm_lm.modeling.blocks import S4Sublayer
from ssm_lm.modeling.dropped import drop_activated as plain_activated
from ssm_lm.modeling.dropped import drop_gated as plain_gated
from ssm_lm.modeling.triton_dropout import (
    activated,
    activated_backward,
    drop_activated,
    drop_gated,
    gated,
    gated_backward,
    self_check_cases,
)

SEED, P = torch.tensor(3), 0.25


def drawn(x):
    """The factors of an activation that lies in memory as x does."""
    return activated(torch.ones_like(x, dtype=torch.float32), "identity", P, SEED).double()


def drawn_for_rows(*shape):
    """Those of a gated end: glu of 0 + [1 | 30] is 1."""
    C = shape[-1]
    zeros, bias = torch.zeros(*shape[:-1], 2 * C), torch.cat([torch.ones(C), torch.full((C,), 30.0)])
    return gated(torch.zeros(shape), zeros, bias, P, SEED).double()


@pytest.mark.parametrize("activation", ["gelu", "silu", "identity"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 3), (4, 33, 16), (1, 700, 5)])
def test_activated(shape, activation):
    x = (2 * torch.randn(shape)).requires_grad_()
    for signal in (x, x.detach().permute(1, 2, 0).contiguous().permute(2, 0, 1).requires_grad_()):
        m = drawn(signal)
        compare_with_twin(
            lambda x: activated(x, activation, P, SEED),
            lambda x, m=m: plain_activated(x, activation, m),
            [signal],
            2e-6,
        )


def test_activated_lies_as_its_input_does():
    """Rows as the scan returns them, also such as have zeros before their tokens, or gaps."""
    rows = torch.randn(3, 2, 8)
    for x in (rows.permute(1, 2, 0), rows[..., 1:].permute(1, 2, 0), gapped(rows).permute(1, 2, 0)):
        y = activated(x, "gelu", P, SEED)
        assert y.permute(2, 0, 1).is_contiguous()
        assert_close(
            y, plain_activated(x.double(), "gelu", drawn(x.permute(2, 0, 1).contiguous()).permute(1, 2, 0)), 1e-6
        )


def problem(*shape, residual=torch.float32, dtype=torch.float32):
    C = shape[-1]
    inputs = torch.randn(shape, dtype=residual), torch.randn(*shape[:-1], 2 * C).to(dtype), torch.randn(2 * C)
    return [part.requires_grad_() for part in (*inputs[:2], inputs[2].to(residual))]


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 16), (3, 1, 33), (1, 40, 100), (6, 12)])
def test_gated(shape):
    inputs, m = problem(*shape), drawn_for_rows(*shape)
    compare_with_twin(lambda *x: gated(*x, P, SEED), lambda *x: plain_gated(*x, m), inputs, 2e-6)
    compare_with_twin(lambda *x: gated(*x, 0.0, SEED), plain_gated, [gapped(x) for x in inputs], 2e-6)


def test_of_nothing():
    residual, x, bias = problem(2, 0, 5)
    found = torch.autograd.grad(gated(residual, x, bias, P, SEED).sum(), (residual, x, bias))
    assert [part.shape for part in found] == [residual.shape, x.shape, bias.shape]
    assert not found[2].any()
    assert activated(x, "gelu", P, SEED).shape == x.shape


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)], ids=str)
def test_half_precision(dtype, tolerance):
    """What is gated alone, as under autocast, and all. Nothing between is rounded."""
    for residual in (torch.float32, dtype):
        inputs, m = problem(2, 5, 12, residual=residual, dtype=dtype), drawn_for_rows(2, 5, 12)
        compare_with_twin(lambda *x: gated(*x, P, SEED), lambda *x, m=m: plain_gated(*x, m), inputs, tolerance)
        assert gated(*inputs, P, SEED).dtype == residual
    x = torch.randn(3, 40).to(dtype).requires_grad_()
    compare_with_twin(
        lambda x: activated(x, "gelu", P, SEED), lambda x: plain_activated(x, "gelu", drawn(x)), [x], tolerance
    )


def test_more_blocks_than_programs(monkeypatch):
    monkeypatch.setattr(module, "NORM_PROGRAMS", 2)
    monkeypatch.setattr(module, "tiles", lambda C: {"ROWS": 4, "BLOCK_C": 16, "num_warps": 1, "num_stages": 1})
    m = drawn_for_rows(1, 27, 9)
    compare_with_twin(lambda *x: gated(*x, P, SEED), lambda *x: plain_gated(*x, m), problem(1, 27, 9), 2e-6)


def test_what_is_dropped_is_drawn_evenly_and_by_the_seed():
    """The share that is dropped, of all and of every fourth, is p by a binomial's error; neighbours are independent."""
    for p in (0.1, 0.5):
        for dropped in (
            activated(torch.ones(40000), "identity", p, torch.tensor(5)) == 0,
            gated(torch.zeros(400, 50), torch.zeros(400, 100), torch.ones(100), p, torch.tensor(5)).flatten() == 0,
        ):
            n = len(dropped)
            for part in (dropped, *(dropped[i::4] for i in range(4))):
                assert abs(part.float().mean() - p) < 5 * math.sqrt(p * (1 - p) / len(part))
            for lag in (1, 2, 3, 4, 50):
                both = (dropped[lag:] & dropped[:-lag]).float().mean()
                assert abs(both - p * p) < 5 * math.sqrt(p * p * (1 - p * p) / n)
    other = activated(torch.ones(40000), "identity", 0.5, torch.tensor(6)) == 0
    assert (
        abs((other == (activated(torch.ones(40000), "identity", 0.5, torch.tensor(5)) == 0)).float().mean() - 0.5)
        < 0.02
    )


def test_the_generator_says_which():
    """As PyTorch's dropout: the same again from the same state of the generator, another at the next call."""
    x, (residual, wide, bias) = torch.randn(3, 40), problem(3, 40)
    for draw in (lambda: drop_activated(x, "gelu", P), lambda: drop_gated(residual, wide, bias, P)):
        state = torch.get_rng_state()
        first, second = draw(), draw()
        torch.set_rng_state(state)
        assert torch.equal(draw(), first)
        assert not torch.equal(first, second)


def test_the_same_bits_again():
    assert_the_same_bits_again(lambda *x: gated(*x, P, SEED), problem(2, 30, 12))
    assert_the_same_bits_again(lambda x: activated(x, "gelu", P, SEED), problem(2, 30, 12)[:1])


@pytest.mark.slow
def test_custom_operators():
    residual, x, bias = problem(2, 5, 6)
    for p in (P, 0.0):
        opcheck(gated, (residual, x, bias, p, SEED))
        opcheck(gated_backward, (residual.detach(), x.detach(), bias.detach(), p, SEED))
    for signal in (x, x.detach().mT.contiguous().mT.requires_grad_(), gapped(x)):
        opcheck(activated, (signal, "gelu", P, SEED))
        opcheck(activated_backward, (torch.randn(x.shape), signal.detach(), "silu", P, SEED))


@pytest.mark.slow
def test_self_check():
    assert_passes(self_check_cases)


def build(kernels="triton", **keys):
    """A model whose dropout runs so; all else is PyTorch's."""
    config = S4Config(
        vocab_size=19, hidden_size=8, num_hidden_layers=1, state_size=6, arch="s4", intermediate_size=12, chunk_size=8,
        **keys,
    )  # fmt: skip
    torch.manual_seed(0)
    model = S4ForCausalLM(config)
    for part in model.modules():
        if isinstance(part, S4Sublayer):
            part.kernels = part.inner.kernels = kernels
    return model


@pytest.fixture
def launched(monkeypatch):
    """What ran in the kernels: dropout after an activation, or a gated end, with its probability."""
    seen = []
    for name, operation in (("activated", activated), ("gated", gated)):
        monkeypatch.setattr(
            module, name, lambda *x, name=name, operation=operation: seen.append((name, x[-2])) or operation(*x)
        )
    return seen


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_model(autocast, launched):
    """A step of a model whose dropout keeps all, but for one number in a billion, is that without it by PyTorch."""
    ids, results = torch.randint(0, 19, (2, 16)), []
    for kernels, dropout in (("torch", 0.0), ("triton", 1e-9)):
        model = build(kernels, dropout=dropout)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(ids, labels=ids).loss
        results.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
    assert launched == [("activated", 1e-9), ("gated", 1e-9)] * 2 + [("activated", 1e-9)]
    for ours, theirs in zip(*reversed(results), strict=True):
        assert_close(ours, theirs, 5e-2 if autocast else 2e-5)


def test_a_forward_that_is_computed_once_more_drops_the_same(launched):
    """Activation checkpointing: the gradients are those of the step that keeps all."""
    ids, results = torch.randint(0, 19, (2, 16)), []
    for checkpointing in (False, True):
        model = build(dropout=0.3)
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(1)
        loss = model(ids, labels=ids).loss
        results.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
    assert all(map(torch.equal, *results))
    assert len(launched) == 5 + 2 * 5


def test_outside_of_training_and_around_an_adapter_nothing_is_launched(launched):
    ids, model = torch.randint(0, 19, (1, 16)), build(dropout=0.3)
    model.eval()(ids)
    build(dropout=0.3, tie_dropout=True)(ids)
    assert not launched
    sublayer = model.train().model.layers[0].sublayers[0]
    sublayer.inner.out_proj = torch.nn.Sequential(sublayer.inner.out_proj)
    sublayer(torch.randn(1, 16, 8))
    assert launched == [("activated", 0.3)]
