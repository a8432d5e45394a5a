"""Packed documents equal separate ones, and nothing leaks from one into the next."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import MIXTURE, SSD, checkpoint_activations, tiny_model

from ssm_lm.modeling.documents import find_documents, from_position_ids
from ssm_lm.modeling.ssm import S4, S4D, S5

MODES = ("chunk", "fft", "recurrent")
LAYERS = {
    "s4": lambda **kw: S4(3, 8, **kw),
    "s4-legt": lambda **kw: S4(3, 8, init="legt", **kw),
    "s4d": lambda **kw: S4D(3, 8, **kw),
    "s5": lambda **kw: S5(3, 8, **kw),
}


def make(name, **kw):
    torch.manual_seed(0)
    return LAYERS[name](**({"chunk_size": 8} | kw))


def pack(rows):
    """[[length, ...], ...] -> seq_idx (B, L), short rows padded with -1 behind."""
    length = max(sum(lengths) for lengths in rows)
    seq_idx = torch.full((len(rows), length), -1)
    for row, lengths in zip(seq_idx, rows, strict=True):
        numbers = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        row[: len(numbers)] = numbers
    return seq_idx


def separately(layer, u, rows, state=None):
    """Each document by itself, the first of a row from the state; the final states are those of the last documents."""
    y, finals = torch.zeros_like(u), []
    for b, lengths in enumerate(rows):
        start = 0
        for i, n in enumerate(lengths):
            first = None if state is None or i else state[b : b + 1]
            out, final = layer(u[b : b + 1, start : start + n], mode="recurrent", initial_state=first)
            y[b, start : start + n] = out[0]
            start += n
        finals.append(final)
    return y, torch.cat(finals)


def close(ours, theirs, tolerance):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * theirs.abs().max().clamp(min=1).item())


# rows of the same total length, as a packing data loader makes them
packings = st.lists(st.integers(1, 23), min_size=1, max_size=6).flatmap(
    lambda lengths: st.lists(st.permutations(lengths), min_size=1, max_size=2)
)


@settings(max_examples=15, deadline=None)
@given(
    rows=packings, seed=st.integers(0, 9), initial=st.booleans(), dtype=st.sampled_from([torch.float32, torch.float64])
)
def test_packed_documents_equal_separate_ones(rows, seed, initial, dtype):
    tolerance = 1e-5 if dtype == torch.float32 else 1e-9
    seq_idx = pack(rows)
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(*seq_idx.shape, 3, generator=generator, dtype=dtype)
    for name in LAYERS:
        layer = make(name).to(dtype)
        state = torch.randn(len(rows), *layer.state_shape, generator=generator, dtype=dtype) if initial else None
        with torch.no_grad():
            expected, expected_final = separately(layer, u, rows, state)
            for mode in MODES:
                y, final = layer(u, mode=mode, initial_state=state, seq_idx=seq_idx)
                close(y, expected, tolerance)
                close(final, expected_final, tolerance)


@pytest.mark.parametrize("initial", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_equal_those_of_separate_documents(name, mode, initial):
    layer = make(name).double()
    rows = [[3, 9, 1, 17], [30], [8, 8, 14]]
    u = torch.randn(3, 30, 3, dtype=torch.float64, requires_grad=True)
    state = torch.randn(3, *layer.state_shape, dtype=torch.float64, requires_grad=True) if initial else None
    weight = torch.randn(3, 30, 3, dtype=torch.float64)
    inputs = [u, *layer.parameters(), *([state] if initial else [])]
    gradients = []
    for y, final in (
        separately(layer, u, rows, state),
        layer(u, mode=mode, initial_state=state, seq_idx=pack(rows)),
    ):
        gradients.append(torch.autograd.grad((y * weight).sum() + final.square().sum(), inputs))
    for ours, theirs in zip(*gradients, strict=True):
        close(ours, theirs, 1e-9)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LAYERS)
def test_no_leak_not_even_of_what_is_not_a_number(name, mode):
    """Another first document, or one full of infinities, leaves the others bitwise as they were."""
    layer = make(name)
    seq_idx = pack([[5, 11, 20, 4]])
    u = torch.randn(1, 40, 3)
    with torch.no_grad():
        y, final = layer(u, mode=mode, seq_idx=seq_idx)
        for value in (torch.randn(5, 3), torch.full((5, 3), torch.inf), torch.full((5, 3), torch.nan)):
            other = u.clone()
            other[0, :5] = value
            changed, changed_final = layer(other, mode=mode, seq_idx=seq_idx)
            assert torch.equal(changed[:, 5:], y[:, 5:])
            assert torch.equal(changed_final, final)
            assert not torch.equal(changed[:, :5], y[:, :5])


@pytest.mark.parametrize("mode", MODES)
def test_no_gradient_leaks(mode):
    layer = make("s4")
    u = torch.randn(1, 40, 3, requires_grad=True)
    y, _ = layer(u, mode=mode, seq_idx=pack([[5, 11, 20, 4]]))
    y[:, 16:36].sum().backward()
    assert u.grad[:, :16].abs().max() == 0
    assert u.grad[:, 36:].abs().max() == 0
    assert u.grad[:, 16:36].abs().min() > 0


@pytest.mark.parametrize("mode", MODES)
def test_padding_drives_nothing(mode):
    layer = make("s4")
    u = torch.randn(2, 20, 3)
    seq_idx = pack([[4, 9], [20]])
    with torch.no_grad():
        y, final = layer(u, mode=mode, seq_idx=seq_idx)
        expected, _ = separately(layer, u, [[4, 9], [20]])
    close(y, expected, 1e-5)
    assert final[0].abs().max() == 0  # the state after padding


def test_a_run_of_equal_numbers_is_a_document():
    """Numbers may repeat or fall: what counts is where they change."""
    layer = make("s4d")
    u = torch.randn(1, 12, 3)
    numbers = torch.tensor([[7, 7, 7, 2, 2, 7, 7, 7, 7, 0, 0, 0]])
    with torch.no_grad():
        y, _ = layer(u, seq_idx=numbers)
        expected, _ = separately(layer, u, [[3, 2, 4, 3]])
    close(y, expected, 1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LAYERS)
def test_bidirectional(name, mode):
    layer = make(name, bidirectional=True)
    u = torch.randn(1, 29, 3)
    lengths = [10, 3, 16]
    with torch.no_grad():
        y, _ = layer(u, mode=mode, seq_idx=pack([lengths]))
        expected = torch.cat([layer(part, mode="recurrent")[0] for part in u.split(lengths, 1)], 1)
    close(y, expected, 1e-5)


def test_layout_by_hand():
    documents = find_documents(torch.tensor([[0, 0, 0, 1, 1]]), 2)
    assert (documents.chunks, documents.rows, documents.longest) == (3, 2, 3)
    assert documents.slot.tolist() == [1, 2, 3, 4, 5]  # a zero in front of the first document
    assert documents.keep.tolist() == [[False, True, False]]
    assert documents.row_slot.tolist() == [0, 1, 2, 3, 4]


def test_position_ids():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 0, 0, 1, 2, 3]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    assert from_position_ids(positions, None, 2)[0].tolist() == [1, 1, 1, 2, 2, 3]
    assert from_position_ids(positions, mask, 2)[1].tolist() == [-1, -1, 3, 3, 3, 3]
    assert from_position_ids(torch.arange(4)[None], None, 2).tolist() == [[1, 1, 1, 1]] * 2


# ---- the model


def model(**kw):
    return tiny_model(**({"vocab_size": 50, "initializer_range": 0.2, "chunk_size": 8} | kw))


@pytest.mark.parametrize("how", ["seq_idx", "position_ids", "cu_seq_lens_q"])
@pytest.mark.parametrize(
    ("ssm", "arch"),
    [("s4", "s4"), ("s4d", "s4"), ("s5", "s4"), ("s4", MIXTURE), ("s4d", MIXTURE), ("ssd", SSD)],
    ids=str,
)
def test_packed_documents_in_the_model(ssm, arch, how):
    m = model(ssm=ssm, arch=arch)
    lengths = [5, 13, 1, 8]
    ids = torch.randint(0, 50, (1, 27), generator=torch.Generator().manual_seed(0))
    value = pack([lengths])
    if how == "position_ids":
        value = torch.cat([torch.arange(n) for n in lengths])[None]
    elif how == "cu_seq_lens_q":
        value = torch.tensor([0, 5, 18, 19, 27], dtype=torch.int32)
        with pytest.raises(ValueError, match="in one row, not in 2"):
            m(ids.repeat(2, 1), cu_seq_lens_q=value)
    with torch.no_grad():
        logits = m(ids, **{how: value}).logits
        expected = torch.cat([m(part).logits for part in ids.split(lengths, 1)], 1)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
        other = ids.clone()
        other[0, :5] = 0
        assert torch.equal(m(other, **{how: value}).logits[:, 5:], logits[:, 5:])


@pytest.mark.parametrize("arch", ["s4", MIXTURE], ids=str)
def test_training_on_packed_documents_with_checkpointing(arch):
    ids = torch.randint(0, 50, (2, 27), generator=torch.Generator().manual_seed(0))
    gradients = []
    for checkpointing in (False, True):
        m = model(arch=arch).train()
        if checkpointing:
            checkpoint_activations(m)
        m(ids, labels=ids, seq_idx=pack([[5, 13, 9], [20, 7]])).loss.backward()
        gradients.append([p.grad.clone() for p in m.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("arch", ["s4", MIXTURE], ids=str)
def test_prefill_of_packed_documents_goes_on_with_the_last(arch):
    m = model(arch=arch)
    ids = torch.randint(0, 50, (1, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        cache = m(ids[:, :15], seq_idx=pack([[6, 9]]), use_cache=True).past_key_values
        # the rest of the second document, and a third one
        rest = m(ids[:, 15:], past_key_values=cache, seq_idx=torch.tensor([[1, 1, 2, 2, 2]])).logits
        expected = torch.cat([m(ids[:, 6:17]).logits[:, 9:], m(ids[:, 17:]).logits], 1)
    torch.testing.assert_close(rest, expected, rtol=1e-4, atol=1e-5)
