"""The short convolution against a loop over tokens, and its tail as a state."""

import pytest
import torch

from ssm_lm.modeling.documents import find_documents
from ssm_lm.modeling.short_convolution import ShortConvolution

CHANNELS = 3


def make(size=4):
    torch.manual_seed(0)
    return ShortConvolution(CHANNELS, size).double()


def inputs(length, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, CHANNELS, dtype=torch.float64, generator=generator)


def by_a_loop(layer, u, tail, numbers=None):
    """y and the tail, by the definition: tap j of token t looks at token t - K + 1 + j, if that is of its document.
    numbers (B, L): the documents, of which the first of a row goes on from the tail; a negative one is padding.
    """
    y, tails = torch.zeros_like(u), []
    for b, row in enumerate(u):
        seen = list(tail[b])
        for t, token in enumerate(row):
            number = 0 if numbers is None else int(numbers[b, t])
            if t and numbers is not None and numbers[b, t - 1] != number:
                seen = [torch.zeros_like(token)] * len(seen)
            seen.append(token if number >= 0 else torch.zeros_like(token))
            y[b, t] = layer.bias + sum(layer.weight[:, j] * value for j, value in enumerate(seen))
            seen = seen[1:]
        tails.append(torch.stack(seen) if seen else tail[b])
    return y, torch.stack(tails)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("size", [1, 2, 4, 7])
def test_it_is_its_definition(size, documents):
    """From a tail; values, the next tail and every gradient. Some documents, and the row of 3, are shorter than K."""
    layer = make(size)
    for length in (1, 3, 12):
        u, tail = inputs(length).requires_grad_(), torch.randn(2, size - 1, CHANNELS).double().requires_grad_()
        numbers = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1, -1, -1, 2], [5, 5, 5, 5, 5, 5, 7, 8, 8, -1, -1, -1]])
        numbers = numbers[:, :length] if documents else None
        expected = by_a_loop(layer, u, tail, numbers)
        found = layer(u, initial_state=tail, seq_idx=None if numbers is None else find_documents(numbers, 8))
        weights = inputs(length, seed=1), torch.randn(2, size - 1, CHANNELS).double()
        gradients = []
        for result in (expected, found):
            value = sum((w * part).sum() for w, part in zip(weights, result, strict=True))
            wanted = [u, tail, layer.weight, layer.bias]
            gradients.append(torch.autograd.grad(value, wanted, materialize_grads=True))
        for ours, theirs in zip((*found, *gradients[1]), (*expected, *gradients[0]), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_it_is_the_convolution_of_torch():
    layer, u = make(), inputs(12)
    padded = torch.nn.functional.pad(u.transpose(1, 2), (3, 0))
    expected = torch.nn.functional.conv1d(padded, layer.weight[:, None], layer.bias, groups=CHANNELS).transpose(1, 2)
    torch.testing.assert_close(layer(u)[0], expected)


def test_a_cut_anywhere_changes_nothing():
    """To the bit, token by token too: the decision over a drafted token is that of plain decoding."""
    layer = make().float()
    u = inputs(12, batch=1).float()
    with torch.no_grad():
        whole, end = layer(u)
        for cuts in ([cut, 12 - cut] for cut in range(13)):
            parts, tail = [], None
            for part in u.split(cuts, 1):
                y, tail = layer(part, initial_state=tail)
                parts.append(y)
            assert torch.equal(torch.cat(parts, 1), whole)
            assert torch.equal(tail, end)
        parts, tail = [], None
        for token in u.split(1, 1):
            y, tail = layer(token, initial_state=tail)
            parts.append(y)
        assert torch.equal(torch.cat(parts, 1), whole)
    assert torch.equal(layer.bias, make().float().bias)  # a single token is as large as the bias


def test_advance_and_carry_over_are_the_state_of_a_forward():
    """What a crop and what sequence parallelism ask for, at lengths below and above the tail's."""
    layer = make()
    before = torch.randn(2, 3, CHANNELS).double()
    for length in (1, 2, 3, 8):
        u = inputs(length)
        expected = layer(u, initial_state=before)[1]
        assert torch.equal(layer.advance(u, before), expected)
        from_zero = layer.advance(u, layer.zero_state(2))
        assert torch.equal(layer.carry_over(layer.transition(length), before) + from_zero, expected)


def test_nothing_leaks_over_a_border_not_even_what_is_not_a_number():
    layer = make()
    seq_idx = find_documents(torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2]]), 8)
    u = inputs(8, batch=1).requires_grad_()
    y, tail = layer(u, seq_idx=seq_idx)
    for value in (torch.inf, torch.nan):
        other = u.detach().clone()
        other[:, :3] = value
        changed, changed_tail = layer(other, seq_idx=seq_idx)
        assert torch.equal(changed[:, 3:], y[:, 3:])
        assert torch.equal(changed_tail, tail)
    (gradient,) = torch.autograd.grad(y[:, 3:7].sum(), u)
    assert gradient[:, :3].abs().max() == 0 == gradient[:, 7:].abs().max()
    assert gradient[:, 3:7].abs().min() > 0


def test_a_tail_is_float32_in_half_precision_and_no_view_of_the_sequence():
    layer = make().bfloat16()
    y, tail = layer(torch.randn(1, 1000, CHANNELS, dtype=torch.bfloat16))
    assert (y.dtype, tail.dtype) == (torch.bfloat16, torch.float32)
    assert make().float()(torch.randn(1, 1000, CHANNELS))[1].untyped_storage().nbytes() == 3 * CHANNELS * 4
