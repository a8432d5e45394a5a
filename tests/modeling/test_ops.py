import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from ssm_lm.modeling import cauchy, chunked, ops
from ssm_lm.modeling.ops import ChunkOperators


def random(*shape, grad=False):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)


def test_toeplitz_by_hand():
    assert ops.toeplitz(torch.tensor([[1.0, 2.0, 3.0]])).tolist() == [[[1, 0, 0], [2, 1, 0], [3, 2, 1]]]


def test_complex_toeplitz_by_hand():
    taps = random(1, 2, 3)
    u = torch.complex(random(3), random(3))
    k = torch.complex(*taps[0])
    expected = torch.stack([sum(k[i - j] * u[j] for j in range(i + 1)) for i in range(3)])
    ours = ops.toeplitz(taps)[0] @ torch.cat([u.real, u.imag])
    torch.testing.assert_close(torch.complex(*ours.chunk(2)), expected)


@pytest.mark.parametrize("shape", [(2, 1), (2, 5), (3, 2, 4)])
def test_toeplitz_adjoint(shape):
    taps = random(*shape, grad=True)
    gradient = torch.randn_like(ops.toeplitz(taps))
    (expected,) = torch.autograd.grad(ops.toeplitz(taps), taps, gradient)
    torch.testing.assert_close(chunked.toeplitz_adjoint(gradient, taps), expected)


@pytest.fixture(params=[1, 1 << 21], ids=["chunk-by-chunk", "all-at-once"])
def segments(request, monkeypatch):
    monkeypatch.setitem(chunked.SEGMENT_ELEMENTS, "cpu", request.param)


@pytest.mark.parametrize("carry", ["dense", "diagonal"])
def test_chunk_scan_against_a_loop_over_chunks(carry, segments):
    torch.manual_seed(0)
    H, T, N, B, chunks = 3, 5, 4, 2, 4
    decay = random(H, N, N) / N if carry == "dense" else random(H, N) / 2
    operators = ChunkOperators(random(H, T), random(H, T, N), random(H, N, T), decay)
    u, state = random(B, chunks * T, H), random(B, H, N)
    y, final = ops.chunk_scan(u, operators, state)

    if carry == "dense":
        matrix = decay
    else:  # complex product as a real 2 x 2 block
        re, im = (torch.diag_embed(part) for part in decay.chunk(2, -1))
        matrix = torch.cat([torch.cat([re, -im], -1), torch.cat([im, re], -1)], -2)
    h = state
    for c in range(chunks):
        x = u[:, c * T : (c + 1) * T]
        expected = torch.zeros(B, T, H, dtype=torch.float64)
        for i in range(T):
            expected[:, i] += torch.einsum("hn,bhn->bh", operators.emit[:, i], h)
            for j in range(i + 1):
                expected[:, i] += operators.taps[:, i - j] * x[:, j]
        torch.testing.assert_close(y[:, c * T : (c + 1) * T], expected)
        h = torch.einsum("hmn,bhn->bhm", matrix, h) + torch.einsum("hnt,bth->bhn", operators.inject, x)
    torch.testing.assert_close(final, h)


@pytest.mark.parametrize("carry", ["dense", "diagonal"])
def test_chunk_scan_gradients(carry, segments):
    torch.manual_seed(0)
    H, T, N, B = 2, 3, 4, 2
    decay = random(H, N, N, grad=True) if carry == "dense" else random(H, N, grad=True)
    inputs = (
        random(B, 3 * T, H, grad=True),
        random(H, T, grad=True),
        random(H, T, N, grad=True),
        random(H, N, T, grad=True),
        decay,
        random(B, H, N, grad=True),
    )
    assert gradcheck(lambda u, k, e, i, c, h: ops.chunk_scan(u, ChunkOperators(k, e, i, c), h), inputs)


def test_chunk_scan_of_complex_signals_with_resets(segments):
    """What S5 and packed documents use: two numbers a token, chunks that start from zero, no initial state."""
    torch.manual_seed(0)
    H, T, B = 2, 3, 2
    keep = torch.tensor([[True, False, True], [False, True, False]])
    inputs = (
        random(B, 3 * T, 2 * H, grad=True),
        random(H, 2, T, grad=True),
        random(H, 2 * T, 2, grad=True),
        random(H, 2, 2 * T, grad=True),
        random(H, 2, grad=True),
    )
    assert gradcheck(lambda u, *x: ops.chunk_scan(u, ChunkOperators(*x), keep=keep), inputs)
    u, *operators = inputs
    y, final = ops.chunk_scan(u, ChunkOperators(*operators), keep=keep)
    first, _ = ops.chunk_scan(u[:1, :T], ChunkOperators(*operators))
    rest, last = ops.chunk_scan(u[:1, T:], ChunkOperators(*operators))
    torch.testing.assert_close(y[:1], torch.cat([first, rest], 1))
    torch.testing.assert_close(final[:1], last)


def test_chunk_scan_makes_operators_again_in_the_backward():
    torch.manual_seed(0)
    u, parameters = random(2, 6, 2, grad=True), [random(*s, grad=True) for s in ((2, 3), (2, 3, 4), (2, 4, 3), (2, 4))]
    calls = []

    def make(*x):
        calls.append(torch.is_grad_enabled())
        return ChunkOperators(*(p.sin() for p in x))

    def gradients(*args):
        y, state = ops.chunk_scan(u, *args)
        return torch.autograd.grad(y.sum() + state.square().sum(), [u, *parameters])

    ours = gradients(make, None, None, tuple(parameters))
    assert calls == [False, True]
    for a, b in zip(ours, gradients(ChunkOperators(*(p.sin() for p in parameters))), strict=True):
        torch.testing.assert_close(a, b)


@settings(max_examples=25, deadline=None)
@given(length=st.integers(1, 70), batch=st.integers(1, 3))
def test_fft_convolution_is_the_direct_sum(length, batch):
    u, kernel = random(batch, length, 2), random(2, length)
    expected = ops.toeplitz(kernel) @ u.permute(2, 1, 0)
    torch.testing.assert_close(ops.fft_convolution(u, kernel), expected.permute(2, 1, 0))


def test_fft_convolution_gradients():
    assert gradcheck(ops.fft_convolution, (random(2, 5, 3, grad=True), random(3, 5, grad=True)))


def materialised_cauchy(v_re, v_im, nodes, Lambda_re, Lambda_im):
    v, Lambda = torch.complex(v_re, v_im)[..., None], torch.complex(Lambda_re, Lambda_im)[:, None, :, None]
    s = 1j * nodes
    return (v / (s - Lambda) + v.conj() / (s - Lambda.conj())).sum(2)


@pytest.mark.parametrize("block_elements", [1, 40, 1 << 20])
def test_cauchy_equals_the_materialised_sum(block_elements, monkeypatch):
    monkeypatch.setitem(cauchy.CAUCHY_BLOCK_ELEMENTS, "cpu", block_elements)
    torch.manual_seed(0)
    inputs = (random(3, 4, 5), random(3, 4, 5), random(17), -torch.rand(3, 5, dtype=torch.float64), random(3, 5))
    torch.testing.assert_close(torch.complex(*ops.cauchy(*inputs)), materialised_cauchy(*inputs))


@pytest.mark.parametrize("block_elements", [1, 1 << 20])
def test_cauchy_gradients(block_elements, monkeypatch):
    monkeypatch.setitem(cauchy.CAUCHY_BLOCK_ELEMENTS, "cpu", block_elements)
    torch.manual_seed(0)
    Lambda_re = (-torch.rand(2, 3, dtype=torch.float64) - 0.1).requires_grad_()
    inputs = (random(2, 2, 3, grad=True), random(2, 2, 3, grad=True), random(5), Lambda_re, random(2, 3, grad=True))
    assert gradcheck(ops.cauchy, inputs)


@settings(max_examples=25, deadline=None)
@given(length=st.integers(1, 200))
def test_vandermonde_equals_the_materialised_sum(length):
    v, log = torch.complex(random(2, 3), random(2, 3)), torch.complex(-random(2, 3).abs() / 20, random(2, 3))
    expected = 2 * (v[..., None] * torch.exp(log[..., None] * torch.arange(length))).sum(1).real
    torch.testing.assert_close(ops.vandermonde(v.real, v.imag, log.real, log.imag, length), expected)


def test_cauchy_next_to_zero_in_float32():
    """An eigenvalue of 1e-10 and a node at 0: the fourth power of both would underflow."""
    v, Lambda = torch.ones(1, 1, 1), torch.tensor([[-1e-10]], requires_grad=True)
    re, _ = ops.cauchy(v, v, torch.tensor([0.0, 1e5]), Lambda, torch.zeros(1, 1))
    torch.testing.assert_close(re.flatten()[0], torch.tensor(2e10), rtol=1e-5, atol=0)
    re.sum().backward()
    torch.testing.assert_close(Lambda.grad, torch.tensor([[2e20]]), rtol=1e-5, atol=0)


def test_cauchy_next_to_a_pole_in_float32():
    """A node 0.5 away from a fast pole: nothing may cancel."""
    v, re, im = torch.ones(1, 1, 1), torch.tensor([[-0.5]]), torch.tensor([[-1303.27]])
    nodes = torch.linspace(-1304, -1302, 41)
    ours = torch.complex(*ops.cauchy(v, v, nodes, re, im))
    expected = materialised_cauchy(*(x.double() for x in (v, v, nodes, re, im)))
    torch.testing.assert_close(ours.to(expected.dtype), expected, rtol=2e-6, atol=0)


def test_vandermonde_gradients():
    torch.manual_seed(0)
    decay = (-torch.rand(2, 3, dtype=torch.float64)).requires_grad_()
    inputs = (random(2, 3, grad=True), random(2, 3, grad=True), decay, random(2, 3, grad=True))
    assert gradcheck(lambda *x: ops.vandermonde(*x, 11), inputs)


def test_powers_keep_the_phase_in_float32():
    """A slow mode after 16,000 steps: thousands of radians, and still seven digits of the angle."""
    log_re, log_im = torch.tensor([-1e-5]), torch.tensor([3.0])
    re, im = ops.powers(log_re, log_im, torch.tensor([16000.0]))
    expected = torch.exp(torch.complex(log_re.double(), log_im.double()) * 16000)
    torch.testing.assert_close(torch.complex(re, im), expected, rtol=1e-10, atol=1e-10)


def test_gradients_of_the_small_ones():
    torch.manual_seed(0)
    assert gradcheck(ops.toeplitz, (random(2, 4, grad=True),))
    assert gradcheck(ops.apply_diagonal, (random(2, 4, grad=True), random(3, 2, 4, grad=True)))
    assert gradcheck(
        lambda a, b: ops.powers(a, b, torch.arange(3.0)), (random(2, 1, grad=True), random(2, 1, grad=True))
    )
