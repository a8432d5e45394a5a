"""S4's operators in C against their twin, when they run, and when they do not."""

import os
import signal

import pytest
import torch
from in_c import Frames, called_names, difference, needs
from tiny import prompt, tiny_model

from ssm_lm.modeling import native_operators
from ssm_lm.modeling.discrete import DiscreteDPLR
from ssm_lm.modeling.dplr_operators import krylov_operators
from ssm_lm.modeling.ssm import S4

pytestmark = needs("operators")


@pytest.fixture(autouse=True)
def of_any_size(monkeypatch):
    monkeypatch.setattr(native_operators, "SMALLEST", 0)


@pytest.fixture
def runs(monkeypatch):
    return called_names(monkeypatch, native_operators)


def system(H, N, rank, seed=0):
    """A stable system: the bilinear transform of one, with a low rank that moves its states."""
    torch.manual_seed(seed)
    angle, size = torch.rand(H, N // 2) * 3, 0.8 + 0.19 * torch.rand(H, N // 2)
    E = torch.cat([size * angle.cos(), size * angle.sin()], 1)
    return DiscreteDPLR(E, *(torch.randn(H, N, rank) * 0.3 / N**0.5 for _ in range(2)), *torch.randn(2, H, N))


def with_gradients(make, discrete, length, weights=None):
    """The operators with a skip, and the gradients of their cosines, or of `weights`."""
    leaves = [x.detach().requires_grad_() for x in (*discrete, discrete[0][:, 0] + 1)]
    operators = make(DiscreteDPLR(*leaves[:5]), length, leaves[5])
    weights = [x.detach().cos() for x in operators] if weights is None else weights
    return [x.detach() for x in operators], torch.autograd.grad(operators, leaves, [w.to(leaves[0]) for w in weights])


def twin(discrete, length, skip=None):
    return krylov_operators(*discrete, length, skip)


@pytest.mark.parametrize(
    ("H", "N", "rank", "T"),
    [(3, 64, 1, 64), (5, 64, 2, 23), (7, 6, 1, 9), (1, 2, 1, 1), (2, 34, 2, 1), (3, 70, 1, 66), (2, 130, 3, 5)],
)
def test_operators(H, N, rank, T):
    """And their gradients, against the twin in float64."""
    discrete = system(H, N, rank)
    expected, weights = twin(DiscreteDPLR(*(x.double() for x in discrete)), T), None
    weights = [torch.randn(x.shape) for x in expected]
    ours = with_gradients(native_operators.native_operators, discrete, T, weights)
    theirs = with_gradients(twin, [x.double() for x in discrete], T, weights)
    for one, other in zip([*ours[0], *ours[1]], [*theirs[0], *theirs[1]], strict=True):
        assert one.shape == other.shape
        assert one.dtype == torch.float32
        assert difference(one, other) < 2e-6


@pytest.mark.parametrize(
    ("init", "n_ssm", "frozen"), [("legs", None, ()), ("legt", 1, ("P", "C")), ("fourier", 3, "B")]
)
def test_layer(runs, monkeypatch, init, n_ssm, frozen):
    """Of parameters, some of them frozen, through a whole layer: as near to float64 as PyTorch is, or nearer."""
    layer, results = S4(6, 16, init=init, n_ssm=n_ssm, chunk_size=16), []
    for name in frozen:
        getattr(layer, name).requires_grad_(False)
    u, w = torch.randn(2, 40, 6), torch.randn(2, 40, 6)
    for setting, dtype in (("auto", torch.float32), ("torch", torch.float32), ("auto", torch.float64)):
        layer.kernels = setting
        layer.to(dtype)
        y, _ = layer(u.to(dtype), mode="chunk")
        trained = [x for x in layer.parameters() if x.requires_grad]
        results.append([y, *torch.autograd.grad(y, trained, w.to(dtype))])
        # of whole chunks and of a rest, and both again in the backward
        assert sorted(runs) == ["operators"] * 4 + ["operators_backward"] * 2
    for ours, plain, exact in zip(*results, strict=True):
        assert difference(ours, exact) < max(2e-6, 2 * difference(plain, exact))


def test_the_same_bits(any_threads):
    """Twice, by any number of threads, and of a channel among others."""
    discrete, results = system(5, 64, 1), []
    for number, channels in (
        (1, slice(0, 5)),
        (1, slice(0, 5)),
        (2, slice(0, 5)),
        (7, slice(0, 5)),
        (2, slice(4, 5)),
    ):
        torch.set_num_threads(number)
        operators, gradients = with_gradients(native_operators.native_operators, [x[channels] for x in discrete], 12)
        results.append([x[-1] for x in (*operators, *gradients)])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize(("N", "rank", "T"), [(64, 1, 64), (64, 2, 7), (10, 1, 5), (34, 3, 1), (2, 1, 3)])
def test_memory(monkeypatch, N, rank, T):
    """Nothing is written beside what was asked for, and nothing is read that was not written."""
    frames = Frames()
    expected = with_gradients(native_operators.native_operators, system(3, N, rank), T)
    monkeypatch.setattr(native_operators, "floats", frames.memory())
    found = with_gradients(native_operators.native_operators, system(3, N, rank), T)
    for one, other in zip([*expected[0], *expected[1]], [*found[0], *found[1]], strict=True):
        assert torch.equal(one, other)
    frames.check(4 + 1 + 5 + 1)


def test_gradients_that_lie_anywhere():
    """Parts of one matrix, repeated numbers, none at all."""
    discrete, T, N = system(3, 10, 1), 5, 10
    wide = torch.randn(3, T + N, T + N)
    parts = [torch.randn(T, 3).T, wide[:, :T, T:], wide[:, T:, :T], wide[:, T:, T:]]
    for weights in (parts, [torch.ones(()).expand(x.shape) for x in parts]):
        ours = with_gradients(native_operators.native_operators, discrete, T, weights)[1]
        theirs = with_gradients(twin, [x.double() for x in discrete], T, weights)[1]
        assert max(map(difference, ours, theirs)) < 2e-6
    for index in range(4):
        leaves = [x.detach().requires_grad_() for x in discrete]
        ours = native_operators.native_operators(DiscreteDPLR(*leaves), T)[index]
        theirs = krylov_operators(*leaves, T)[index]
        ours, theirs = (
            torch.autograd.grad(x.sum(), leaves, materialize_grads=True, allow_unused=True) for x in (ours, theirs)
        )
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(ours, theirs, strict=True))


def test_when_it_runs(runs, monkeypatch):
    layer = S4(4, 8)
    layer.operators(5)
    assert len(runs) == 1
    torch.set_default_dtype(torch.float64)
    try:
        assert {x.dtype for x in layer.operators(5)} == {torch.float32}
        assert len(runs) == 2
    finally:
        torch.set_default_dtype(torch.float32)
    S4(4, 8).double().operators(5)
    layer.kernels = "torch"
    expected = layer.operators(5)
    layer.kernels = "auto"
    monkeypatch.setenv("SSM_LM_KERNELS", "torch")
    assert all(map(torch.equal, layer.operators(5), expected))
    monkeypatch.delenv("SSM_LM_KERNELS")
    monkeypatch.setattr(native_operators, "SMALLEST", 4 * 8 * 8 + 1)
    assert all(map(torch.equal, layer.operators(5), expected))
    monkeypatch.setattr(native_operators, "SMALLEST", 0)
    with monkeypatch.context() as patch:  # a graph is of the twin
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert all(map(torch.equal, layer.operators(5), expected))
    monkeypatch.setattr(native_operators, "library", lambda name: None)
    assert all(map(torch.equal, layer.operators(5), expected))
    assert len(runs) == 2


def test_a_second_derivative_is_refused():
    leaves = [x.requires_grad_() for x in system(2, 4, 1)]
    taps = native_operators.native_operators(DiscreteDPLR(*leaves), 3).taps
    with pytest.raises(RuntimeError, match="Operators of ssm_lm has a first derivative alone"):
        torch.autograd.grad(taps.square().sum(), leaves[0], create_graph=True)


def test_a_model_trains_as_by_pytorch(runs, monkeypatch):
    """Losses and gradients are PyTorch's but for rounding, and by checkpointing the same bits."""
    model, ids, found = tiny_model(ssm="s4").train(), prompt(40), []
    for checkpointing, setting in ((False, "auto"), (True, "auto"), (False, "torch")):
        monkeypatch.setenv("SSM_LM_KERNELS", setting)
        model.zero_grad()
        (model.gradient_checkpointing_enable if checkpointing else model.gradient_checkpointing_disable)()
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        found.append([loss.detach(), *(x.grad.clone() for x in model.parameters())])
        assert "operators_backward" in runs
    assert all(map(torch.equal, found[0], found[1]))
    for ours, plain in zip(found[0], found[2], strict=True):
        assert difference(ours, plain) < 1e-4


def test_a_fork_of_a_process_that_has_threads(any_threads):
    """OpenMP's threads stay behind, and a child would wait for them forever; it works on one, to the same bits."""
    discrete = system(4, 16, 1)
    torch.set_num_threads(2)
    expected = native_operators.native_operators(discrete, 8)
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(20)
        same = all(map(torch.equal, native_operators.native_operators(discrete, 8), expected))
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
