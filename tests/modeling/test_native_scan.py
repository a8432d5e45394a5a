"""The chunk scan of S4 and S4D in C against its twin, when it runs, and when it does not."""

import pytest
import torch
from in_c import Frames, called_names, difference, needs

from ssm_lm.modeling import native_operators, native_scan
from ssm_lm.modeling.chunked import PLAIN, ChunkOperators, Wanted, operator_shapes
from ssm_lm.modeling.documents import find_documents
from ssm_lm.modeling.native_scan import NATIVE
from ssm_lm.modeling.ops import chunk_scan
from ssm_lm.modeling.ssm import S4, S4D, S5

pytestmark = needs("operators")


@pytest.fixture(autouse=True)
def of_any_size(monkeypatch):
    monkeypatch.setattr(native_operators, "SMALLEST", 0)


@pytest.fixture
def runs(monkeypatch):
    return called_names(monkeypatch, native_scan)


def example(B, H, N, T, chunks, dtype=torch.float32, dense=True):
    """u, operators whose states fade, an initial state, and which chunks go on."""
    torch.manual_seed(0)
    operators = [torch.randn(shape, dtype=torch.float64) * 0.3 for shape in operator_shapes(H, T, N, dense)]
    operators[3] = 0.9 * torch.linalg.qr(operators[3])[0] if dense else operators[3].clamp(-0.6, 0.6)
    u, state = torch.randn(B, chunks * T, H, dtype=torch.float64), torch.randn(B, H, N, dtype=torch.float64)
    keep = torch.rand(B, chunks) < 0.7
    return u.to(dtype), ChunkOperators(*(x.to(dtype) for x in operators)), state.to(dtype), keep


def run(implementation, u, operators, state, wanted, weights):
    """y, the final state and the gradients of all that there is, for as many of y and it as there are weights."""
    leaves = [None if x is None else x.clone().requires_grad_() for x in (u, *operators, state)]
    in_c = implementation is NATIVE
    y, final = chunk_scan(
        leaves[0], ChunkOperators(*leaves[1:5]), leaves[5], *wanted[:1], (), *wanted[1:4], False, in_c
    )
    pairs = [(x, w) for x, w in zip((y, final), weights, strict=True) if w is not None]
    outputs, of_outputs = zip(*pairs, strict=True)
    leaves = [x for x in leaves if x is not None]
    gradients = torch.autograd.grad(outputs, leaves, of_outputs, allow_unused=True, materialize_grads=True)
    return [x.detach() for x in (y, final, *gradients) if x is not None]


@pytest.mark.parametrize(
    ("B", "H", "N", "T", "chunks"),
    [(2, 19, 64, 64, 5), (1, 3, 6, 5, 4), (3, 33, 34, 33, 1), (1, 16, 66, 99, 3), (5, 2, 2, 1, 7), (2, 1, 8, 700, 8)],
)
@pytest.mark.parametrize("which", ["zero", "state", "documents", "final"])
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "diagonal"])
def test_scan(B, H, N, T, chunks, which, dense):
    """And its gradients, against the twin in float64: segments that are whole and not, sizes of no multiple."""
    u, operators, state, keep = example(B, H, N, T, chunks, dense=dense)
    activation = "gelu" if which == "state" else "identity"
    wanted = Wanted(keep if which == "documents" else None, which != "final", activation)
    weights = [
        torch.randn(u.shape) if which != "final" else None,
        torch.randn(state.shape) if which != "zero" else None,
    ]
    state = None if which in ("zero", "documents") else state
    ours = run(NATIVE, u, operators, state, wanted, weights)
    doubled = [None if x is None else x.double() for x in (*weights, state)]
    theirs = run(PLAIN, u.double(), ChunkOperators(*(x.double() for x in operators)), doubled[2], wanted, doubled[:2])
    for one, other in zip(ours, theirs, strict=True):
        assert one.shape == other.shape
        assert difference(one, other) < 5e-6


def test_the_same_bits(any_threads):
    """Twice, by any number of threads, and of channels among others."""
    u, operators, state, keep = example(2, 40, 8, 16, 6)
    weights, results = [torch.randn(u.shape), torch.randn(state.shape)], []
    for number, one in ((1, False), (1, False), (2, False), (7, False), (2, True)):
        torch.set_num_threads(number)
        part = slice(32, 40) if one else slice(0, 40)
        found = run(
            NATIVE,
            u[..., part],
            ChunkOperators(*(x[part] for x in operators)),
            state[:, part],
            Wanted(keep),
            [weights[0][..., part], weights[1][:, part]],
        )
        results.append(found)
    for other in results[1:4]:
        assert all(map(torch.equal, results[0], other))
    for axis, all_, part in zip((2, 1, 2, 0, 0, 0, 0, 1), results[0], results[4], strict=True):
        assert torch.equal(all_.narrow(axis, 32, 8), part)


@pytest.mark.parametrize(("B", "H", "N", "T", "chunks"), [(2, 19, 10, 7, 3), (1, 16, 64, 64, 2), (1, 2, 4, 3000, 2)])
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "diagonal"])
def test_memory(monkeypatch, B, H, N, T, chunks, dense):
    """Nothing is written beside what was asked for, and nothing is read that was not written."""
    frames = Frames()
    u, operators, state, keep = example(B, H, N, T, chunks, dense=dense)
    problem = u, operators, state, Wanted(keep), [torch.randn(u.shape), torch.randn(state.shape)]
    expected = run(NATIVE, *problem)
    monkeypatch.setattr(native_scan, "floats", frames.memory())
    assert all(map(torch.equal, run(NATIVE, *problem), expected))
    frames.check(3 + 1 + 4 + 1)


@pytest.mark.parametrize(("kind", "frozen"), [(S4, False), (S4, True), (S4D, False)])
def test_layer(runs, kind, frozen):
    """A layer in both settings, over documents and from a state, of whole chunks and a rest."""
    layer, results = kind(20, 16, chunk_size=16).requires_grad_(not frozen), []
    u, state, w = torch.randn(2, 40, 20, requires_grad=True), torch.randn(2, 20, 16), torch.randn(2, 40, 20)
    documents = find_documents(torch.arange(40).expand(2, 40) // 17, 16)
    for setting in ("auto", "torch"):
        layer.kernels = setting
        y, final = layer(u, mode="chunk", initial_state=state)
        z, _ = layer(u, mode="chunk", seq_idx=documents)
        wanted = [u, *(x for x in layer.parameters() if x.requires_grad)]
        results.append([y, final, z, *torch.autograd.grad((y, z), wanted, (w, w))])
        assert sorted(runs) == ["scan"] * 3 + ["scan_backward"] * 3
    for ours, plain in zip(*results, strict=True):
        assert difference(ours, plain) < 1e-4


def test_when_it_runs(runs, monkeypatch):
    u = torch.randn(1, 12, 4)
    layer = S4(4, 8, chunk_size=4)
    layer(u, mode="chunk")
    assert runs == ["scan"]
    for other in (S5(4, 8), S4(4, 8).double()):
        other(u, mode="chunk")
    layer(u.bfloat16(), mode="chunk")
    monkeypatch.setenv("SSM_LM_KERNELS", "torch")
    expected = layer(u, mode="chunk")[0]
    monkeypatch.delenv("SSM_LM_KERNELS")
    monkeypatch.setattr(native_operators, "SMALLEST", 4 * 8 * 8 + 1)
    assert torch.equal(layer(u, mode="chunk")[0], expected)
    monkeypatch.setattr(native_operators, "SMALLEST", 0)
    with monkeypatch.context() as patch:  # a graph is of the twin
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert torch.equal(layer(u, mode="chunk")[0], expected)
    monkeypatch.setattr(native_operators, "library", lambda name: None)
    assert torch.equal(layer(u, mode="chunk")[0], expected)
    assert runs == ["scan"]


def test_where_it_runs_chunks_are_faster_than_an_fft(monkeypatch):
    layer, u = S4D(4, 8), torch.randn(1, 100, 4)
    assert layer.decide(u).mode == "chunk"
    assert layer.decide(u.bfloat16()).mode == "fft"
    monkeypatch.setattr(native_operators, "library", lambda name: None)
    assert layer.decide(u).mode == "fft"
