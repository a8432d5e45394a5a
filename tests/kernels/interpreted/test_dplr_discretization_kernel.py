"""S4's discretisation, interpreted, forward and backward, against its twin in float64."""

import pytest
import torch
from kernel_checks import (
    assert_as_near_as_pytorch,
    assert_passes,
    assert_the_same_bits_again,
    compare_with_twin,
    gapped,
)
from torch.library import opcheck

from ssm_lm.modeling import triton_dplr_discretization as module
from ssm_lm.modeling.dplr_discretization import bilinear_dplr
from ssm_lm.modeling.ssm import S4
from ssm_lm.modeling.triton_dplr_discretization import (
    discretize,
    discretize_backward,
    dplr_discretization,
    example,
    self_check_cases,
)


@pytest.mark.parametrize(
    ("H", "S", "N", "rank"), [(3, 3, 64, 1), (4, 2, 64, 2), (3, 1, 2, 1), (1, 1, 6, 2), (2, 2, 130, 1), (0, 1, 4, 1)]
)
def test_system(H, S, N, rank):
    inputs = [x.requires_grad_() for x in example(H, S, N, rank)]
    compare_with_twin(dplr_discretization, bilinear_dplr, inputs, 2e-6)
    compare_with_twin(dplr_discretization, bilinear_dplr, [gapped(x) for x in inputs], 2e-6)


def test_time_steps_of_every_size():
    """exp keeps its digits: a step's relative error is that of PyTorch."""
    log_dt, *others = example(41, 1, 2, 1)
    log_dt = torch.linspace(-20, 5, 41)
    others[0].fill_(-9.0)
    ours, plain, exact = (
        make(*(x.to(dtype) for x in (log_dt, *others)))
        for make, dtype in (
            (dplr_discretization, torch.float32),
            (bilinear_dplr, torch.float32),
            (bilinear_dplr, torch.float64),
        )
    )
    for mine, theirs, right in zip(ours, plain, exact, strict=True):
        errors = [((x - right).abs() / right.abs().amax(1, keepdim=True)).amax() for x in (mine, theirs)]
        assert errors[0] < 2 * errors[1] + 5e-7


@pytest.mark.parametrize("init", ["legs", "legt", "fourier"])
def test_layer(init):
    """From its initialisation, in both directions: as near to float64 as PyTorch in float32."""
    layer = S4(4, 16, init=init, n_ssm=2, bidirectional=True)
    names = {name for name, _ in layer.named_parameters()}
    for reverse in (False, True):
        wanted = names - {"D", "C" if reverse else "C_reverse"}
        assert_as_near_as_pytorch(layer, lambda layer, reverse=reverse: layer.discretize(reverse), wanted, 1e-6)


def test_the_same_bits_again():
    assert_the_same_bits_again(dplr_discretization, [x.requires_grad_() for x in example(6, 2, 6, 2)])


@pytest.mark.slow
def test_custom_operators():
    inputs = [x.requires_grad_() for x in example(4, 2, 6, 2)]
    opcheck(discretize, inputs)
    leaves = [x.detach() for x in inputs]
    opcheck(discretize_backward, (*map(torch.randn_like, discretize(*leaves)), *leaves[:5]))


@pytest.mark.slow
def test_self_check():
    assert_passes(self_check_cases)
    assert len(self_check_cases(torch.device("cpu"), *module.PROBLEMS[0])) == 1
