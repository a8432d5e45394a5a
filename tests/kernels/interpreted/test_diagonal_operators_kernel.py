"""The operators of a chunk of S4D, interpreted, forward and backward, against their twin in float64."""

import pytest
import torch
from kernel_checks import compare_with_twin, gapped, relative_error
from torch.library import opcheck

from ssm_lm.modeling import triton_diagonal_operators as module
from ssm_lm.modeling.diagonal_operators import power_operators
from ssm_lm.modeling.kernels_s4 import self_check
from ssm_lm.modeling.ssm import S4D
from ssm_lm.modeling.triton_diagonal_operators import (
    diagonal_operators,
    example,
    make_operators,
    make_operators_backward,
    self_check_cases,
)


def compare(inputs, T, tolerance=1e-6):
    compare_with_twin(lambda *x: diagonal_operators(*x, T), lambda *x: power_operators(*x, T), inputs, tolerance)


@pytest.mark.parametrize(("H", "N", "T"), [(3, 64, 16), (1, 128, 33), (3, 2, 20), (2, 6, 5), (2, 34, 1), (0, 4, 8)])
def test_operators(H, N, T):
    compare([x.requires_grad_() for x in example(H, N)], T)


def test_strides_of_any_kind():
    """What is read lies apart, and so do the gradients, which are parts of one matrix in training."""
    inputs = [gapped(x.requires_grad_()) for x in example(2, 6)]
    compare(inputs, 5)
    results = []
    for make in (diagonal_operators, power_operators):
        outputs = make(*inputs, 5)
        torch.manual_seed(1)
        wide = torch.randn(2, 11, 11)
        gradients = torch.randn(2, 5), wide[:, :5, 5:], wide[:, 5:, :5], gapped(torch.randn(2, 6))
        results.append(torch.autograd.grad(outputs, inputs, gradients))
    assert max(map(relative_error, *results)) < 1e-6


@pytest.mark.parametrize("discretization", ["zoh", "bilinear"])
def test_layer(discretization):
    """Of the parameters themselves, as near to float64 as what PyTorch makes of float64 phases, twice over."""
    layer = S4D(3, 16, n_ssm=1, discretization=discretization)
    found = []
    for kernels, dtype in (("triton", torch.float32), ("torch", torch.float32), ("torch", torch.float64)):
        layer.to(dtype)
        layer.kernels = kernels
        outputs = layer.operators(20)
        torch.manual_seed(1)
        weights = [torch.randn(x.shape).to(dtype) for x in outputs]
        wanted = [p for name, p in layer.named_parameters() if name != "D"]
        found.append([*outputs, *torch.autograd.grad(outputs, wanted, weights)])
    for mine, theirs, right in zip(*found, strict=True):
        assert relative_error(mine, right) < 5e-7 + 2 * relative_error(theirs, right)


def test_the_same_bits_again():
    inputs, results = [x.requires_grad_() for x in example(3, 6)], []
    for _ in range(2):
        outputs = diagonal_operators(*inputs, 7)
        results.append([*outputs, *torch.autograd.grad(outputs, inputs, [x.cos().detach() for x in outputs])])
    assert all(map(torch.equal, *results))


def test_more_states_keep_pytorch():
    layer = S4D(2, 130)
    layer.kernels = "triton"
    assert all(map(torch.equal, layer.operators(4), power_operators(*layer.discretize()[:4], 4)))


@pytest.mark.slow
def test_custom_operators():
    log_re, log_im, *CB = example(2, 6)
    inputs = [log_re.exp(), log_im.cos() / 2, *CB]
    opcheck(make_operators, (*(x.clone().requires_grad_() for x in inputs), 5))
    opcheck(make_operators_backward, (*map(torch.randn_like, make_operators(*inputs, 5)), *inputs))


@pytest.mark.slow
def test_self_check():
    cause, worst = self_check(self_check_cases, torch.device("cpu"))
    assert cause is None
    assert 0 < worst < 1
    assert len(self_check_cases(torch.device("cpu"), *module.PROBLEMS[0])) == 1
