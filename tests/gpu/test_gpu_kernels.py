"""Every kernel through the layer that calls it, at real sizes, against the same layer in plain PyTorch and float64."""

import copy
import itertools

import pytest
import torch

from ssm_lm.modeling.documents import find_documents
from ssm_lm.modeling.kernels_s4 import kernel_status, use_kernel
from ssm_lm.modeling.losses import linear_cross_entropy
from ssm_lm.modeling.norms_and_dropout import RMSNorm
from ssm_lm.modeling.short_convolution import ShortConvolution
from ssm_lm.modeling.ssm import LAYERS

# of outputs and of gradients. A bfloat16 input has 8 bits; its gradients are sums of many rounded products
TOLERANCES = {torch.float32: (2e-5, 2e-4), torch.bfloat16: (1e-2, 3e-2)}


KINDS = [
    *(("s4", "legs"), ("s4", "legt"), ("s4d", "lin"), ("s5", "legs")),  # legt: a low-rank part of rank 2
    *(("ssd", "lin"), ("ssd selective", "lin")),
]


def layer_and_twin(ssm: str, place, init="legs"):
    """A layer, and the same parameters in plain PyTorch and float64."""
    name, *selective = ssm.split()
    layer = LAYERS[name](place.H, 64, init=init, **({"selective": True} if selective else {})).to(place.device)
    twin = copy.deepcopy(layer).double()
    twin.kernels = "torch"
    return layer, twin


@pytest.mark.parametrize(("ssm", "init"), KINDS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", ["chunk from zero", "chunk from a state", "chunk over documents", "fft from a state"])
def test_a_sequence_and_its_gradients(place, ssm, init, dtype, case, assert_close, request):
    on_cpu = place.device == "cpu"
    near_enough = on_cpu and dtype == torch.bfloat16
    if init == "legt" and case.startswith("fft") and not near_enough:
        reason = (
            "in float32 the Cauchy product's gradient of log_dt for legt is off by some per cent; the scan's is right"
        )
        request.applymarker(pytest.mark.xfail(reason=reason, strict=on_cpu))
    layer, twin = layer_and_twin(ssm, place, init)
    mode = case.split()[0]
    if mode == "fft" and not layer.is_time_invariant:
        pytest.skip("mode fft is for time-invariant layers")
    length = place.L + 5  # no whole number of chunks
    u = torch.randn(place.B, length, layer.input_size, device=place.device).to(dtype)
    state = torch.randn(layer.zero_state(place.B).shape, device=place.device) if "state" in case else None
    documents = None
    if "documents" in case:
        documents = (torch.arange(length, device=place.device) // (length // 3 + 1)).expand(place.B, -1)
    if mode == "chunk":
        assert layer.decide(u, mode, state, documents=documents is not None).kernel == place.has_kernels
    results, weights = [], None
    for one, signal, first in ((layer, u, state), (twin, u.double(), None if state is None else state.double())):
        signal = signal.clone().requires_grad_()
        first = None if first is None else first.clone().requires_grad_()
        y, final = one(signal, mode=mode, initial_state=first, seq_idx=documents)
        weights = weights or (torch.randn_like(y), torch.randn_like(final))
        loss = (y * weights[0].to(y.dtype)).sum() + (final * weights[1].to(final.dtype)).sum()
        inputs = {"u": signal, **({} if first is None else {"state": first}), **dict(one.named_parameters())}
        gradients = torch.autograd.grad(loss, list(inputs.values()))
        results.append(({"y": y, "final state": final}, dict(zip(inputs, gradients, strict=True))))
    (outputs, gradients), (expected, expected_gradients) = results
    near, gradients_near = TOLERANCES[dtype]
    for name in expected:
        assert_close(outputs[name], expected[name], near, name)
    for name in expected_gradients:
        assert_close(gradients[name], expected_gradients[name], gradients_near, f"gradient of {name}")


@pytest.mark.parametrize("ssm", ["s4", "s4d"])
def test_convolution_kernel_and_its_gradients(place, ssm, assert_close):
    """The Cauchy and the Vandermonde product, which make K for the mode fft."""
    layer, twin = layer_and_twin(ssm, place)
    ours, expected = layer.kernel(place.L), twin.kernel(place.L)
    assert_close(ours, expected, 2e-5)
    weights = torch.randn_like(ours)
    names = [name for name, _ in layer.named_parameters() if name != "D"]
    gradients, expected_gradients = (
        torch.autograd.grad(K, [dict(one.named_parameters())[name] for name in names], weights.to(K.dtype))
        for one, K in ((layer, ours), (twin, expected))
    )
    for name, a, b in zip(names, gradients, expected_gradients, strict=True):
        assert_close(a, b, 5e-4, f"gradient of {name}")


@pytest.mark.parametrize(("ssm", "init"), [kind for kind in KINDS if kind != ("s4", "legt")])
@torch.no_grad()
def test_single_steps(place, ssm, init, assert_close):
    layer, twin = layer_and_twin(ssm, place, init)
    u = torch.randn(place.B, 20, layer.input_size, device=place.device)
    state = torch.randn(layer.zero_state(place.B).shape, device=place.device)
    assert layer.decide(u, "recurrent", state).kernel == place.has_kernels
    y, final = layer(u, mode="recurrent", initial_state=state)
    expected, expected_final = twin(u.double(), mode="recurrent", initial_state=state.double())
    assert_close(y, expected, 2e-5)
    assert_close(final, expected_final, 2e-5, "final state")


@pytest.mark.parametrize("activation", ["silu", "identity"])
@pytest.mark.parametrize("documents", [False, True], ids=["one", "packed"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=["float32", "bfloat16"])
def test_short_convolution_and_its_gradients(place, dtype, documents, activation, assert_close):
    """Over part of a wider tensor, from a tail and with one."""
    layer = ShortConvolution(place.H, 4).to(place.device)
    twin = copy.deepcopy(layer).double()
    twin.kernels = "torch"
    length = place.L + 5
    x = torch.randn(place.B, length, place.H + 16, device=place.device).to(dtype)
    tail, seq_idx = layer.zero_state(place.B).normal_(), None
    if documents:
        numbers = torch.arange(length, device=place.device) // (length // 3 + 1)
        seq_idx = find_documents(torch.where(numbers == 1, -1, numbers).expand(place.B, -1), 64)
    results, weights = [], None
    for one, signal, first in ((layer, x, tail), (twin, x.double(), tail.double())):
        signal, first = signal.clone().requires_grad_(), first.clone().requires_grad_()
        outputs = one(signal[..., : place.H], initial_state=first, seq_idx=seq_idx, activation=activation)
        weights = weights or [torch.randn_like(part) for part in outputs]
        inputs = [signal, first, *one.parameters()]
        of_outputs = [w.to(part.dtype) for w, part in zip(weights, outputs, strict=True)]
        gradients = torch.autograd.grad(outputs, inputs, of_outputs)
        results.append((outputs, gradients))
    near, gradients_near = TOLERANCES[dtype]
    for tolerance, found, expected in zip((near, gradients_near), *results, strict=True):
        for ours, theirs in zip(found, expected, strict=True):
            assert_close(ours, theirs, tolerance)


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=["float32", "bfloat16"])
def test_the_loss_of_a_head_and_its_gradients(place, dtype, bias, assert_close):
    """Of a vocabulary that is no multiple of 16, some targets of which do not count."""
    entries, results = 5003, []
    hidden, weight = (torch.randn(n, place.H, device=place.device).to(dtype) for n in (place.L, entries))
    of_bias = torch.randn(entries, device=place.device)
    targets = torch.randint(-3, entries, (place.L,), device=place.device)
    targets[targets < 0] = -100
    for precision, kernels in ((dtype, "auto"), (torch.float64, "torch")):
        leaves = [x.to(precision).requires_grad_() for x in (hidden, weight)]
        leaves += [of_bias.to(torch.promote_types(precision, torch.float32)).requires_grad_()] if bias else []
        loss = linear_cross_entropy(*leaves[:2], targets, leaves[2] if bias else None, kernels=kernels)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    near, gradients_near = TOLERANCES[dtype]
    for i, (ours, theirs) in enumerate(zip(*results, strict=True)):
        assert_close(ours, theirs, gradients_near if i else near)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=["float32", "bfloat16"])
def test_rms_norm_and_its_gradients(place, dtype, gated, assert_close):
    """The gate is part of a wider tensor; without one, x goes past the norm too."""
    norm = RMSNorm(place.H, eps=1e-5).to(place.device)
    norm.weight.data.normal_()
    twin = copy.deepcopy(norm).double()
    twin.kernels = "torch"
    x, wide = (torch.randn(place.B, place.L, size, device=place.device) for size in (place.H, place.H + 16))
    weight, results = torch.randn_like(x), []
    for one, precision in ((norm, dtype), (twin, torch.float64)):
        leaves = [part.to(dtype).to(precision).requires_grad_() for part in (x, wide)[: 1 + gated]]
        y, past = one(*leaves[:1], with_input=True) if not gated else (one(leaves[0], leaves[1][..., 16:]), 0)
        y = y + past * weight.to(y.dtype)
        results.append((y, *torch.autograd.grad(y, [*leaves, one.weight], weight.to(y.dtype))))
    near, gradients_near = TOLERANCES[dtype]
    for i, (ours, theirs) in enumerate(zip(*results, strict=True)):
        assert_close(ours, theirs, gradients_near if i else near)


def test_self_checks(place):
    """On a card every kernel that can run there has passed; elsewhere the report says what runs instead."""
    if not place.has_kernels and torch.cuda.is_available():
        pytest.skip("the report is of the machine's GPU")
    runs = "Triton on cuda" if place.has_kernels else "PyTorch: "
    report = kernel_status()
    assert report
    assert {name: line for name, line in report.items() if not line.startswith(runs)} == {}
    where = torch.empty(0, device=place.device)
    for problem in itertools.product(TOLERANCES, (16, 32, 64, 128), (False, True)):  # each is machine code of its own
        assert use_kernel("chunk_scan", where, problem=problem) == place.has_kernels, problem
    for name, rank in itertools.product(("dplr_discretization", "dplr_operators"), (1, 2)):
        assert use_kernel(name, where, problem=(64, rank)) == place.has_kernels, (name, rank)
    assert use_kernel("diagonal_discretization", where, problem=(2,)) == place.has_kernels  # S5's states, one by one
    for name, N in itertools.product(("diagonal_discretization", "diagonal_operators"), (64, 128)):
        assert use_kernel(name, where, problem=(N,)) == place.has_kernels, (name, N)
    for dtype in TOLERANCES:
        assert use_kernel("ssd_scan", where, problem=(dtype, 64, 64)) == place.has_kernels, dtype
        assert use_kernel("ssd_system", where, problem=(dtype, torch.float32, 64)) == place.has_kernels, dtype
        for activation, documents in itertools.product(("silu", "identity"), (False, True)):
            problem = (dtype, torch.float32, 4, activation, documents, True)
            assert use_kernel("short_convolution", where, problem=problem) == place.has_kernels, problem
        for of_bias, entries in ((None, 50257), (None, 32768), (torch.float32, 20003)):
            problem = dtype, of_bias, entries
            assert use_kernel("cross_entropy", where, problem=problem) == place.has_kernels, problem
        for out, channels in ((dtype, 1024), (torch.bfloat16, 768)):
            problem = dtype, torch.float32, out, channels
            for turned in (False, True):
                assert use_kernel("layer_norm", where, problem=(*problem, turned)) == place.has_kernels, problem
            for drops in (False, True):
                problem = "gated", dtype, out, channels, drops
                assert use_kernel("dropout", where, problem=problem) == place.has_kernels, problem
            of_gates = [("swiglu", out, drops) for drops in (False, True)]
            for problem in (("activated", out, "gelu"), ("added", dtype, out), *of_gates):
                assert use_kernel("dropout", where, problem=problem) == place.has_kernels, problem
        for out, channels, gated in ((dtype, 1536, True), (torch.bfloat16, 768, False)):
            problem = dtype, torch.float32, out, channels, gated, not gated
            assert use_kernel("rms_norm", where, problem=problem) == place.has_kernels, problem
