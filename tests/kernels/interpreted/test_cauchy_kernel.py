"""The Cauchy kernel in the interpreter against its twin in float64."""

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from kernel_checks import assert_close, compare_with_twin, gapped

from ssm_lm.modeling.cauchy import cauchy_products
from ssm_lm.modeling.ssm import S4
from ssm_lm.modeling.triton_cauchy import _backward, _forward, cauchy_products_kernel, example

TOLERANCE = 1e-5


def real(function):
    return lambda *inputs: torch.view_as_real(function(*inputs))


def check(inputs):
    inputs = [x.requires_grad_() for x in inputs[:-1]] + inputs[-1:]
    compare_with_twin(real(cauchy_products_kernel), real(cauchy_products), inputs, TOLERANCE)


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize(
    ("H", "n_ssm", "N", "L"), [(2, 1, 64, 35), (2, 1, 28, 48), (6, 3, 10, 16), (2, 2, 2, 1), (1, 1, 4, 521)]
)
def test_forward_and_backward(H, n_ssm, N, L, rank):
    check(example(H, n_ssm, N, rank, L))


def test_more_poles_than_a_block():
    check(example(1, 1, 74, 1, 18))


def test_empty():
    for H, L in ((0, 5), (2, 0)):
        inputs = [x.requires_grad_() for x in example(2, 1, 6, 1, L)[:-1]]
        inputs[0], inputs[5] = inputs[0][:H], inputs[5][:H]
        out = cauchy_products_kernel(*inputs, example(2, 1, 6, 1, L)[-1])
        assert out.shape == (H, 2, 2, L)
        assert all((g == 0).all() for g in torch.autograd.grad(torch.view_as_real(out).square().sum(), inputs))


@settings(max_examples=6, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    n_ssm=st.integers(1, 3),
    copies=st.integers(1, 2),
    half=st.integers(1, 9),
    rank=st.integers(1, 2),
    L=st.integers(1, 40),
)
def test_shapes(n_ssm, copies, half, rank, L):
    check(example(n_ssm * copies, n_ssm, 2 * half, rank, L))


def test_strides():
    check([gapped(x) for x in example(4, 2, 12, 2, 33)])
    C, B, P, *rest = example(4, 2, 12, 1, 33)
    compare_with_twin(real(cauchy_products_kernel), real(cauchy_products), [C, B.expand(2, -1), P, *rest], TOLERANCE)


@pytest.mark.parametrize("rank", [1, 2])
def test_opcheck(rank):
    """Schema, fake tensors, autograd, and a trace with dynamic shapes."""
    inputs = [x.requires_grad_() for x in example(2, 1, 4, rank, 5)[:-1]] + example(2, 1, 4, rank, 5)[-1:]
    torch.library.opcheck(_forward, inputs)
    inputs = [x.detach() for x in inputs]
    torch.library.opcheck(_backward, (_forward(*inputs), *inputs))


@pytest.mark.parametrize("init", ["legs", "fourier"])
def test_kernel_of_a_layer(init, monkeypatch):
    """The whole kernel of S4 and its gradients, rank 1 and 2, float32 on either side."""
    layer = S4(hidden_size=4, state_size=8, init=init, n_ssm=2)
    results = []
    for setting in ("torch", "triton"):
        monkeypatch.setenv("SSM_LM_KERNELS", setting)
        layer.zero_grad()
        K = layer.kernel(24)
        (K * torch.linspace(-1, 1, 24)).sum().backward()
        results.append([K.detach(), *(p.grad for p in layer.parameters() if p.grad is not None)])
    assert len(results[0]) > 4
    for actual, expected in zip(*reversed(results), strict=True):
        assert_close(actual, expected, 1e-4)


def test_it_repeats_itself():
    inputs = [x.requires_grad_() for x in example(3, 1, 8, 1, 40)[:-1]] + example(3, 1, 8, 1, 40)[-1:]
    runs = [torch.autograd.grad(real(cauchy_products_kernel)(*inputs).sum(), inputs[:-1]) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
