"""The scan of SSD, interpreted, forward and backward, against its twin in float64; a model that trains on it."""

from functools import partial

import pytest
import torch
from kernel_checks import assert_close, assert_passes, assert_the_same_bits_again, compare_in_a_model, compare_with_twin
from torch.library import opcheck

from ssm_lm import S4Config, S4ForCausalLM
from ssm_lm.modeling import triton_ssd_scan
from ssm_lm.modeling.kernel_limits import longest_ssd_chunk
from ssm_lm.modeling.ssd import SSD
from ssm_lm.modeling.ssd_chunks import scan_vectors, since_start_of_chunks
from ssm_lm.modeling.triton_ssd_scan import self_check_cases, ssd_scan, ssd_scan_chunks, ssd_scan_chunks_backward


def problem(B, L, E, P, N, selective=False, initial=True, resets=False, dtype=torch.float32):
    """v, b, c, dt, decay, omega, skip, state, begins"""
    v, b, c = torch.randn(B, L, E * P), torch.randn(B, L, N), torch.randn(B, L, N)
    dt = 0.01 + torch.rand((B, L, E) if selective else (E,)).double() / 2
    rates = 0.2 + torch.rand(E).double(), 3 * torch.rand(E, N // 2).double()
    inputs = [*(x.to(dtype) for x in (v, b, c)), dt, *rates, torch.randn(E * P)]
    state = torch.randn(B, E * P, N).requires_grad_() if initial else None
    return *(x.requires_grad_() for x in inputs), state, torch.rand(B, L) < 0.15 if resets else None


def compare(inputs, T, tolerance=2e-5, shared=False):
    """shared: omega (N / 2,) is that of all heads."""

    def run(scan, v, b, c, dt, decay, omega, *rest):
        return scan(v, b, c, dt, decay, omega.expand(len(decay), -1) if shared else omega, *rest, T)

    compare_with_twin(partial(run, ssd_scan), partial(run, scan_vectors), inputs, tolerance)


@pytest.mark.parametrize("selective", [False, True], ids=["constant", "selective"])
@pytest.mark.parametrize("initial", [False, True], ids=["from zero", "continued"])
@pytest.mark.parametrize("resets", [False, True], ids=["one", "packed"])
@pytest.mark.parametrize(
    "L", [pytest.param(1, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.slow), 19]
)  # one token, one chunk, two and a part
def test_scan(L, resets, initial, selective):
    inputs = problem(2, L, 2, 4, 6, selective, initial, resets)
    if L == 1 and not initial:  # nothing has decayed or turned yet: both gradients are 0, ours but for rounding
        y, final = ssd_scan(*inputs, 8)
        rates = torch.autograd.grad(y.sum() + final.sum(), inputs[4:6])
        assert max(x.abs().max() for x in rates) < 1e-5
        inputs = *inputs[:4], inputs[4].detach(), inputs[5].detach(), *inputs[6:]
    compare(inputs, 8)


def test_bfloat16():
    compare(problem(2, 19, 2, 4, 6, resets=True, dtype=torch.bfloat16), 8, 2e-2)


@pytest.mark.parametrize("N", [pytest.param(32, marks=pytest.mark.slow), 128])
def test_whole_tiles(N):
    """None of a tile is masked, and a head is more channels than a program takes at a time."""
    compare(problem(1, 32, 1, 64, N), 16)


@pytest.mark.parametrize("selective", [False, True], ids=["constant", "selective"])
def test_chunks_of_hopper(selective):
    """Of 64 tokens, whole, and a part. In bfloat16 the self-check has them, test_self_checks.py."""
    compare(problem(1, 70, 2, 20, 64, selective, resets=True), longest_ssd_chunk("sm_90", torch.bfloat16, 64), 5e-5)


@pytest.mark.slow
def test_bfloat16_of_many_states():
    compare(problem(2, 40, 2, 20, 72, selective=True, resets=True, dtype=torch.bfloat16), 32, 3e-2)


def test_the_final_state_alone():
    """Without y nothing but the states is read, or kept where no gradient asks for it; with it, as ever."""
    v, b, c, *rates, skip, state, begins = problem(2, 12, 1, 3, 4, resets=True)
    inputs = v, b, c.detach(), *rates, skip.detach(), state, begins
    compare_with_twin(lambda *x: ssd_scan(*x, 8, has_output=False)[1], lambda *x: scan_vectors(*x, 8)[1], inputs, 2e-5)
    with torch.no_grad():
        dt, decay, omega = inputs[3:6]
        vectors = *inputs[:3], omega, decay, dt, *inputs[6:], 8
        expected, final, starts = ssd_scan_chunks(*vectors)
        assert [x.numel() for x in (expected, starts)] == [v.numel(), 2 * 2 * 3 * 4]
        for has_output in (False, True):
            y, alone, starts = ssd_scan_chunks(*vectors, has_output, save=False)
            assert torch.equal(alone, final)
            assert not starts.numel()
            assert torch.equal(y, expected) if has_output else not y.numel()


def test_a_gradient_of_one_output_alone():
    v, b, c, *rates, skip, state, begins = problem(1, 12, 1, 3, 4)
    inputs = v, b, c.detach(), *rates, skip.detach(), state, begins  # the final state asks for neither
    for i in (0, 1):
        compare_with_twin(lambda *x, i=i: ssd_scan(*x, 8)[i], lambda *x, i=i: scan_vectors(*x, 8)[i], inputs, 2e-5)


@pytest.mark.slow
def test_long_memory_keeps_its_phase():
    """A head that hardly decays and turns quickly, over many chunks."""
    v, b, c, dt, decay, omega, skip, *_ = problem(1, 300, 1, 2, 4, initial=False)
    omega = torch.tensor([[123.4567, 1.7654321]]).double()
    detached = (x.detach() for x in (v, b, c, dt, decay * 1e-4))
    compare((*detached, omega, skip.detach(), None, None), 32, 5e-5)


def test_the_same_bits_again():
    assert_the_same_bits_again(lambda *x: ssd_scan(*x, 8), problem(2, 19, 2, 4, 6, resets=True))


@pytest.mark.slow
@pytest.mark.parametrize("selective", [False, True], ids=["constant", "selective"])
def test_custom_operators(selective):
    v, b, c, dt, decay, omega, skip, state, begins = problem(1, 9, 2, 4, 6, selective, resets=True)
    system = omega, decay, dt
    if selective:
        system = (x.detach().requires_grad_() for x in since_start_of_chunks(dt, decay, omega, 9, 4))
    inputs = v, b, c, *system, skip, state, begins, 4
    opcheck(ssd_scan_chunks, inputs)
    y, final, starts = (x.detach() for x in ssd_scan_chunks(*inputs))
    read = [x.detach() for x in inputs[:7]]
    opcheck(ssd_scan_chunks_backward, (torch.randn_like(y), final, starts, *read, begins, 4))


def test_heads_that_share_their_frequencies():
    """As the default block's do, at one place in memory."""
    v, b, c, dt, decay, omega, *rest = problem(1, 19, 3, 4, 6)
    compare((v, b, c, dt, decay, omega[0].detach().requires_grad_(), *rest), 8, shared=True)


@pytest.mark.slow
def test_self_check():
    assert_passes(self_check_cases)


@pytest.mark.parametrize("selective", [False, True], ids=["constant", "selective"])
def test_layer(selective):
    """A length that is no whole number of chunks, a state to go on from, documents with padding."""
    torch.manual_seed(0)
    layer = SSD(8, 6, chunk_size=8, head_dim=4, selective=selective)
    u = torch.randn(2, 21, layer.input_size, requires_grad=True)
    state = torch.randn(2, 8, 6, requires_grad=True)
    seq_idx = torch.tensor([[0] * 6 + [1] * 15, [2, -1, -1] + [4] * 16 + [-1] * 2])
    results = []
    for kernels in ("torch", "triton"):
        layer.kernels = kernels
        y, final = layer(u, mode="chunk", initial_state=state, seq_idx=seq_idx)
        end = layer.advance(u, state)
        inputs = [u, state, *layer.parameters()]
        gradients = torch.autograd.grad(y.square().sum() + final.square().sum() + end.sum(), inputs)
        results.append([y, final, end, *gradients])
    for ours, theirs in zip(*reversed(results), strict=True):
        assert_close(ours, theirs, 5e-5)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_model(autocast, monkeypatch):
    """Loss and gradients of the default block; in an autocast region of bfloat16, tokens reach the kernels in it."""
    launched = []
    monkeypatch.setattr(triton_ssd_scan, "ssd_scan_chunks", lambda *x: launched.append(x[:3]) or ssd_scan_chunks(*x))
    config = S4Config(
        vocab_size=19, hidden_size=8, num_hidden_layers=1, state_size=6, ssm="ssd", arch=["gated", "swiglu"],
        head_dim=4, chunk_size=8, intermediate_size=8, mode="chunk",
    )  # fmt: skip
    torch.manual_seed(2)
    model, ids = S4ForCausalLM(config).eval(), torch.randint(1, 19, (2, 37))
    scans = [part for part in model.modules() if isinstance(part, SSD)]
    # autocast itself is 0.08 from float32, in C_bias
    compare_in_a_model(model, scans, ids, autocast, 0.1 if autocast else 5e-5)
    assert {x.dtype for x in launched[0]} == {torch.bfloat16 if autocast else torch.float32}
