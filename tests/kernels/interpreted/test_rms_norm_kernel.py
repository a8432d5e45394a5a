"""The RMS norm, interpreted, forward and backward, against its twin in float64; models that train on it."""

from functools import partial

import pytest
import torch
from kernel_checks import (
    assert_close,
    assert_passes,
    assert_the_same_bits_again,
    compare_in_a_model,
    compare_with_twin,
    gapped,
)
from torch.library import opcheck

from ssm_lm import S4Config, S4ForCausalLM
from ssm_lm.modeling import triton_rms_norm as module
from ssm_lm.modeling.norms_and_dropout import RMSNorm
from ssm_lm.modeling.rms_norm import rms_norm as twin
from ssm_lm.modeling.triton_rms_norm import norm_rows, norm_rows_backward, rms_norm, self_check_cases

EPS = 1e-3  # large enough to be seen


def problem(*shape, gated=True, dtype=torch.float32, weights=torch.float32):
    """x, weight, gate; the last two rows are zeros, which eps alone norms."""
    x, gate = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype) if gated else None
    x.view(-1, shape[-1])[-2:] = 0
    inputs = x, torch.randn(shape[-1]).to(weights), gate
    return tuple(part if part is None else part.requires_grad_() for part in inputs)


def compare(inputs, tolerance=1e-5, dtype=None):
    compare_with_twin(
        lambda x, weight, gate: rms_norm(x, weight, EPS, gate, dtype),
        lambda x, weight, gate: twin(x, weight, EPS, gate),
        inputs,
        tolerance,
    )


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("shape", [(1, 1, 7), (2, 5, 16), (3, 1, 33), (1, 40, 100), (6, 12), (2, 3, 2, 8), (2, 4, 1)])
def test_rows(shape, gated):
    compare(problem(*shape, gated=gated))


@pytest.mark.parametrize("shape", [(1, 1, 7), (3, 1, 33), (1, 40, 100), (6, 12), (2, 0, 5)])
def test_what_goes_past(shape):
    """Before a sublayer: the norm, and x; the gradients of both meet in one launch."""
    for inputs, dtype, tolerance in (
        (problem(*shape, gated=False)[:2], torch.float32, 1e-5),
        (problem(*shape, gated=False)[:2], torch.bfloat16, 1e-2),
        (problem(*shape, gated=False, dtype=torch.bfloat16)[:2], torch.bfloat16, 1e-2),
    ):
        norms = (partial(rms_norm, eps=EPS, dtype=dtype, with_input=True), partial(twin, eps=EPS, with_input=True))
        compare_with_twin(*norms, inputs, tolerance)
    x, weight, _ = problem(2, 5, 6, gated=False)
    found = []
    for norm in (rms_norm, twin):
        y, past = norm(x, weight, EPS, with_input=True)
        found.append(torch.autograd.grad(y.sum() + (gapped(x).detach() * past).sum(), x)[0])  # read where it is
    assert_close(*found, 1e-5)
    with pytest.raises(RuntimeError, match="a first derivative alone"):
        torch.autograd.grad(rms_norm(x, weight, EPS, with_input=True)[0].sum(), x, create_graph=True)


def test_none():
    """Of no rows nothing is launched, and the weight's gradient is zero."""
    x, weight, gate = problem(2, 0, 5)
    y = rms_norm(x, weight, EPS, gate)
    assert y.shape == x.shape
    found = torch.autograd.grad(y.sum(), (x, weight, gate))
    assert [part.shape for part in found] == [x.shape, weight.shape, gate.shape]
    assert not found[1].any()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)], ids=str)
def test_half_precision(dtype, tolerance):
    """Inputs alone, weights too, and what comes out alone. Nothing between is rounded."""
    compare(problem(2, 5, 12, dtype=dtype), tolerance)
    compare(problem(1, 9, 12, gated=False, dtype=dtype, weights=dtype), tolerance)
    inputs = problem(2, 3, 12, gated=False)
    compare(inputs, tolerance, dtype)
    assert rms_norm(*inputs[:2], EPS, None, dtype).dtype == dtype


def test_more_blocks_than_programs(monkeypatch):
    monkeypatch.setattr(module, "programs_of_a_norm", lambda rows, C: 2)
    monkeypatch.setattr(module, "rows_of_a_norm", lambda C: 4)
    compare(problem(1, 27, 9))


def test_what_is_read_lies_anywhere():
    """Inputs, gate and gradients that are part of a wider tensor are read where they are, others from a copy."""
    x, weight, gate = problem(2, 6, 5)
    for signal in (gapped(x), x.detach().mT.contiguous().mT):
        compare((signal.detach().requires_grad_(), weight, gapped(gate).detach().requires_grad_()))
    found = [torch.autograd.grad(norm(x, weight, EPS, gate).sum(), (x, weight, gate)) for norm in (rms_norm, twin)]
    for ours, theirs in zip(*found, strict=True):
        assert_close(ours, theirs, 1e-5)  # the gradient of a sum is one number


def test_the_same_bits_again():
    assert_the_same_bits_again(lambda x, weight, gate: rms_norm(x, weight, EPS, gate), problem(2, 30, 12))


@pytest.mark.slow
def test_custom_operators():
    x, weight, gate = problem(2, 5, 6)
    for z, dtype in ((gate, torch.float32), (None, torch.bfloat16)):
        opcheck(norm_rows, (x, weight, EPS, z, dtype))
        gradient = torch.randn(x.shape, dtype=dtype)
        inputs = gradient, x.detach(), weight.detach(), EPS, z if z is None else z.detach()
        opcheck(norm_rows_backward, inputs)
        opcheck(norm_rows_backward, (*inputs, torch.randn(x.shape)))


@pytest.mark.slow
def test_self_check():
    assert_passes(self_check_cases)


def test_what_follows_decides_the_dtype():
    """Under autocast: before a matrix product its dtype, elsewhere that of the input, and by PyTorch always this."""
    x = torch.randn(2, 3, 8)
    for kernels, before_product, expected in (
        ("triton", True, torch.bfloat16),
        ("triton", False, torch.float32),
        ("torch", True, torch.float32),
    ):
        norm = RMSNorm(8, eps=EPS)
        norm.kernels, norm.before_product = kernels, before_product
        with torch.autocast("cpu", torch.bfloat16):
            assert norm(x).dtype == expected
        assert norm(x).dtype == torch.float32


def test_decoding_takes_what_is_launched_sooner(monkeypatch):
    """Neither trained nor asked for a gradient, PyTorch's runs; in training without one, under checkpointing, ours."""
    launched = []
    monkeypatch.setattr(module, "norm_rows", lambda *x: launched.append(1) or norm_rows(*x))
    norm = RMSNorm(8, eps=EPS)
    norm.kernels = "triton"
    with torch.no_grad():
        norm(torch.randn(2, 3, 8))
        assert len(launched) == 1
        norm.eval()(torch.randn(2, 3, 8))
    assert len(launched) == 1
    norm(torch.randn(2, 3, 8))
    assert len(launched) == 2


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_model(autocast, monkeypatch):
    """Loss and gradients of the default block, three norms of a layer and one behind it by the kernel."""
    launched = []
    monkeypatch.setattr(module, "norm_rows", lambda *x: launched.append((x[3] is not None, x[4])) or norm_rows(*x))
    config = S4Config(
        vocab_size=19, hidden_size=8, num_hidden_layers=1, state_size=6, ssm="ssd", arch=["gated", "swiglu"],
        head_dim=4, intermediate_size=12, chunk_size=8, dropout=0.0, embedding_dropout=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = S4ForCausalLM(config)
    ids = torch.randint(0, 19, (2, 13))
    norms = [part for part in model.modules() if isinstance(part, RMSNorm)]
    compare_in_a_model(model, norms, ids, autocast, 5e-2 if autocast else 2e-5)
    low = torch.bfloat16 if autocast else torch.float32
    assert launched == [(False, low), (True, low), (False, low), (False, torch.float32)]
