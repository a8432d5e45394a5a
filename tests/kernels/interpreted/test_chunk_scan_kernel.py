"""The chunk scan's kernel against its twin in float64, and as an operator of torch."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import assert_close, compare_with_twin, gapped

from ssm_lm.modeling import kernel_limits, kernels_s4, triton_chunk_scan
from ssm_lm.modeling.activations import ACTIVATIONS
from ssm_lm.modeling.ops import ChunkOperators, chunk_scan

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def problem(B, L, H, N, T, dense, dtype=torch.float32, state=False, resets=False):
    """u, the four operators, initial state, keep: what both scans take. The operators keep the state near 1."""

    def random(*shape, scale=1.0):
        return (torch.randn(*shape) * scale).requires_grad_()

    carry = random(H, N, N, scale=0.5 / N**0.5) if dense else random(H, N, scale=0.4)
    operators = random(H, T), random(H, T, N, scale=N**-0.5), random(H, N, T, scale=T**-0.5), carry
    keep = None
    if resets:
        keep = torch.rand(B, L // T) < 0.6
    u = torch.randn(B, L, H).to(dtype).requires_grad_()
    return u, *operators, random(B, H, N) if state else None, keep


def kernel(u, taps, emit, inject, carry, state, keep, has_output=True, activation="identity"):
    operators = ChunkOperators(taps, emit, inject, carry)
    return chunk_scan(u, operators, state, keep, has_output=has_output, activation=activation, run_kernel=True)


def twin(u, taps, emit, inject, carry, state, keep, has_output=True):
    padding = -u.shape[1] % taps.shape[-1]  # zeros before the first token change nothing in a zero state
    u = F.pad(u, (0, 0, padding, 0))
    y, final = chunk_scan(u, ChunkOperators(taps, emit, inject, carry), state, keep, has_output=has_output)
    return y[:, padding:] if has_output else None, final


@pytest.mark.parametrize("dense", [False, True], ids=["diagonal", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "case",
    [
        dict(B=2, L=48, H=2, N=16, T=16),
        dict(B=3, L=37, H=3, N=24, T=16),  # a ragged start, N no power of two
        dict(B=18, L=32, H=1, N=16, T=16, state=True, resets=True),  # more than one tile of the batch
        dict(B=1, L=40, H=1, N=10, T=20, state=True),  # T no power of two
        dict(B=2, L=1, H=5, N=2, T=1),  # one token
        dict(B=2, L=10, H=1, N=128, T=32),  # less than a chunk, the largest state
    ],
    ids=["plain", "ragged", "state-and-resets", "odd-chunk", "one-token", "large-state"],
)
def test_against_the_twin(case, dtype, dense):
    compare_with_twin(kernel, twin, problem(**case, dense=dense, dtype=dtype), TOLERANCE[dtype])


@pytest.mark.slow
@given(
    B=st.integers(1, 3),
    L=st.integers(1, 50),
    H=st.integers(1, 3),
    N=st.integers(1, 12).map(lambda half: 2 * half),
    T=st.integers(1, 20),
    dense=st.booleans(),
    state=st.booleans(),
    resets=st.booleans(),
)
@settings(max_examples=12, deadline=None, derandomize=True)
def test_any_shape(B, L, H, N, T, dense, state, resets):
    if state or resets:
        L = -(-L // T) * T
    compare_with_twin(kernel, twin, problem(B, L, H, N, T, dense, state=state, resets=resets), 1e-5)


@pytest.mark.parametrize("dense", [False, True], ids=["diagonal", "dense"])
def test_strides(dense):
    inputs = problem(2, 32, 2, 16, 16, dense, state=True, resets=True)
    compare_with_twin(kernel, twin, [x if x.dtype == torch.bool else gapped(x) for x in inputs], 1e-5)


def test_empty():
    for B, H in ((0, 2), (2, 0)):
        u, *rest = problem(B, 16, H, 4, 8, True)
        y, final = kernel(u, *rest)
        assert y.shape == (B, 16, H)
        assert final.shape == (B, H, 4)
        gradients = torch.autograd.grad(y.sum() + final.sum(), [u, *rest[:4]])
        assert all((gradient == 0).all() for gradient in gradients)


def test_state_without_output():
    compare_with_twin(
        lambda *x: kernel(*x, has_output=False)[1],
        lambda *x: twin(*x, has_output=False)[1],
        problem(2, 32, 2, 6, 16, True, state=True),
        1e-5,
    )


def test_gradient_of_the_output_alone():
    inputs = problem(2, 32, 2, 6, 16, False, state=True)
    compare_with_twin(lambda *x: kernel(*x)[0], lambda *x: twin(*x)[0], inputs, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_activation(activation, dtype):
    """On the way out, and in the backward, which reads y from before it; the twin's is torch's own."""
    function = ACTIVATIONS[activation].function
    inputs = problem(2, 37, 2, 6, 16, True, dtype)
    compare_with_twin(
        lambda *x: kernel(*x, activation=activation),
        lambda *x: (lambda y, final: (function(y), final))(*twin(*x)),
        inputs,
        TOLERANCE[dtype],
    )
    plain = problem(2, 32, 2, 6, 16, False, dtype, state=True, resets=True)
    compare_with_twin(
        lambda *x: kernel(*x, activation=activation)[0],
        lambda u, *x: chunk_scan(u, ChunkOperators(*x[:4]), *x[4:], activation=activation)[0],
        plain,
        TOLERANCE[dtype],
    )


def test_activation_of_no_output_or_none():
    inputs = problem(2, 32, 2, 6, 16, True)
    run = partial(kernel, *inputs, has_output=False, activation="gelu")
    torch.testing.assert_close(run()[1], kernel(*inputs)[1], rtol=0, atol=0)
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(0 * run()[1].sum(), inputs[:1]))
    with pytest.raises(ValueError, match="activation is one of identity, gelu, silu, not 'tanh'"):
        kernel(*inputs, activation="tanh")


def test_output_is_a_view_of_rows_and_rows_are_not_copied():
    u, *rest = problem(2, 16, 3, 4, 8, False)
    y, _ = kernel(u, *rest)
    rows = triton_chunk_scan.to_rows(y)
    assert rows.shape == (3, 2, 16)
    assert rows.data_ptr() == y.data_ptr()
    torch.testing.assert_close(triton_chunk_scan.from_rows(rows), y.contiguous(), rtol=0, atol=0)


@pytest.mark.parametrize("size", [21, 32, 80])
def test_rows_hold_zeros_before_the_first_token(size):
    u = torch.randn(2, 21, 70)
    rows = triton_chunk_scan.to_rows(u, size)
    assert torch.equal(rows, F.pad(u.permute(2, 0, 1), (size - 21, 0)))
    assert torch.equal(triton_chunk_scan.from_rows(rows, 21), u)


# ---- segments: the rows of a tile that a small batch leaves empty are filled with time


@pytest.mark.parametrize("dense", [False, True], ids=["diagonal", "dense"])
@pytest.mark.parametrize(
    "case",
    [
        dict(B=1, L=256, H=2, N=6, T=4),  # 16 of 4 chunks
        dict(B=1, L=157, H=1, N=16, T=4),  # 40 chunks: 8 of 5, an odd number of them
        dict(B=3, L=191, H=1, N=10, T=4, state=False),  # 4 of 12
        dict(B=2, L=160, H=1, N=6, T=4, state=True, resets=True),
        dict(B=5, L=56, H=1, N=6, T=4, state=True),
    ],
    ids=["plain", "odd", "three-rows", "state-and-resets", "two-segments"],
)
def test_segments(case, dense, monkeypatch):
    counted, right = [], triton_chunk_scan.segments
    monkeypatch.setattr(triton_chunk_scan, "segments", lambda *sizes: counted.append(right(*sizes)) or counted[-1])
    inputs = problem(**case, dense=dense)
    compare_with_twin(kernel, twin, inputs, 1e-5)
    assert len(counted) == 2  # there and back
    assert min(counted) > 1
    compare_with_twin(
        lambda *x: kernel(*x, has_output=False)[1], lambda *x: twin(*x, has_output=False)[1], inputs, 1e-5
    )


@pytest.mark.parametrize("dense", [False, True], ids=["diagonal", "dense"])
def test_a_sequence_that_overflowed_is_alone_in_it(dense):
    """Its segments lie in one tile with those of others, which are linked at the same time."""
    u, *operators, state, _ = (None if x is None else x.detach() for x in problem(2, 256, 1, 6, 4, dense, state=True))
    alone = kernel(u[1:], *operators, state[1:], None)
    u[0, 100] = state[0, 0, 1] = float("inf")
    y, final = kernel(u, *operators, state, None)
    assert not final[0].isfinite().any()
    assert_close(y[1:], alone[0], 1e-6)
    assert_close(final[1:], alone[1], 1e-6)


def test_segments_linked_by_products_of_parts(monkeypatch):
    """As on NVIDIA's cards before Blackwell, where the parts are TF32: here all numbers have 24 bits."""
    monkeypatch.setattr(triton_chunk_scan, "link_precision", lambda family: "three parts")
    compare_with_twin(kernel, twin, problem(1, 164, 1, 16, 4, True, state=True), 1e-5)


@pytest.mark.parametrize("dense", [False, True], ids=["diagonal", "dense"])
def test_segments_in_bfloat16(dense):
    compare_with_twin(kernel, twin, problem(1, 99, 2, 6, 4, dense, torch.bfloat16), TOLERANCE[torch.bfloat16])


def test_segments_fill_a_tile():
    """At the recipe's length in bfloat16, chunks of 64; the chain of chunks is a segment's."""
    found = {B: kernel_limits.segments("cuda", B, 128, 64, True) for B in range(1, 34)}
    assert [found[B] for B in (1, 2, 3, 4, 5, 8, 9, 16, 33)] == [16, 8, 4, 4, 2, 2, 1, 1, 1]
    assert 128 // found[1] <= 16
    assert kernel_limits.segments("cuda", 1, 127, 64, True) == 1
    assert kernel_limits.chunks_in_a_row("cuda", 1, 127 * 64, 64, 64, True, from_zero=True) == 128
    assert kernel_limits.chunks_in_a_row("cuda", 1, 127 * 64, 64, 64, True, from_zero=False) == 127


@pytest.mark.parametrize("length", [1, 5, 16])
@pytest.mark.parametrize("dense", [False, True], ids=["diagonal", "dense"])
def test_what_is_left_of_a_sequence(dense, length):
    """A chunk of any length, from a state, in a kernel that is compiled once for all lengths."""
    inputs = problem(2, length, 2, 6, length, dense, state=True)

    def left(u, taps, emit, inject, carry, state, keep):
        return chunk_scan(u, ChunkOperators(taps, emit, inject, carry), state, keep, rest=True, run_kernel=True)

    compare_with_twin(left, twin, inputs, 1e-5)


def test_operators_made_again_in_the_backward():
    u, *operators, state, _ = problem(2, 32, 2, 6, 16, True, state=True)

    def run(scan):
        y, final = scan()
        return [y, final, *torch.autograd.grad([y.square().sum() + final.sum()], [u, *operators, state])]

    def make(*leaves):
        return ChunkOperators(*(2 * x for x in leaves))

    made = run(lambda: chunk_scan(u, make, state, None, tuple(operators), run_kernel=True))
    given = run(lambda: chunk_scan(u, make(*operators), state))
    for ours, expected in zip(made, given, strict=True):
        assert_close(ours, expected, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dense", [False, True], ids=["diagonal", "dense"])
def test_opcheck(dense):
    """Schema, fake tensors, and a trace with dynamic shapes. Gradients are wired once, around the operators."""
    inputs = [x.detach() for x in problem(2, 32, 2, 6, 16, dense, state=True, resets=True)]
    u, *operators, state, keep = inputs
    rows = u.permute(2, 0, 1).contiguous()
    torch.library.opcheck(triton_chunk_scan.scan, (rows, *operators, state, keep, True, True, "gelu", False))
    torch.library.opcheck(triton_chunk_scan.scan, (rows, *operators, None, None, True, True, "identity", True))
    torch.library.opcheck(triton_chunk_scan.turn_to_rows, (u, 40, 3))
    torch.library.opcheck(triton_chunk_scan.turn_from_rows, (rows, 20, 3))
    _, final, starts, _ = triton_chunk_scan.scan(rows, *operators, state, keep, True, True, "identity", False)
    torch.library.opcheck(triton_chunk_scan.scan_backward, (rows, final, rows, starts, keep, *operators, False))
    long = torch.cat([rows] * 4, -1)  # in segments
    torch.library.opcheck(triton_chunk_scan.scan, (long, *operators, state, None, True, True, "identity", False))


# ---- the self-check, in the interpreter instead of on a GPU


@pytest.mark.slow
@pytest.mark.parametrize(
    ("N", "problem"),
    [
        (64, {"T": 16}),  # of every kind, as on a GPU
        (2, {"dtype": torch.float32, "dense": False, "T": 16}),
        (24, {"dtype": torch.bfloat16, "dense": True, "T": 24}),
        (128, {"dtype": torch.float32, "dense": True}),
    ],
)
def test_self_check_passes(N, problem):
    cases = partial(triton_chunk_scan.self_check_cases, N=N, **problem)
    cause, worst = kernels_s4.self_check(cases, torch.device("cpu"))
    assert cause is None
    assert 0 < worst < 1


SMALL_CASES = partial(triton_chunk_scan.self_check_cases, dtype=torch.bfloat16, N=4, dense=False, T=4, documents=False)


def test_self_check_of_one_problem():
    cases = partial(triton_chunk_scan.self_check_cases, torch.device("cpu"), torch.float32, 6, True)
    both = [f"dense float32 of 6 states in chunks of 32, {way}" for way in ("over documents, from a state", "gelu")]
    assert [case.label for case in cases()] == [name + of for name in both for of in ("", ", in one segment")]
    named = "dense float32 of 6 states in chunks of 16, from a state, silu, without gradients"
    of = "", ", its last state alone", ", in one segment", ", in one segment, its last state alone", ", what is left"
    assert [case.label for case in cases(16, False, False, True, "silu")] == [named + more for more in of]


@pytest.mark.parametrize(("gradient", "from_state"), [(True, False), (False, True)], ids=["training", "inference"])
def test_self_check_of_what_a_model_asks(gradient, from_state):
    """The problems that `execution.decide` names."""
    problem = torch.bfloat16, 4, False, 4, gradient, False, from_state, "silu"
    cause, worst = kernels_s4.self_check(
        lambda device: triton_chunk_scan.self_check_cases(device, *problem), torch.device("cpu")
    )
    assert cause is None
    assert 0 < worst < 1


@pytest.mark.parametrize(("fault", "word"), [(3, "differs by 2, more than 0.02"), (None, "not the same")])
def test_self_check_refuses_a_broken_kernel(monkeypatch, fault, word):
    right = triton_chunk_scan.launch_scan

    def wrong(x, y, *rest, **kwargs):
        right(x, y, *rest, **kwargs)
        if fault is None:
            y[..., -1] += torch.rand(()).to(y.dtype)  # another number every time
        else:
            y *= fault

    monkeypatch.setattr(triton_chunk_scan, "launch_scan", wrong)
    cause, worst = kernels_s4.self_check(SMALL_CASES, torch.device("cpu"))
    assert word in cause
    assert worst == float("inf")


def test_self_check_reports_a_kernel_that_raises(monkeypatch):
    def raises(*args, **kwargs):
        raise RuntimeError("PassManager::run\nfailed")

    monkeypatch.setattr(triton_chunk_scan, "launch_gram", raises)
    cause, _ = kernels_s4.self_check(SMALL_CASES, torch.device("cpu"))
    assert cause == "its self-check failed (RuntimeError: PassManager::run failed)"
