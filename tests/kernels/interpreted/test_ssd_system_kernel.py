"""What SSD's scan reads, interpreted: b and c forward and backward, and the turns of a chunk, against their twins."""

import pytest
import torch
from kernel_checks import assert_close, assert_passes, assert_the_same_bits_again, compare_with_twin, gapped
from torch.library import opcheck

from ssm_lm.modeling import triton_ssd_system as module
from ssm_lm.modeling.discrete import norm_vectors
from ssm_lm.modeling.ssd import SSD
from ssm_lm.modeling.triton_ssd_system import make_vectors, make_vectors_backward, self_check_cases, ssd_vectors


def problem(B, L, N, dtype=torch.float32, weights=torch.float32):
    """x, the second half of a wider tensor, whose last token is zero, which eps alone norms; scales and biases."""
    wide = torch.randn(B, L, 4 * N).to(dtype)
    wide[:, -1] = 0
    x = wide[..., 2 * N :].detach().requires_grad_()
    return x, *(torch.randn(N).to(weights).requires_grad_() for _ in range(4))


def compare(inputs, tolerance=2e-5):
    compare_with_twin(ssd_vectors, norm_vectors, inputs, tolerance)


@pytest.mark.parametrize("shape", [(1, 1, 2), (2, 5, 16), (3, 1, 6), (1, 40, 128), (2, 33, 72)])
def test_vectors(shape):
    compare(problem(*shape))


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
def test_vectors_in_bfloat16(weights):
    inputs = problem(2, 9, 12, torch.bfloat16, weights)
    compare(inputs, 2e-2)
    assert {x.dtype for x in ssd_vectors(*inputs)} == {torch.bfloat16}


def test_no_tokens():
    """Nothing is launched, and the gradients of scales and biases are zero."""
    x, *norms = problem(2, 1, 6)
    b, c = ssd_vectors(x[:, :0], *norms)
    assert b.shape == c.shape == (2, 0, 6)
    assert not any(found.any() for found in torch.autograd.grad(b.sum() + c.sum(), norms))


def test_more_blocks_than_programs(monkeypatch):
    monkeypatch.setattr(module, "programs_of_a_norm", lambda rows, C: 2)
    compare(problem(3, 1500, 6))


def test_what_is_read_lies_anywhere():
    x, *norms = problem(2, 6, 5)
    for signal in (gapped(x), x.detach().mT.contiguous().mT):
        compare((signal.detach().requires_grad_(), *norms))
    sums = [
        torch.autograd.grad(sum(x.sum() for x in made(x, *norms)), (x, *norms)) for made in (ssd_vectors, norm_vectors)
    ]
    for ours, theirs in zip(*sums, strict=True):
        assert_close(ours, theirs, 2e-5)  # the gradient of a sum is one number


def test_the_same_bits_again():
    assert_the_same_bits_again(ssd_vectors, problem(2, 30, 12))


@pytest.mark.slow
def test_custom_operators():
    x, *norms = problem(2, 5, 6)
    opcheck(make_vectors, (x, *norms))
    of_b, of_c = (torch.randn(2, 5, 6) for _ in range(2))
    opcheck(make_vectors_backward, (of_b, of_c, x.detach(), norms[0].detach(), norms[2].detach()))


def test_self_check():
    """The turns too: of angles of many turns, by heads that share frequencies or do not, in whole tiles and parts."""
    assert_passes(self_check_cases)


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_the_layer_takes_it(kernels, monkeypatch):
    """Where its scan runs on kernels."""
    launched = []
    monkeypatch.setattr(module, "make_vectors", lambda *x: launched.append(1) or make_vectors(*x))
    layer = SSD(8, 6, chunk_size=8, head_dim=4)
    layer.kernels = kernels
    layer(torch.randn(1, 9, layer.input_size), mode="chunk")
    assert len(launched) == (kernels == "triton")
