"""Whole models with every kernel that there is, in the interpreter, against the same models in plain PyTorch."""

from functools import partial

import pytest
import torch
from kernel_checks import assert_close

from ssm_lm import S4Config, S4ForCausalLM
from ssm_lm.modeling import triton_chunk_scan
from ssm_lm.modeling.ssm import S4, S4D


@pytest.fixture
def launches(monkeypatch):
    """The scans that ran in the kernel: (dtype, reverse, activation)."""
    seen, right = [], triton_chunk_scan.launch_scan

    def counted(x, *rest, reverse, activation="identity", **keys):
        seen.append((x.dtype, reverse, activation))
        right(x, *rest, reverse=reverse, activation=activation, **keys)

    monkeypatch.setattr(triton_chunk_scan, "launch_scan", counted)
    return seen


def build(ssm, **keys):
    torch.manual_seed(0)
    sizes = dict(vocab_size=19, hidden_size=6, num_hidden_layers=1, state_size=8, chunk_size=8, intermediate_size=8)
    return S4ForCausalLM(S4Config(**sizes, ssm=ssm, **keys))


def run(model, tokens):
    """Logits, gradients, and what it generates with its probabilities."""
    output = model(tokens, labels=tokens)
    gradients = torch.autograd.grad(output.loss, list(model.parameters()))
    model.eval()
    generated = model.generate(
        tokens[:, :34], max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_scores=True
    )
    return output.logits, gradients, generated.sequences, torch.stack(generated.scores)


@pytest.mark.parametrize("ssm", ["s4", "s4d", "s5"])
def test_model(ssm, launches, monkeypatch):
    model, tokens = build(ssm), torch.randint(0, 19, (2, 37))  # more tokens than go through a cache one by one
    monkeypatch.setenv("SSM_LM_KERNELS", "torch")
    logits, gradients, sequences, scores = run(model, tokens)
    assert not launches
    monkeypatch.setenv("SSM_LM_KERNELS", "triton")
    ours = run(model.train(), tokens)
    if ssm != "s5":
        assert {launch[1:] for launch in launches} == {(False, "gelu"), (True, "identity")}
    assert_close(ours[0], logits, 1e-5)
    for (name, _), actual, expected in zip(model.named_parameters(), ours[1], gradients, strict=True):
        assert_close(actual, expected, 2e-5, name)
    assert (ours[2] == sequences).all()
    assert_close(ours[3], scores, 1e-5)


def test_model_in_bfloat16(launches):
    """The kernel reads and writes bfloat16, where the PyTorch path casts: they agree as bfloat16 does."""
    check_training_step(launches, torch.bfloat16, autocast=False)


def test_a_training_step_under_autocast(launches):
    """As `bf16: true` is: the norm before the scan returns float32, and the kernel is launched on bfloat16."""
    check_training_step(launches, torch.float32, autocast=True)


def check_training_step(launches, dtype, autocast):
    """The loss and all gradients, by the kernels and by PyTorch."""
    tokens, results = torch.randint(0, 19, (2, 21)), []
    for kernels in ("torch", "triton"):
        model = build("s4", kernels=kernels).to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(tokens, labels=tokens).loss
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    assert {dtype for dtype, *_ in launches} == {torch.bfloat16}
    for (name, _), actual, expected in zip(
        [("loss", None), *model.named_parameters()], results[1], results[0], strict=True
    ):
        assert_close(actual, expected, 6e-2, name)


@pytest.fixture
def turned(monkeypatch):
    """What was turned to rows, and from them, by launches of their own."""
    seen = []
    for name in ("turn_to_rows", "turn_from_rows"):
        right = getattr(triton_chunk_scan, name)
        counted = partial(lambda name, right, *x: seen.append(name) or right(*x), name, right)
        monkeypatch.setattr(triton_chunk_scan, name, counted)
    return seen


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_the_norm_of_a_training_step_turns_what_is_scanned(turned, autocast):
    """In whole chunks, without a mask, documents or a cache; the gradient of what is made of it lies in rows anyway."""
    tokens, results = torch.randint(0, 19, (2, 32)), []
    for kernels in ("torch", "triton"):
        model = build("s4d", kernels=kernels, arch="ssm")
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(tokens, labels=tokens, use_cache=False).loss
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for actual, expected in zip(*results, strict=True):
        assert_close(expected, actual, 6e-2 if autocast else 2e-5)
    assert not turned
    for keys in (
        {"input_ids": tokens, "attention_mask": (torch.arange(32) > 3).expand(2, -1)},
        {"input_ids": tokens, "position_ids": torch.arange(16).repeat(2, 2)},
        {"input_ids": tokens, "use_cache": True},
        {"input_ids": tokens[:, :31]},
    ):
        turned.clear()
        model(**{"use_cache": False} | keys).logits.sum().backward()
        assert turned[0] == "turn_to_rows", keys
        assert turned[-1] == "turn_from_rows", keys


@pytest.mark.parametrize("layer_class", [S4, S4D])
@pytest.mark.parametrize("documents", [False, True], ids=["one", "packed"])
def test_layer_with_state_and_documents(layer_class, documents, launches):
    """A length that is no whole number of chunks, chunks longer than a float32 kernel takes, and a state to go on
    from.
    """
    torch.manual_seed(0)
    layer = layer_class(3, 6, chunk_size=48)
    u, state = torch.randn(2, 101, 3, requires_grad=True), torch.randn(2, 3, 6, requires_grad=True)
    seq_idx = torch.tensor([0] * 30 + [1] * 60 + [-1] * 11).expand(2, -1) if documents else None
    results = []
    for kernels in ("torch", "triton"):
        layer.kernels = kernels
        y, final = layer(u, mode="chunk", initial_state=state, seq_idx=seq_idx)
        inputs = [u, state, *layer.parameters()]
        gradients = torch.autograd.grad(y.square().sum() + final.square().sum(), inputs)
        results.append([y, final, *gradients])
    assert launches
    for actual, expected in zip(*reversed(results), strict=True):
        assert_close(actual, expected, 2e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_layer_keeps_the_dtype(dtype, launches):
    """The kernel has no float16: such a sequence is cast to float32, and back."""
    torch.manual_seed(0)
    layer, u, activation = S4(3, 6, chunk_size=8), torch.randn(2, 21, 3).to(dtype), torch.nn.SiLU()
    results = []
    for kernels in ("torch", "triton"):
        layer.kernels = kernels
        y, state = layer(u, activation=activation)
        assert (y.dtype, state.dtype) == (dtype, torch.float32)
        results.append([y, state, *torch.autograd.grad(y.float().square().sum(), list(layer.parameters()))])
    assert {launch[2] for launch in launches if not launch[1]} == {"silu"}
    for actual, expected in zip(*reversed(results), strict=True):
        assert_close(actual, expected, 1e-5 if dtype == torch.float32 else 2e-2)


def test_a_large_dense_state_in_short_chunks(launches):
    """Above 64 numbers, a float32 kernel with a dense carry takes chunks of 16."""
    torch.manual_seed(0)
    layer, u = S4(2, 72, chunk_size=64), torch.randn(1, 70, 2)
    results = []
    for kernels in ("torch", "triton"):
        layer.kernels = kernels
        y, state = layer(u, mode="chunk")
        results.append([y, state, *torch.autograd.grad(y.square().sum(), list(layer.parameters()))])
    assert launches
    for actual, expected in zip(*reversed(results), strict=True):
        assert_close(actual, expected, 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ssm", "mode"), [("s4d", "chunk"), ("s5", "chunk"), ("ssd", "chunk"), ("s4", "fft"), ("s4d", "fft")]
)
def test_compiled_model(ssm, mode, launches):
    """torch.compile traces through the operators with fake tensors, in one graph, forward and backward. By fft each has
    two: its convolution's kernel, and the chunk scan for the states.
    """
    keys = {"arch": ["gated", "swiglu"]} if ssm == "ssd" else {}
    model, tokens = build(ssm, kernels="triton", mode=mode, **keys), torch.randint(0, 19, (2, 16))
    expected = model(tokens).logits
    gradients = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
    launches.clear()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    logits = compiled(tokens).logits
    assert_close(logits, expected, 1e-5)
    for actual, wanted in zip(
        torch.autograd.grad(logits.square().sum(), list(model.parameters())), gradients, strict=True
    ):
        assert_close(actual, wanted, 1e-5)
    assert len(launches) == (
        0 if ssm in ("s5", "ssd") else 4
    )  # two state spaces, there and back; by fft, for their states
