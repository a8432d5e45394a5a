"""S4D's discretisation, interpreted, forward and backward, against its twin in float64."""

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

from ssm_lm.modeling import triton_diagonal_discretization as module
from ssm_lm.modeling.diagonal_discretization import diagonal_system
from ssm_lm.modeling.ops import state_system
from ssm_lm.modeling.ssm import S4D
from ssm_lm.modeling.triton_diagonal_discretization import (
    diagonal_discretization,
    discretize,
    discretize_backward,
    example,
    self_check_cases,
)


@pytest.mark.parametrize(("H", "S", "N"), [(3, 3, 64), (4, 2, 128), (3, 1, 2), (2, 2, 6), (0, 1, 4)])
def test_system(H, S, N):
    inputs = [x.requires_grad_() for x in example(H, S, N)]
    compare_with_twin(diagonal_discretization, diagonal_system, inputs, 2e-7, 1e-6)
    compare_with_twin(diagonal_discretization, diagonal_system, [gapped(x) for x in inputs], 2e-7, 1e-6)


def test_angles_keep_their_digits():
    """Of thousands of turns, of slow and of fast decays: log Lambda_bar in float64, C B_bar to float32's last digit."""
    _, log_re, _, B, C = example(31, 1, 8)
    inputs = torch.linspace(-12, 3, 31), log_re, torch.tensor([[0.0, 1e-6, 3.0, -4e4]]), B, C
    log_re, log_im, *CB = diagonal_discretization(*inputs)
    exact = diagonal_system(*(x.double() for x in inputs))
    for ours, theirs in zip((log_re, log_im), exact, strict=False):
        assert ours.dtype == torch.float64
        torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=0)
    size = (exact[2] ** 2 + exact[3] ** 2).sqrt()
    for ours, theirs in zip(CB, exact[2:], strict=True):
        assert ((ours - theirs).abs() / size).max() < 1.2e-7


def test_near_zero():
    """phi and its slope where exp(z) - 1 has no digits left, and on both sides of where their series begin."""
    log_dt = torch.tensor([-25.0, -9.0, -5.0, -4.0, -3.9, -3.0])
    _, log_re, _, B, C = example(6, 1, 4)
    inputs = [x.requires_grad_() for x in (log_dt, log_re.fill_(-0.1), torch.tensor([[0.0, 0.3]]), B, C)]
    results, weights = [], torch.randn(2, 6, 2)
    for make, cast in ((diagonal_discretization, torch.Tensor.float), (diagonal_system, torch.Tensor.double)):
        cast_inputs = [cast(x) for x in inputs]
        outputs = make(*cast_inputs)[2:]  # C B_bar alone: z itself would hide the slope
        results.append(torch.autograd.grad(outputs, cast_inputs, [cast(x) for x in weights]))
    errors = [((x - y).abs() / y.abs()).max() for x, y in zip(*results, strict=True)]
    assert max(errors) < 2e-6


@pytest.mark.parametrize("init", sorted(S4D.initializations))
def test_layer(init):
    """From its initialisation, in both directions: as near to float64 as PyTorch of float64 phases."""
    layer = S4D(4, 16, init=init, n_ssm=2, bidirectional=True)
    names = {name for name, _ in layer.named_parameters()}
    for reverse in (False, True):
        wanted = names - {"D", "C" if reverse else "C_reverse"}
        assert_as_near_as_pytorch(layer, lambda layer, reverse=reverse: layer._system(reverse)[2:], wanted, 1e-6)


def test_bilinear_keeps_pytorch():
    layer = S4D(2, 8, discretization="bilinear")
    layer.kernels = "triton"
    forced = layer._system(False)
    layer.kernels = "torch"
    assert all(map(torch.equal, forced, layer._system(False)))
    zoh = S4D(2, 8)
    zoh.load_state_dict(layer.state_dict())
    assert 1e-6 < relative_error(forced[2], zoh._system(False)[2]) < 1


def test_states_of_s5():
    """As many systems of one state: what `discretize_diagonal` makes of them in float64."""
    leaves = [x.flatten().requires_grad_() for x in example(31, 31, 2)[:3]]

    def run(setting, log_dt, log_re, im):
        log, factor = state_system(log_dt, log_re, im, "zoh", setting)
        return *log, *factor

    compare_with_twin(lambda *x: run("triton", *x), lambda *x: run("torch", *x), leaves, 2e-7, 1e-6)


def test_float64_keeps_pytorch():
    layer = S4D(2, 8).double()
    layer.kernels = "triton"
    assert layer._system(False)[2].dtype == torch.float64


def test_the_same_bits_again():
    assert_the_same_bits_again(diagonal_discretization, [x.requires_grad_() for x in example(6, 2, 6)])


@pytest.mark.slow
def test_custom_operators():
    inputs = [x.requires_grad_() for x in example(4, 2, 6)]
    opcheck(discretize, inputs)
    leaves = [x.detach() for x in inputs]
    opcheck(discretize_backward, (*map(torch.randn_like, discretize(*leaves)), *leaves))


@pytest.mark.slow
def test_self_check():
    assert_passes(self_check_cases)
    assert len(self_check_cases(torch.device("cpu"), *module.PROBLEMS[0])) == 1
