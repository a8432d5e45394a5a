"""SSD's chunk scan in C against its twin, when it runs, and when it does not."""

import pytest
import torch
from in_c import Frames, called_names, difference, needs

from ssm_lm.modeling import native_operators, native_ssd
from ssm_lm.modeling.native_ssd import native_ssd_scan
from ssm_lm.modeling.ssd_chunks import scan_vectors
from ssm_lm.modeling.ssm import SSD

pytestmark = needs("ssd")


@pytest.fixture(autouse=True)
def of_any_size(monkeypatch):
    monkeypatch.setattr(native_operators, "SMALLEST", 0)


@pytest.fixture
def runs(monkeypatch):
    return called_names(monkeypatch, native_ssd)


def example(B, L, E, P, N, selective, documents):
    """The arguments of a scan up to D, in float64 where they are for the twin, a state, and where documents begin."""
    torch.manual_seed(0)
    steps = torch.randn((B, L, E) if selective else (E,), dtype=torch.float64).sigmoid() / 2
    rates = torch.randn(E, dtype=torch.float64).exp(), torch.randn(E, N // 2, dtype=torch.float64)
    tokens = torch.randn(B, L, E * P), torch.randn(B, L, N), torch.randn(B, L, N)
    begins = torch.rand(B, L) < 0.1 if documents else None
    return [*tokens, steps, *rates, torch.randn(E * P)], torch.randn(B, E * P, N), begins


def run(scan, inputs, state, begins, T, weights, cast=torch.Tensor.float):
    """y, the final state and the gradients of all that there is, for as many of y and it as there are weights."""
    leaves = [x if x is None or x.dtype == torch.float64 else cast(x) for x in (*inputs, state)]
    leaves = [None if x is None else x.clone().requires_grad_() for x in leaves]
    outputs = scan(*leaves, begins, T, weights[0] is not None)
    of_outputs = [None if w is None else cast(w) for w in weights]
    outputs, of_outputs = zip(*((x, w) for x, w in zip(outputs, of_outputs, strict=True) if w is not None), strict=True)
    leaves = [x for x in leaves if x is not None]
    gradients = torch.autograd.grad(outputs, leaves, of_outputs, allow_unused=True, materialize_grads=True)
    return [x.detach() for x in (*outputs, *gradients)]


@pytest.mark.parametrize(
    ("B", "L", "E", "P", "N", "T"),
    [(2, 150, 2, 64, 64, 64), (1, 40, 3, 20, 6, 16), (3, 5, 2, 1, 2, 5), (1, 130, 1, 40, 66, 65), (2, 7, 1, 3, 10, 1)],
)
@pytest.mark.parametrize("selective", [False, True], ids=["constant", "selective"])
@pytest.mark.parametrize("which", ["zero", "state", "documents", "final"])
def test_scan(B, L, E, P, N, T, selective, which):
    """And its gradients, against the twin in float64: sizes of no multiple, a last chunk that is not whole."""
    inputs, state, begins = example(B, L, E, P, N, selective, which == "documents")
    weights = [
        torch.randn(B, L, E * P) if which != "final" else None,
        torch.randn(B, E * P, N) if which != "zero" else None,
    ]
    state = None if which == "zero" else state
    problem = inputs, state, begins, T, weights
    ours, theirs = run(native_ssd_scan, *problem), run(scan_vectors, *problem, torch.Tensor.double)
    plain = run(scan_vectors, *problem)
    sizes = [x.abs().max() for x in theirs]
    if not selective:  # what tokens add to the gradient of a step that they share may be all but nothing in sum
        of_tokens = [*inputs[:3], inputs[3].expand(B, L, E), *inputs[4:]]
        place = sum(w is not None for w in weights) + 3
        of_tokens = run(scan_vectors, of_tokens, *problem[1:], torch.Tensor.double)[place]
        sizes[place] = of_tokens.abs().sum((0, 1)).max()
    for one, other, twin, size in zip(ours, theirs, plain, sizes, strict=True):
        assert one.shape == other.shape
        # of random gradients what reaches a rate may be all but nothing, and then is rounding, in the twin too: of nine
        # seeds, with SSE, AVX2 and AVX-512, up to 4.3e-6
        errors = [(x.double() - other).abs().max() / size.clamp(min=1e-30) for x in (one, twin)]
        assert errors[0] < max(5e-6 if other.dtype == twin.dtype else 2e-6, 3 * errors[1])


def test_weights_fade_to_zero():
    """Decays beyond the range of exp, and none at all."""
    inputs, state, _ = example(1, 70, 2, 4, 6, True, False)
    inputs[4] = torch.tensor([200.0, 0.0], dtype=torch.float64)
    problem = inputs, state, None, 32, [torch.randn(1, 70, 8), torch.randn(1, 8, 6)]
    for one, other in zip(
        run(native_ssd_scan, *problem), run(scan_vectors, *problem, torch.Tensor.double), strict=True
    ):
        assert difference(one, other) < 1e-5


def test_the_same_bits(any_threads):
    """Twice, by any number of threads, and of heads among others."""
    inputs, state, begins = example(2, 40, 6, 5, 8, True, True)
    results = []
    weights = [torch.randn(2, 40, 30), torch.randn(2, 30, 8)]
    for number, heads in ((1, 6), (1, 6), (2, 6), (7, 6), (2, 2)):
        torch.set_num_threads(number)
        H = heads * 5
        v, b, c, dt, decay, omega, skip = inputs
        part = v[..., :H], b, c, dt[..., :heads], decay[:heads], omega[:heads], skip[:H]
        wanted = [weights[0][..., :H], weights[1][:, :H]]
        results.append(run(native_ssd_scan, part, state[:, :H], begins, 16, wanted))
    for other in results[1:4]:
        assert all(map(torch.equal, results[0], other))
    y, final, of_v = (results[0][i] for i in range(3))
    for all_, part in ((y[..., :10], 0), (final[:, :10], 1), (of_v[..., :10], 2)):
        assert torch.equal(all_, results[4][part])


@pytest.mark.parametrize(("B", "L", "E", "P", "N", "T"), [(2, 47, 3, 7, 10, 9), (1, 128, 2, 64, 64, 64)])
@pytest.mark.parametrize("selective", [False, True], ids=["constant", "selective"])
def test_memory(monkeypatch, B, L, E, P, N, T, selective):
    """Nothing is written beside what was asked for, and nothing is read that was not written."""
    frames = Frames()
    inputs, state, begins = example(B, L, E, P, N, selective, True)
    problem = inputs, state, begins, T, [torch.randn(B, L, E * P), torch.randn(B, E * P, N)]
    expected = run(native_ssd_scan, *problem)
    monkeypatch.setattr(native_ssd, "floats", frames.memory())
    monkeypatch.setattr(native_ssd, "doubles", frames.memory(torch.float64))
    assert all(map(torch.equal, run(native_ssd_scan, *problem), expected))
    frames.check(3 + 1 + 7 + 1)


@pytest.mark.parametrize("selective", [False, True], ids=["constant", "selective"])
@pytest.mark.parametrize("init", ["rope", "lin+real"])
def test_layer(runs, init, selective):
    """A layer in both settings, over documents and from a state."""
    layer, results = SSD(20, 16, init, chunk_size=16, head_dim=10, selective=selective), []
    x = torch.randn(2, 40, layer.input_size, requires_grad=True)
    state, w = torch.randn(2, 20, 16), torch.randn(2, 40, 20)
    for setting in ("auto", "torch"):
        layer.kernels = setting
        y, final = layer(x, mode="chunk", initial_state=state)
        z, _ = layer(x, mode="chunk", seq_idx=torch.arange(40).expand(2, 40) // 17)
        results.append([y, final, z, *torch.autograd.grad((y, z), [x, *layer.parameters()], (w, w))])
        assert sorted(runs) == ["ssd_scan"] * 2 + ["ssd_scan_backward"] * 2
    for ours, plain in zip(*results, strict=True):
        assert difference(ours, plain) < 1e-4


def test_transforms_run_pytorch(runs):
    layer = SSD(4, 8, chunk_size=4)
    x = torch.randn(1, 12, layer.input_size, requires_grad=True)
    found = torch.func.grad(lambda x: layer(x)[0].square().sum())(x)
    assert runs == []
    expected = torch.autograd.grad(layer(x)[0].square().sum(), x)[0]
    assert runs == ["ssd_scan", "ssd_scan_backward"]
    torch.testing.assert_close(found, expected)


def test_when_it_runs(runs, monkeypatch):
    layer = SSD(4, 8, chunk_size=4)
    x = torch.randn(1, 12, layer.input_size)
    layer(x)
    assert runs == ["ssd_scan"]
    SSD(4, 8).double()(x.double())
    monkeypatch.setenv("SSM_LM_KERNELS", "torch")
    expected = layer(x)[0]
    monkeypatch.delenv("SSM_LM_KERNELS")
    monkeypatch.setattr(native_operators, "SMALLEST", 4 * 8 * 8 + 1)
    assert torch.equal(layer(x)[0], expected)
    monkeypatch.setattr(native_operators, "SMALLEST", 0)
    with monkeypatch.context() as patch:  # a graph is of the twin
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert torch.equal(layer(x)[0], expected)
    monkeypatch.setattr(native_operators, "library", lambda name: None)
    assert torch.equal(layer(x)[0], expected)
    assert runs == ["ssd_scan"]
