"""The loss of logits and their gradient in their place, interpreted, against the twin in float64; heads that use it."""

import pytest
import torch
from kernel_checks import assert_close, assert_passes, compare_in_a_model
from torch.library import opcheck

from ssm_lm import S4Config, S4ForCausalLM
from ssm_lm.modeling import triton_cross_entropy as module
from ssm_lm.modeling.cross_entropy import IGNORED
from ssm_lm.modeling.cross_entropy import logits_to_loss as twin
from ssm_lm.modeling.losses import linear_cross_entropy
from ssm_lm.modeling.triton_cross_entropy import cross_entropy_, logits_to_loss, self_check_cases


def problem(n, V, dtype=torch.float32, bias=True):
    """z, targets, bias; every fourth target does not count, the last entry is asked for."""
    z, targets = (5 * torch.randn(n, V)).to(dtype), torch.randint(V, (n,))
    targets[::4] = IGNORED
    targets[-1:] = V - 1
    return z, targets, torch.randn(V) if bias else None


def compare(z, targets, bias, tolerance=1e-5):
    expected = twin(z.double(), targets, None if bias is None else bias.double())
    for gradient in (True, False):
        ours = z.clone()
        total, of_logits = logits_to_loss(ours, targets, bias, gradient)
        assert_close(total, expected[0], tolerance)
        if gradient:
            assert of_logits.data_ptr() == ours.data_ptr()
            assert_close(of_logits, expected[1], tolerance)
        else:
            assert of_logits is None
            assert torch.equal(ours, z)


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize(("n", "V"), [(1, 1), (3, 7), (5, 128), (2, 300), (4, 2049), (2, 5000)])
def test_tokens(n, V, bias):
    compare(*problem(n, V, bias=bias))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)], ids=str)
def test_half_precision(dtype, tolerance):
    compare(*problem(5, 300, dtype), tolerance)


def test_no_tokens_and_none_that_count():
    z, targets, _ = problem(0, 9)
    assert logits_to_loss(z, targets)[0] == 0
    z, targets, _ = problem(3, 9)
    total, gradient = logits_to_loss(z, torch.full_like(targets, IGNORED))
    assert total == 0
    assert not gradient.any()


def test_logits_of_any_size_and_those_that_are_ruled_out():
    """Neither overflows; an entry at -inf has no probability, in a block of its own too."""
    z, targets, _ = problem(4, 300)
    targets = targets.clamp(min=0, max=99)
    z[0] *= 1e4
    z[1, 100:] = -torch.inf
    z[2, :90] -= 3e4
    compare(z, targets, None)


def test_logits_lie_anywhere():
    """Part of a wider tensor, whose other numbers stay; columns first, from a copy."""
    z, targets, bias = problem(5, 33)
    expected, gradient = logits_to_loss(z.clone(), targets, bias)
    wide = torch.full((5, 40), torch.nan)
    wide[:, 3:36] = z
    for part in (wide[:, 3:36], z.t().contiguous().t()):
        total, of_logits = logits_to_loss(part, targets, bias)
        assert torch.equal(total, expected)
        assert torch.equal(of_logits, gradient)
    assert wide.isnan().sum() == 5 * 7


def test_the_same_bits_again():
    z, targets, bias = problem(6, 300)
    results = [logits_to_loss(z.clone(), targets, bias) for _ in range(2)]
    assert all(map(torch.equal, *results))


@pytest.mark.slow
def test_custom_operator():
    z, targets, bias = problem(3, 20)
    for gradient in (True, False):
        opcheck(cross_entropy_, (z, targets, bias, gradient))
        opcheck(cross_entropy_, (z, targets, None, gradient))


@pytest.mark.slow
def test_self_check():
    assert_passes(self_check_cases)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("adaptive", [False, True], ids=["linear", "adaptive"])
def test_model(adaptive, autocast, monkeypatch):
    """Loss and gradients of both heads, by chunks of tokens."""
    launched = []
    monkeypatch.setattr(module, "cross_entropy_", lambda *x: launched.append(x[0].dtype) or cross_entropy_(*x))
    config = S4Config(
        vocab_size=19, hidden_size=8, num_hidden_layers=1, state_size=6, arch="s4-ffn", chunk_size=8, dropout=0.0,
        embedding_dropout=0.0, loss_chunk_size=9, adaptive_cutoffs=[6, 12] if adaptive else None, adaptive_div_val=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = S4ForCausalLM(config)
    ids = torch.randint(0, 19, (2, 13))
    compare_in_a_model(model, [model.lm_head], ids, autocast, 5e-2 if autocast else 2e-5)
    assert set(launched) == {torch.bfloat16 if autocast else torch.float32}
    assert len(launched) >= 3


def test_a_head_without_gradients():
    """Evaluation: the loss alone, and logits that nobody overwrites."""
    hidden, weight, targets = torch.randn(7, 4), torch.randn(11, 4), torch.randint(11, (7,))
    found = [linear_cross_entropy(hidden, weight, targets, chunk_size=3, kernels=each) for each in ("triton", "torch")]
    assert_close(*found, 1e-5)
