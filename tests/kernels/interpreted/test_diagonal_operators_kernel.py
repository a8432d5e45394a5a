"""The operators of a chunk of S4D, interpreted, forward and backward, against their twin in float64."""

import pytest
import torch
from kernel_checks import (
    assert_as_near_as_pytorch,
    assert_passes,
    assert_the_same_bits_again,
    compare_with_twin,
    gapped,
    relative_error,
)
from torch.library import opcheck

from ssm_lm.modeling import triton_diagonal_operators as module
from ssm_lm.modeling.diagonal_operators import power_operators
from ssm_lm.modeling.ssm import S4D
from ssm_lm.modeling.triton_diagonal_operators import (
    diagonal_operators,
    example,
    make_operators,
    make_operators_backward,
    self_check_cases,
)


def compare(inputs, T, tolerance=1e-6):
    """With a skip."""
    inputs = [*inputs, torch.randn(len(inputs[0])).requires_grad_()]
    ours, theirs = (lambda *x, make=make: make(*x[:4], T, x[4]) for make in (diagonal_operators, power_operators))
    compare_with_twin(ours, theirs, inputs, tolerance)


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
    wanted = {name for name, _ in layer.named_parameters()}
    assert_as_near_as_pytorch(layer, lambda layer: layer.operators_with_skip(20), wanted, 5e-7)


def test_the_same_bits_again():
    inputs = [x.requires_grad_() for x in example(3, 6)]
    assert_the_same_bits_again(lambda *x: diagonal_operators(*x, 7), inputs)


def test_more_states_keep_pytorch():
    layer = S4D(2, 130)
    layer.kernels = "triton"
    assert all(map(torch.equal, layer.operators(4), power_operators(*layer.discretize()[:4], 4)))


@pytest.mark.slow
def test_custom_operators():
    inputs = example(2, 6)
    opcheck(make_operators, (*(x.clone().requires_grad_() for x in inputs), 5, torch.ones(2, requires_grad=True)))
    opcheck(make_operators_backward, (*map(torch.randn_like, make_operators(*inputs, 5, None)), *inputs))


@pytest.mark.slow
def test_self_check():
    assert_passes(self_check_cases)
    assert len(self_check_cases(torch.device("cpu"), *module.PROBLEMS[0])) == 1
