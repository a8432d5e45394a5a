"""The Vandermonde kernel in the interpreter against its twin in float64."""

import math

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from kernel_checks import assert_close, compare_with_twin, gapped

from ssm_lm.modeling.ssm import S4D
from ssm_lm.modeling.triton_vandermonde import _backward, _forward, example, vandermonde_kernel
from ssm_lm.modeling.vandermonde import vandermonde

TOLERANCE = 1e-5


def check(inputs, length):
    inputs = [x.requires_grad_() for x in inputs]
    compare_with_twin(vandermonde_kernel, vandermonde, [*inputs, length], TOLERANCE)


@pytest.mark.parametrize(("H", "N", "length"), [(2, 64, 301), (3, 10, 1), (1, 2, 9001), (2, 34, 64)])
def test_forward_and_backward(H, N, length):
    check(example(H, N), length)


@settings(max_examples=8, deadline=None, derandomize=True, phases=[Phase.generate])
@given(H=st.integers(1, 3), half=st.integers(1, 20), length=st.integers(1, 5000))
def test_shapes(H, half, length):
    check(example(H, 2 * half), length)


def test_phases_of_a_long_sequence():
    """Slow decay and fast rotation: at l = 100,000 a float32 angle has two digits left."""
    v_re, v_im, _, _ = example(2, 4)
    log_re, log_im = torch.full((2, 2), -1e-6, dtype=torch.float64), torch.tensor([[3.1, -2.7], [math.pi, 40.0]])
    check([v_re, v_im, log_re, log_im.double()], 100_000)


def test_strides():
    check([gapped(x) for x in example(3, 10)], 65)
    v_re, v_im, log_re, log_im = example(3, 10)
    compare_with_twin(vandermonde_kernel, vandermonde, [v_re[:, :1].expand(3, 5), v_im, log_re, log_im, 65], TOLERANCE)


def test_empty():
    for H, length in ((0, 5), (2, 0)):
        inputs = [x[:H].requires_grad_() for x in example(2, 6)]
        out = vandermonde_kernel(*inputs, length)
        assert out.shape == (H, length)
        assert all((g == 0).all() for g in torch.autograd.grad(out.sum(), inputs))


def test_opcheck():
    inputs = [x.requires_grad_() for x in example(2, 6)]
    torch.library.opcheck(_forward, (*inputs, 5))
    torch.library.opcheck(_backward, (torch.ones(2, 5), *(x.detach() for x in inputs)))


@pytest.mark.parametrize("discretization", ["zoh", "bilinear"])
def test_kernel_of_a_layer(discretization, monkeypatch):
    """The whole kernel of S4D and its gradients, float32 on either side."""
    layer = S4D(hidden_size=4, state_size=8, n_ssm=2, discretization=discretization)
    results = []
    for setting in ("torch", "triton"):
        monkeypatch.setenv("SSM_LM_KERNELS", setting)
        layer.zero_grad()
        K = layer.kernel(90)
        (K * torch.linspace(-1, 1, 90)).sum().backward()
        results.append([K.detach(), *(p.grad for p in layer.parameters() if p.grad is not None)])
    assert len(results[0]) > 4
    for actual, expected in zip(*reversed(results), strict=True):
        assert_close(actual, expected, 1e-5)
