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
from ssm_lm.modeling.dropped import drop_added as plain_added
from ssm_lm.modeling.dropped import drop_gated as plain_gated
from ssm_lm.modeling.dropped import drop_swiglu as plain_swiglu
from ssm_lm.modeling.triton_dropout import (
    activated,
    activated_backward,
    added,
    added_backward,
    drop_activated,
    drop_added,
    drop_gated,
    drop_swiglu,
    gated,
    gated_backward,
    self_check_cases,
    swiglu,
    swiglu_backward,
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


def pair(*shape, dtypes=(torch.float32, torch.float32)):
    return [torch.randn(shape).to(dtype).requires_grad_() for dtype in dtypes]


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 16), (1, 700, 5)])
def test_added_and_swiglu(shape):
    """Of tensors with gaps too, where their elements are numbered as without."""
    inputs, m = pair(*shape), drawn(torch.ones(shape))
    for x in (inputs, [gapped(part) for part in inputs]):
        compare_with_twin(lambda *x: added(*x, P, SEED), lambda *x: plain_added(*x, m), x, 2e-6)
        compare_with_twin(lambda *x: swiglu(*x, P, SEED), lambda *x: plain_swiglu(*x, m), x, 2e-6)
        compare_with_twin(lambda *x: swiglu(*x, 0.0, SEED), plain_swiglu, x, 2e-6)


def test_of_nothing():
    residual, x, bias = problem(2, 0, 5)
    found = torch.autograd.grad(gated(residual, x, bias, P, SEED).sum(), (residual, x, bias))
    assert [part.shape for part in found] == [residual.shape, x.shape, bias.shape]
    assert not found[2].any()
    assert activated(x, "gelu", P, SEED).shape == added(x, x, P, SEED).shape == swiglu(x, x, P, SEED).shape == x.shape


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)], ids=str)
def test_half_precision(dtype, tolerance):
    """What is gated alone, as under autocast, and all. Nothing between is rounded."""
    for residual in (torch.float32, dtype):
        inputs, m = problem(2, 5, 12, residual=residual, dtype=dtype), drawn_for_rows(2, 5, 12)
        compare_with_twin(lambda *x: gated(*x, P, SEED), lambda *x, m=m: plain_gated(*x, m), inputs, tolerance)
        assert gated(*inputs, P, SEED).dtype == residual
        sum_of = pair(3, 40, dtypes=(residual, dtype))
        m = drawn(torch.ones(3, 40))
        compare_with_twin(lambda *x: added(*x, P, SEED), lambda *x, m=m: plain_added(*x, m), sum_of, tolerance)
        assert added(*sum_of, P, SEED).dtype == residual
    factors = pair(3, 40, dtypes=(dtype, dtype))
    compare_with_twin(lambda *x: swiglu(*x, P, SEED), lambda *x: plain_swiglu(*x, m), factors, tolerance)
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
    for draw in (
        lambda: drop_activated(x, "gelu", P),
        lambda: drop_gated(residual, wide, bias, P),
        lambda: drop_added(x, x, P),
        lambda: drop_swiglu(x, x, P),
    ):
        state = torch.get_rng_state()
        first, second = draw(), draw()
        torch.set_rng_state(state)
        assert torch.equal(draw(), first)
        assert not torch.equal(first, second)
    state = torch.get_rng_state()
    drop_swiglu(x, x, 0.0)
    assert torch.equal(torch.get_rng_state(), state)  # nothing is dropped, and nothing drawn


def test_the_same_bits_again():
    assert_the_same_bits_again(lambda *x: gated(*x, P, SEED), problem(2, 30, 12))
    assert_the_same_bits_again(lambda x: activated(x, "gelu", P, SEED), problem(2, 30, 12)[:1])
    assert_the_same_bits_again(lambda *x: swiglu(*x, P, SEED), pair(2, 30, 12))


@pytest.mark.slow
def test_custom_operators():
    residual, x, bias = problem(2, 5, 6)
    for p in (P, 0.0):
        opcheck(gated, (residual, x, bias, p, SEED))
        opcheck(gated_backward, (residual.detach(), x.detach(), bias.detach(), p, SEED))
        opcheck(swiglu, (residual, residual.detach().requires_grad_(), p, SEED))
        opcheck(swiglu_backward, (*(residual.detach().clone() for _ in range(3)), p, SEED))
    opcheck(added, (residual, residual.detach().bfloat16().requires_grad_(), P, SEED))
    opcheck(added_backward, (residual.detach(), torch.bfloat16, P, SEED))
    for signal in (x, x.detach().mT.contiguous().mT.requires_grad_(), gapped(x)):
        opcheck(activated, (signal, "gelu", P, SEED))
        opcheck(activated_backward, (torch.randn(x.shape), signal.detach(), "silu", P, SEED))


@pytest.mark.slow
def test_self_check():
    assert_passes(self_check_cases)


def build(kernels="triton", **keys):
    """A model whose dropout runs so; all else is PyTorch's."""
    sizes = dict(vocab_size=19, hidden_size=8, num_hidden_layers=1, state_size=6, intermediate_size=12, chunk_size=8)
    config = S4Config(**sizes | {"arch": "s4"} | keys)
    torch.manual_seed(0)
    model = S4ForCausalLM(config)
    for part in model.modules():
        if isinstance(part, S4Sublayer):
            part.kernels = part.inner.kernels = kernels
    return model


@pytest.fixture
def launched(monkeypatch):
    """What ran in the kernels, with its probability."""
    seen = []
    for name, operation in (("activated", activated), ("gated", gated), ("added", added), ("swiglu", swiglu)):
        monkeypatch.setattr(
            module, name, lambda *x, name=name, operation=operation: seen.append((name, x[-2])) or operation(*x)
        )
    return seen


S4_LAUNCHES = [("activated", 1e-9), ("gated", 1e-9)] * 2 + [("activated", 1e-9), ("added", 1e-9)]
GATED = {"arch": ["gated", "swiglu"], "ssm": "ssd"}
GATED_LAUNCHES = [("added", 1e-9), ("swiglu", 1e-9), ("added", 1e-9)]


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize(("keys", "expected"), [({}, S4_LAUNCHES), (GATED, GATED_LAUNCHES)], ids=["s4", "gated"])
def test_model(keys, expected, autocast, launched):
    """A step of a model whose dropout keeps all, but for one number in a billion, is that without it by PyTorch."""
    ids, results = torch.randint(0, 19, (2, 16)), []
    for kernels, dropout in (("torch", 0.0), ("triton", 1e-9)):
        model = build(kernels, dropout=dropout, **keys)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(ids, labels=ids).loss
        results.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
    assert launched == expected
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
    assert len(launched) == 6 + 2 * 6


def test_gates_without_dropout(launched):
    """The product of gates is one launch still; a sum with the residual is PyTorch's."""
    build(**GATED, dropout=0.0)(torch.randint(0, 19, (1, 16)))
    assert launched == [("swiglu", 0.0)]


def test_outside_of_training_and_around_an_adapter_nothing_is_launched(launched):
    ids, model = torch.randint(0, 19, (1, 16)), build(dropout=0.3)
    model.eval()(ids)
    build(dropout=0.3, tie_dropout=True)(ids)
    assert not launched
    sublayer = model.train().model.layers[0].sublayers[0]
    sublayer.inner.out_proj = torch.nn.Sequential(sublayer.inner.out_proj)
    sublayer(torch.randn(1, 16, 8))
    assert launched == [("activated", 0.3), ("added", 0.3)]
