"""S4D's operators in C against their twin, when they run, and when they do not."""

import pytest
import torch
from in_c import Frames, called_names, needs

from ssm_lm.modeling import native_diagonal
from ssm_lm.modeling.diagonal_operators import power_operators
from ssm_lm.modeling.ssm import S4D

pytestmark = needs("diagonal")


@pytest.fixture(autouse=True)
def of_any_size(monkeypatch):
    monkeypatch.setattr(native_diagonal, "SMALLEST", 0)


@pytest.fixture
def runs(monkeypatch):
    return called_names(monkeypatch, native_diagonal)


def system(H, half):
    """log Lambda_bar in float64, C B_bar in float32: poles that decay little or much, and turn many times."""
    torch.manual_seed(0)
    log_re, log_im = -2 * torch.rand(H, half).double() ** 3, 20 * torch.randn(H, half).double()
    return log_re, log_im, *torch.randn(2, H, half)


def with_gradients(make, parts, T, weights):
    leaves = [x.detach().requires_grad_() for x in parts]
    operators = make(*leaves, T)
    given = [w.to(x.dtype) for w, x in zip(weights, operators, strict=True)]
    return [*(x.detach() for x in operators), *torch.autograd.grad(list(operators), leaves, given)]


def weights_of(H, half, T):
    """Gradients of the four operators, two of which lie in a wider matrix, as the chunk scan leaves them."""
    wide = torch.randn(H, T + 2 * half, T + 2 * half)
    return torch.randn(H, T), wide[:, :T, T:], wide[:, T:, :T], torch.randn(H, 2 * half)


@pytest.mark.parametrize(("H", "half", "T"), [(3, 32, 64), (5, 7, 23), (1, 1, 1), (2, 35, 2), (4, 16, 130)])
def test_operators(H, half, T):
    """And their gradients, against the twin in float64."""
    parts, weights = system(H, half), weights_of(H, half, T)
    ours = with_gradients(native_diagonal.native_diagonal, parts, T, weights)
    theirs = with_gradients(power_operators, [x.double() for x in parts], T, weights)
    for one, other in zip(ours, theirs, strict=True):
        assert one.shape == other.shape
        tolerance = 5e-7 if one.dtype == torch.float32 else 1e-12
        assert (one - other).abs().max() <= tolerance * other.abs().max()


def test_the_same_bits(any_threads):
    """Twice, by any number of threads, and of a channel among others."""
    parts, weights, results = system(5, 32), weights_of(5, 32, 12), []
    for number, chosen in ((1, slice(0, 5)), (2, slice(0, 5)), (7, slice(0, 5)), (2, slice(4, 5))):
        torch.set_num_threads(number)
        given = [x[chosen] for x in parts], 12, [w[chosen] for w in weights]
        results.append([x[-1] for x in with_gradients(native_diagonal.native_diagonal, *given)])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize(("half", "T"), [(32, 64), (5, 3), (1, 1)])
def test_memory(monkeypatch, half, T):
    """Nothing is written beside what was asked for, and nothing is read that was not written."""
    frames = Frames()
    given = system(3, half), T, weights_of(3, half, T)
    expected = with_gradients(native_diagonal.native_diagonal, *given)
    monkeypatch.setattr(native_diagonal, "floats", frames.memory())
    monkeypatch.setattr(native_diagonal, "doubles", frames.memory(torch.float64))
    found = with_gradients(native_diagonal.native_diagonal, *given)
    assert all(map(torch.equal, expected, found))
    frames.check(4 + 1 + 4 + 1)


@pytest.mark.parametrize(("init", "discretization", "n_ssm"), [("lin", "zoh", None), ("legs", "bilinear", 3)])
def test_layer(runs, init, discretization, n_ssm):
    """Through a whole layer, with parameters that channels share: as near to float64 as PyTorch is."""
    layer, results = S4D(6, 16, init=init, discretization=discretization, n_ssm=n_ssm, chunk_size=16), []
    u, w = torch.randn(2, 40, 6), torch.randn(2, 40, 6)
    for setting, dtype in (("auto", torch.float32), ("torch", torch.float32), ("auto", torch.float64)):
        layer.kernels = setting
        layer.to(dtype)
        y, _ = layer(u.to(dtype), mode="chunk")
        results.append([y, *torch.autograd.grad(y, list(layer.parameters()), w.to(dtype))])
        assert runs.count("diagonal_operators_backward") == 2  # of whole chunks and of a rest
    for ours, plain, exact in zip(*results, strict=True):
        off, allowed = ((x - exact).abs().max() / exact.abs().max() for x in (ours, plain))
        assert off < max(2e-6, 2 * allowed)


def test_when_it_runs(runs, monkeypatch):
    layer = S4D(4, 8)
    layer.operators(5)
    assert len(runs) == 1
    layer.kernels = "torch"
    expected = layer.operators(5)
    layer.kernels = "auto"
    for name, value in (("SMALLEST", 17), ("library", lambda name: None), ("may_run", lambda *_: False)):
        with monkeypatch.context() as patch:
            patch.setattr(native_diagonal, name, value)
            assert all(map(torch.equal, layer.operators(5), expected))
    layer.double().operators(5)
    assert len(runs) == 1
