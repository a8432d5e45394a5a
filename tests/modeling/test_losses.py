"""The loss without logits: equal to the plain one in value and gradient, and as small as it says."""

import sys
import types

import pytest
import torch
from tiny import checkpoint_activations, tiny_model
from torch.nn import functional as F
from transformers.loss.loss_utils import ForCausalLMLoss

from ssm_lm.modeling import losses
from ssm_lm.modeling.losses import LanguageModelHead, average, causal_targets, linear_cross_entropy


def inputs(tokens=37, width=12, vocabulary=50, dtype=torch.float64, bias=False):
    generator = torch.Generator().manual_seed(0)
    shapes = [(tokens, width), (vocabulary, width), (vocabulary,)][: 3 if bias else 2]
    tensors = [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    targets[::5] = -100
    return tensors, targets


@pytest.mark.parametrize("chunk_size", [1, 7, 37, 100, None])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_value_and_gradients_are_those_of_the_plain_loss(chunk_size, bias, dtype, tolerance):
    tensors, targets = inputs(dtype=dtype, bias=bias)
    expected = F.cross_entropy(F.linear(*tensors), targets, reduction="sum") / 29
    wanted = torch.autograd.grad(expected, tensors)
    hidden, weight, *rest = tensors
    ours = linear_cross_entropy(hidden, weight, targets, *rest, chunk_size=chunk_size) / 29
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=0)
    for got, want in zip(torch.autograd.grad(ours, tensors), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def test_gradcheck():
    (hidden, weight, bias), targets = inputs(tokens=6, width=3, vocabulary=5, bias=True)
    assert torch.autograd.gradcheck(lambda h, w, b: linear_cross_entropy(h, w, targets, b, 4), (hidden, weight, bias))


def test_logits_of_any_size_do_not_overflow():
    (hidden, weight), targets = inputs(dtype=torch.float32)
    loss = linear_cross_entropy(hidden * 1e4, weight, targets, chunk_size=8)
    expected = F.cross_entropy(F.linear(hidden * 1e4, weight), targets, reduction="sum")
    torch.testing.assert_close(loss, expected)


def test_only_the_gradients_that_are_wanted():
    (hidden, weight), targets = inputs()
    loss = linear_cross_entropy(hidden, weight.detach(), targets, chunk_size=8)
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert gradient.shape == hidden.shape
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, targets).requires_grad


def test_bfloat16_sums_in_float32():
    (hidden, weight), targets = inputs(tokens=400, dtype=torch.float32)
    with torch.no_grad():
        hidden.copy_(hidden.bfloat16())
        weight.copy_(weight.bfloat16())
    exact = linear_cross_entropy(hidden, weight, targets)
    half = linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), targets, chunk_size=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = linear_cross_entropy(hidden, weight, targets, chunk_size=3)
    assert half.dtype == autocast.dtype == torch.float32
    torch.testing.assert_close(half, autocast)
    torch.testing.assert_close(half, exact, rtol=5e-3, atol=0)
    wanted, got = (torch.autograd.grad(loss, weight)[0] for loss in (exact, autocast))
    assert got.dtype == torch.float32
    assert ((got - wanted).norm() / wanted.norm()) < 1e-2


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_the_logits_of_all_tokens_never_exist():
    (hidden, weight), targets = inputs(tokens=64, width=8, vocabulary=512)
    with LargestTensor() as seen:
        linear_cross_entropy(hidden, weight, targets, chunk_size=4).backward()
    assert seen.elements == 512 * 8  # the weights; a chunk of logits is half of that
    with LargestTensor() as seen:
        F.cross_entropy(F.linear(hidden, weight), targets).backward()
    assert seen.elements == 512 * 64


def test_targets_and_average_are_those_of_transformers():
    logits = torch.randn(2, 6, 9, dtype=torch.float64).float()
    labels = torch.randint(0, 9, (2, 6))
    labels[0, 2] = labels[1, 0] = -100
    for shift_labels in (None, labels):
        for items in (None, 5, torch.tensor(5)):
            targets = causal_targets(labels, shift_labels)
            summed = F.cross_entropy(logits.flatten(0, 1), targets, reduction="sum")
            expected = ForCausalLMLoss(logits, labels, 9, num_items_in_batch=items, shift_labels=shift_labels)
            torch.testing.assert_close(average(summed, targets, items), expected)


# ---- in the model


def model(**kw):
    return tiny_model(**({"num_hidden_layers": 1, "initializer_range": 0.2} | kw)).train()


@pytest.mark.parametrize("kwargs", [{}, {"num_items_in_batch": 7}, {"shift_labels": True}])
def test_training_with_a_chunk_size_gives_the_same_loss_and_gradients_and_no_logits(kwargs):
    plain, chunked = model().train(), model(loss_chunk_size=5).train()
    ids = torch.randint(0, 60, (2, 12))
    labels = ids.clone()
    labels[0, :4] = -100
    if "shift_labels" in kwargs:
        kwargs = {"shift_labels": labels}
    a, b = plain(ids, labels=labels, **kwargs), chunked(ids, labels=labels, **kwargs)
    assert a.logits.shape == (2, 12, 60)
    assert b.logits is None
    torch.testing.assert_close(a.loss, b.loss, rtol=1e-6, atol=0)
    a.loss.backward()
    b.loss.backward()
    for (name, p), q in zip(plain.named_parameters(), chunked.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-6, msg=name)


def test_who_gets_logits():
    ids = torch.randint(0, 60, (1, 8))
    chunked = model(loss_chunk_size=5)
    assert chunked.eval()(ids, labels=ids).logits is not None
    assert chunked.train()(ids).logits is not None
    assert chunked(ids, labels=ids, skip_logits=False).logits is not None
    plain = model().eval()
    whole = plain(ids, labels=ids)
    alone = plain(ids, labels=ids, skip_logits=True)
    assert alone.logits is None
    torch.testing.assert_close(alone.loss, whole.loss)
    with pytest.raises(ValueError, match="skip_logits"):
        plain(ids, skip_logits=True)


def test_a_head_that_something_else_has_replaced():
    ids = torch.randint(0, 60, (2, 12))
    m = model(loss_chunk_size=5).train()
    m.lm_head = torch.nn.Linear(16, 60)
    out = m(ids, labels=ids)
    assert out.logits is None
    torch.testing.assert_close(out.loss, m(ids, labels=ids, skip_logits=False).loss)


def test_after_a_resize():
    ids = torch.randint(0, 60, (2, 12))
    m = model(loss_chunk_size=5).train()
    m.resize_token_embeddings(64)
    out = m(ids, labels=ids)
    assert out.logits is None
    torch.testing.assert_close(out.loss, m(ids, labels=ids, skip_logits=False).loss)


def test_gradient_checkpointing_goes_with_it():
    ids = torch.randint(0, 60, (2, 12))
    gradients = []
    for checkpointing in (False, True):
        m = model(loss_chunk_size=5).train()
        if checkpointing:
            checkpoint_activations(m)
        m(ids, labels=ids).loss.backward()
        gradients.append(m.lm_head.weight.grad)
    torch.testing.assert_close(*gradients)


def test_liger_runs_where_it_is_installed_and_the_tensors_are_on_a_gpu(monkeypatch):
    calls = []

    def stand_in(input, weight, target, bias=None, ignore_index=0, reduction="mean"):
        calls.append((input.dtype, weight.dtype, ignore_index, reduction))
        return F.cross_entropy(F.linear(input, weight, bias), target, ignore_index=ignore_index, reduction=reduction)

    package = types.ModuleType("liger_kernel.transformers.functional")
    package.liger_fused_linear_cross_entropy = stand_in
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, package.__name__, package)
    assert losses._liger() is stand_in

    (hidden, weight), targets = inputs(dtype=torch.float32)
    expected = linear_cross_entropy(hidden, weight, targets)
    assert calls == []  # not on a CPU
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, targets), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        linear_cross_entropy(hidden, weight, targets)
    assert calls == [(torch.float32, torch.float32, -100, "sum"), (torch.bfloat16, torch.bfloat16, -100, "sum")]


def test_a_liger_that_cannot_run_is_passed_over(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    assert losses._liger() is None


def test_the_head_is_still_a_linear_layer():
    head = LanguageModelHead(4, 9, bias=False)
    assert isinstance(head, torch.nn.Linear)
    assert list(head.state_dict()) == ["weight"]
    hidden = torch.randn(2, 3, 4)
    assert torch.equal(head(hidden), F.linear(hidden, head.weight))
