import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from ssm_lm.modeling import ops
from ssm_lm.modeling.ops import ChunkOperators


def random(*shape, grad=False):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)


def test_toeplitz_by_hand():
    assert ops.toeplitz(torch.tensor([[1.0, 2.0, 3.0]])).tolist() == [[[1, 0, 0], [2, 1, 0], [3, 2, 1]]]


@pytest.mark.parametrize("carry", ["dense", "diagonal"])
def test_chunk_scan_against_a_loop_over_chunks(carry):
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
def test_chunk_scan_gradients(carry):
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
    monkeypatch.setattr(ops._Cauchy, "block_elements", block_elements)
    torch.manual_seed(0)
    inputs = (random(3, 4, 5), random(3, 4, 5), random(17), -torch.rand(3, 5, dtype=torch.float64), random(3, 5))
    torch.testing.assert_close(torch.complex(*ops.cauchy(*inputs)), materialised_cauchy(*inputs))


@pytest.mark.parametrize("block_elements", [1, 1 << 20])
def test_cauchy_gradients(block_elements, monkeypatch):
    monkeypatch.setattr(ops._Cauchy, "block_elements", block_elements)
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
