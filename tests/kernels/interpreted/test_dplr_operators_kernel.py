"""The operators of a chunk of S4, interpreted, forward and backward, against their twin in float64."""

import pytest
import torch
from kernel_checks import assert_as_near_as_pytorch, assert_passes, compare_with_twin, gapped, relative_error
from torch.library import opcheck

from ssm_lm.modeling import triton_dplr_operators as module
from ssm_lm.modeling.dplr_operators import krylov_operators
from ssm_lm.modeling.ssm import S4
from ssm_lm.modeling.triton_dplr_operators import (
    dplr_operators,
    example,
    make_operators,
    make_operators_backward,
    self_check_cases,
)


def compare(inputs, T, tolerance=2e-6):
    """With a skip."""
    inputs = [*inputs, torch.randn(len(inputs[0])).requires_grad_()]
    compare_with_twin(
        lambda *x: dplr_operators(*x[:5], T, x[5]), lambda *x: krylov_operators(*x[:5], T, x[5]), inputs, tolerance
    )


@pytest.mark.parametrize(
    ("H", "N", "rank", "T"),
    [
        (3, 64, 1, 16),
        (1, 64, 2, 17),
        (3, 2, 1, 7),
        (2, 2, 2, 5),
        (1, 10, 2, 33),
        (2, 34, 1, 1),
        (0, 4, 1, 8),
    ],
)
def test_operators(H, N, rank, T):
    compare([x.requires_grad_() for x in example(H, N, rank)], T)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("N", [2, 22, 64])
@pytest.mark.parametrize("T", [16, 32, 64])
def test_operators_of_every_size(N, rank, T):
    compare([x.requires_grad_() for x in example(3, N, rank)], T)


def test_strides_of_any_kind():
    """What is read lies apart, and so do the gradients, which are parts of one matrix in training."""
    inputs = [gapped(x.requires_grad_()) for x in example(2, 6, 2)]
    compare(inputs, 5)
    results = []
    for make in (dplr_operators, krylov_operators):
        outputs = make(*inputs, 5)
        torch.manual_seed(1)
        gradients = [gapped(torch.randn(x.shape)) for x in outputs]
        wide = torch.randn(2, 11, 11)
        gradients[1:] = [wide[:, :5, 5:], wide[:, 5:, :5], wide[:, 5:, 5:]]
        for one in (gradients, [*gradients[:3], gapped(gradients[3])]):
            results.append(torch.autograd.grad(outputs, inputs, one, retain_graph=True))
    for ours, theirs in zip(results[:2], results[2:], strict=True):
        assert max(map(relative_error, ours, theirs)) < 2e-6


@pytest.mark.parametrize(("init", "n_ssm", "T"), [("legs", None, 16), ("legt", 1, 7), ("fourier", 3, 5)])
def test_layer(init, n_ssm, T):
    """Of the parameters themselves, shared by channels or not, from their initialisation: as near to float64 as what
    PyTorch makes in float32, or nearer.
    """
    layer = S4(3, 16, init=init, n_ssm=n_ssm)
    wanted = {name for name, _ in layer.named_parameters()}
    assert_as_near_as_pytorch(layer, lambda layer: layer.operators_with_skip(T), wanted, 2e-6)


def test_some_outputs_alone():
    inputs = [x.requires_grad_() for x in example(1, 6, 1)]
    for i in range(4):
        outer = [make(*inputs, 5)[i] for make in (dplr_operators, krylov_operators)]
        weights, wanted = torch.randn_like(outer[0]), inputs if i == 0 else inputs[:3]
        ours, theirs = (torch.autograd.grad(x, wanted, weights, allow_unused=True) for x in outer)
        for one, other in zip(ours, theirs, strict=True):
            assert relative_error(one, torch.zeros_like(one) if other is None else other) < 2e-6


def test_the_same_bits_again_and_in_other_company():
    inputs, results = [x.requires_grad_() for x in example(3, 6, 1)], []
    for part in (slice(0, 3), slice(0, 3), slice(2, 3)):
        leaves = [x.detach()[part].requires_grad_() for x in inputs]
        outputs = dplr_operators(*leaves, 7)
        found = [*outputs, *torch.autograd.grad(outputs, leaves, [x.cos().detach() for x in outputs])]
        results.append([x[-1] for x in found])
    assert all(map(torch.equal, *results[:2]))
    assert all(map(torch.equal, *results[1:]))


def test_more_states_keep_pytorch_and_float64_has_a_reason():
    layer = S4(2, 66)
    layer.kernels = "triton"
    expected = krylov_operators(*layer.discretize(), 4)
    assert all(map(torch.equal, layer.operators(4), expected))
    wide = S4(2, 4).double()
    wide.kernels = "triton"
    with pytest.raises(RuntimeError, match=r"dplr_discretization cannot run on cpu: torch\.float64"):
        wide.operators(4)


@pytest.mark.slow
def test_custom_operators():
    inputs = [x.requires_grad_() for x in example(2, 6, 2)]
    opcheck(make_operators, (*inputs, 5, None))
    opcheck(make_operators, (*inputs, 5, torch.randn(2).requires_grad_()))
    leaves = [x.detach() for x in inputs]
    outputs = make_operators(*leaves, 5, None)
    opcheck(make_operators_backward, (*map(torch.randn_like, outputs), *leaves, *outputs[1:3]))


@pytest.mark.slow
def test_self_check():
    assert_passes(self_check_cases)
    assert len(self_check_cases(torch.device("cpu"), *module.PROBLEMS[0])) == 1
