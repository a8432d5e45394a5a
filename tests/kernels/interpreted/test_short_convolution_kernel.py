"""The short convolution, interpreted, forward and backward, against its twin in float64; models that train on it."""

import pytest
import torch
from kernel_checks import assert_close, assert_passes, assert_the_same_bits_again, compare_with_twin, gapped
from torch.library import opcheck

from ssm_lm import S4Config, S4ForCausalLM
from ssm_lm.modeling import triton_short_convolution as module
from ssm_lm.modeling.kernel_launch import in_rows
from ssm_lm.modeling.short_convolution import ShortConvolution
from ssm_lm.modeling.short_taps import convolve_taps
from ssm_lm.modeling.triton_short_convolution import (
    convolve_tokens,
    convolve_tokens_backward,
    self_check_cases,
    short_convolution,
)


def problem(B, L, C, K, documents=False, tail=True, dtype=torch.float32, weights=torch.float32):
    """u, weight, bias, tail, begins, seq_idx; every third document is padding, and one number comes twice."""
    u, weight, bias = torch.randn(B, L, C).to(dtype), torch.randn(C, K).to(weights), torch.randn(C).to(weights)
    begins = seq_idx = None
    if documents:
        seq_idx = (torch.rand(B, L) < 0.3).cumsum(1) % 3 - 1
        begins = torch.nn.functional.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))
    tail = torch.randn(B, K - 1, C).requires_grad_() if tail else None
    return *(x.requires_grad_() for x in (u, weight, bias)), tail, begins, seq_idx


def compare(inputs, activation, tolerance=1e-5):
    compare_with_twin(
        lambda *x: short_convolution(*x, activation), lambda *x: convolve_taps(*x, activation), inputs, tolerance
    )


@pytest.mark.parametrize(
    ("B", "L", "K", "documents", "tail", "activation"),
    [
        (1, 1, 4, False, True, "silu"),  # a token of decoding
        (2, 2, 4, True, True, "silu"),  # fewer than the tail
        (1, 0, 3, False, True, "identity"),  # none
        (2, 13, 4, True, True, "silu"),
        (1, 70, 4, True, False, "silu"),  # two programs a row
        (1, 67, 4, False, False, "identity"),
        (3, 9, 3, True, True, "identity"),
        (2, 11, 3, False, False, "silu"),
        (2, 9, 2, True, True, "identity"),
        (2, 10, 2, False, True, "silu"),
        (2, 9, 1, True, True, "silu"),
        (1, 5, 1, False, False, "identity"),
    ],
)
def test_taps(B, L, K, documents, tail, activation):
    inputs = problem(B, L, 5, K, documents, tail)
    if L == 0 or K == 1:  # where there are no inputs, or no tail, both have no gradient of it
        inputs = *inputs[:3], inputs[3] if K > 1 or not tail else inputs[3].detach(), *inputs[4:]
    compare(inputs, activation)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)], ids=str)
def test_half_precision(dtype, tolerance):
    """The signal alone, and weights too. What is summed is float32: the taps of the twin in `dtype` are less exact."""
    compare(problem(2, 13, 3, 4, True, dtype=dtype), "silu", tolerance)
    compare(problem(1, 9, 3, 3, dtype=dtype, weights=dtype), "identity", tolerance)


def test_segments_shorter_than_the_taps(monkeypatch):
    """Those of other programs lie within a window; more channels than a program takes."""
    monkeypatch.setattr(module, "convolved_tokens", lambda B, L, C: (2, -(-L // 16)))
    compare(problem(1, 37, 130, 4, True), "silu")


def test_what_is_read_lies_anywhere():
    """Inputs and gradients that are part of a wider tensor are read where they are, others from a copy."""
    wide = torch.full((2, 7, 9), torch.nan)
    part = wide[..., 2:5]
    assert in_rows(part)[0] is part
    assert [in_rows(x)[1] for x in (part, part[:1], part[:, :1], part[:1, :1])] == [9, 9, 63, 63]
    u, *rest = problem(2, 7, 3, 2)
    part.copy_(u.detach())
    for signal in (part, gapped(u), u.detach().mT.contiguous().mT):
        compare((signal.requires_grad_(), *rest), "silu")
    y, _ = short_convolution(u, *rest, "identity", has_tail=False)
    expected, _ = convolve_taps(u, *rest, "identity", has_tail=False)
    for ours, theirs in zip(*(torch.autograd.grad(x.sum(), [u, *rest[:3]]) for x in (y, expected)), strict=True):
        assert_close(ours, theirs, 1e-5)  # the gradient of a sum is one number


def test_the_tail_alone_and_the_output_alone():
    inputs = problem(2, 5, 3, 4, True)
    for i in (0, 1):
        outer = [convolve(*inputs, "silu")[i] for convolve in (short_convolution, convolve_taps)]
        wanted = inputs[:4] if i == 0 else (inputs[0], inputs[3])
        weights = torch.randn_like(outer[0])
        for ours, theirs in zip(*(torch.autograd.grad(x, wanted, weights) for x in outer), strict=True):
            assert_close(ours, theirs, 1e-5)
    assert short_convolution(*inputs, "silu", has_tail=False)[1] is None


def test_nothing_passes_a_border_not_even_what_is_not_a_number():
    u, weight, bias, tail, *_ = problem(1, 12, 3, 4)
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, 1, 1, -1, 2, 2, 2, 2]])
    begins = torch.nn.functional.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))
    documents = begins, seq_idx, "identity"
    expected, end = short_convolution(u, weight, bias, tail, *documents)
    with torch.no_grad():
        u[:, [0, 1, 2, 7]] = torch.nan
        tail.fill_(torch.inf)
    y, same_end = short_convolution(u, weight, bias, tail, *documents)
    assert torch.equal(y[:, 3:], expected[:, 3:])
    assert torch.equal(end, same_end)
    (gradient,) = torch.autograd.grad(y[:, 3:7].sum(), u)
    assert gradient[:, :3].abs().max() == 0 == gradient[:, 7:].abs().max()
    assert gradient[:, 3:7].isfinite().all()


def test_a_cut_anywhere_changes_nothing():
    """To the bit, token by token too: the decision over a drafted token is that of plain decoding."""
    u, weight, bias, *_ = (x if x is None else x.detach() for x in problem(1, 9, 3, 4, tail=False))
    whole, end = short_convolution(u, weight, bias, None, None, None, "silu")
    for parts in ([1] * 9, [4, 5]):
        tail, ys = None, []
        for part in u.split(parts, 1):
            y, tail = short_convolution(part, weight, bias, tail, None, None, "silu")
            ys.append(y)
        assert torch.equal(torch.cat(ys, 1), whole)
        assert torch.equal(tail, end)


def test_the_same_bits_again():
    assert_the_same_bits_again(lambda *x: short_convolution(*x, "silu"), problem(1, 20, 3, 4, True))


@pytest.mark.slow
def test_custom_operators():
    inputs = problem(1, 5, 3, 4, True)
    opcheck(convolve_tokens, (*inputs, "silu", True))
    opcheck(convolve_tokens, (*inputs[:3], None, None, None, "identity", False))
    u, weight, bias, tail, *documents = (x.detach() for x in inputs)
    gradients = torch.randn_like(u), torch.randn_like(tail)
    opcheck(convolve_tokens_backward, (*gradients, u, weight, bias, tail, *documents, "silu"))
    opcheck(convolve_tokens_backward, (gradients[0], None, u, weight, bias, None, None, None, "identity"))


@pytest.mark.slow
def test_self_check():
    assert_passes(self_check_cases)


@pytest.mark.parametrize(("arch", "autocast"), [("gated", True), ("h3", False)])
def test_model(arch, autocast, monkeypatch):
    """Loss and gradients over documents with padding, and what is generated; under autocast in bfloat16."""
    launched = []

    def counted(*inputs):
        launched.append((inputs[0].dtype, inputs[6]))
        return convolve_tokens(*inputs)

    monkeypatch.setattr(module, "convolve_tokens", counted)
    config = S4Config(
        vocab_size=19, hidden_size=8, num_hidden_layers=1, state_size=6, ssm="s4d", arch=[arch, "swiglu"],
        chunk_size=8, intermediate_size=8,
    )  # fmt: skip
    torch.manual_seed(2)
    model, ids, results = S4ForCausalLM(config), torch.randint(1, 19, (2, 37)), []
    positions = torch.cat([torch.arange(11), torch.arange(26)]).expand(2, -1)
    (conv,) = (x for x in model.modules() if isinstance(x, ShortConvolution))
    assert conv.kernels == config.kernels
    for conv.kernels in ("torch", "triton"):
        model.train()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = model(ids, labels=ids, position_ids=positions)
        gradients = torch.autograd.grad(output.loss, list(model.parameters()))
        model.eval()
        options = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True, "pad_token_id": 0}
        generated = model.generate(ids[:, :34], max_new_tokens=3, min_new_tokens=3, **options)
        results.append((output.loss, *generated.logits, *gradients))
    activation = "silu" if arch == "gated" else "identity"
    assert set(launched) == {(torch.bfloat16 if autocast else torch.float32, activation), (torch.float32, activation)}
    for ours, theirs in zip(*reversed(results), strict=True):
        assert_close(ours, theirs, 0.1 if autocast else 2e-5)
