"""A cropped cache holds the states that a computation from scratch gives, whatever was done to it before."""

import copy
import gc
import pickle
from unittest.mock import patch

import pytest
import torch
from tiny import MIXTURE, SSD, tiny_model
from transformers import DynamicCache, StaticCache

from ssm_lm.modeling import execution, native_step
from ssm_lm.modeling.cache_s4 import S4CacheLayer
from ssm_lm.modeling.single_steps import Memo

VOCAB = 61
KINDS = [("s4", "s4"), ("s4", "s4-ffn"), ("s4d", "s4"), ("s4d", MIXTURE), ("s5", "s4"), ("s5", MIXTURE), ("ssd", SSD)]
BOUNDS = {torch.float32: 1e-5, torch.float64: 1e-10}


def build(ssm="s4", arch="s4", dtype=torch.float32, **values):
    sizes = {"vocab_size": VOCAB, "initializer_range": 0.02, "chunk_size": 16}
    model = tiny_model(seed=1, ssm=ssm, arch=arch, **(sizes | values)).to(dtype)
    with torch.no_grad():  # random numbers in place of initial values that are the same for every channel
        for name, parameter in model.named_parameters():
            if name.endswith("Lambda_log_re"):
                parameter += 0.3 * torch.randn_like(parameter)
    return model


def tokens(length, batch=1, seed=0):
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def recording(model):
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    return cache


def states(cache):
    return [state for layer in cache.layers for state in layer.states]


def from_scratch(model, ids, **inputs):
    """The states after ids in one forward, by the chunk scan."""
    cache = DynamicCache(config=model.config)
    with patch.object(execution, "FEW_TOKENS", 1), patch.multiple(native_step, FEW_TOKENS=0, PROMPT_ROWS=0):
        model(ids, past_key_values=cache, **inputs)
    return cache


def assert_same_states(cache, expected, dtype=torch.float32):
    assert cache.get_seq_length() == expected.get_seq_length()
    pairs = list(zip(states(cache), states(expected), strict=True))
    assert pairs
    for found, wanted in pairs:
        assert found.shape == wanted.shape
        assert (found - wanted).abs().max() <= BOUNDS[dtype] * wanted.abs().max().clamp(min=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
@torch.no_grad()
def test_crop_equals_a_computation_from_scratch(kind, dtype):
    """After 0 to all of the recorded tokens were rejected; the tokens came in one forward, in several, one by one."""
    model, ids, length = build(*kind, dtype=dtype), tokens(24, batch=3), 24
    expected = {k: from_scratch(model, ids[:, : length - k]) for k in range(length)}
    for parts in ([24], [9, 1, 1, 13], [20] + [1] * 4):
        cache, position = recording(model), 0
        for part in parts:
            model(ids[:, position : position + part], past_key_values=cache)
            position += part
        for k in range(length):
            cropped = copy.deepcopy(cache)
            cropped.crop(-k)
            assert_same_states(cropped, expected[k], dtype)
        cache.crop(-length)
        assert cache.get_seq_length() == 0
        assert all((state == 0).all() for state in states(cache))


@pytest.mark.parametrize("ssm", ["s4", "s4d", "s5"])
@torch.no_grad()
def test_a_forward_of_several_tokens_after_a_crop_is_decoding_to_the_bit(ssm):
    """State spaces see drafted tokens one by one, so states are those of plain steps where their inputs are."""
    layer = build(ssm).model.layers[0].sublayers[0].inner.ssm
    u, state, memo = torch.randn(2, 12, 16), torch.randn(2, *layer.state_shape), Memo()
    stepped = state
    for t in range(12):
        _, stepped = layer(u[:, t : t + 1], mode="recurrent", initial_state=stepped, memo=memo)
    assert torch.equal(layer(u, mode="recurrent", initial_state=state, memo=memo)[1], stepped)
    assert torch.equal(layer.advance(u, state, memo), stepped)
    torch.testing.assert_close(layer.advance(u, state), stepped, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_rounds_of_drafts():
    """As assisted decoding does: some tokens, some of them dropped, and on from there."""
    model, ids = build(), tokens(200)
    cache, kept = recording(model), []
    generator = torch.Generator().manual_seed(0)
    position = 0
    while position < 190:
        length = int(torch.randint(1, 12, (), generator=generator))
        dropped = int(torch.randint(0, length + 1, (), generator=generator))
        model(tokens(length, seed=position), past_key_values=cache)
        cache.crop(-dropped)
        kept.append(tokens(length, seed=position)[:, : length - dropped])
        position += length
    assert_same_states(cache, from_scratch(model, torch.cat(kept, 1)))
    logits = model(ids[:, :1], past_key_values=cache).logits
    expected = model(torch.cat([*kept, ids[:, :1]], 1)).logits[:, -1:]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("parts", "prompt_rows"),
    [([1000], 0), ([700, 300], 0), ([5, 990, 5], 0), ([250] * 4, 0), ([100] * 5, 512), ([1] * 300, 0)],
    ids=lambda x: f"{len(x)}x{x[0]}" if isinstance(x, list) else ("steps" if x else "scan"),
)
@torch.no_grad()
def test_the_record_is_bounded(parts, prompt_rows, monkeypatch):
    """prompt_rows: up to how many tokens the steps in C read, whose float32 drifts from the scan in a thousand."""
    monkeypatch.setattr(native_step, "PROMPT_ROWS", prompt_rows)
    model, ids = build("s4d"), tokens(1000)
    ids = ids[:, : sum(parts)]
    cache, position = recording(model), 0
    for part in parts:
        model(ids[:, position : position + part], past_key_values=cache)
        position += part
        for layer in cache.layers:
            for record in layer.records:
                assert len(record) <= layer.max_recorded
                assert len(record) >= min(position, layer.min_recorded)
                # no view of something larger
                assert sum(x.untyped_storage().nbytes() for x in record.inputs) <= 4 * 16 * layer.max_recorded
    recorded = len(cache.layers[0].records[0])
    with pytest.raises(ValueError, match=f"cannot crop {recorded + 1} tokens: {recorded} are recorded"):
        cache.crop(-recorded - 1)
    for k in (0, 1, 100, recorded):
        cropped = copy.deepcopy(cache)
        cropped.crop(-k)
        assert_same_states(cropped, from_scratch(model, ids[:, : ids.shape[1] - k]))


@torch.no_grad()
def test_nothing_is_kept_without_recording_or_after_a_reset():
    model, ids = build(), tokens(20)
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    assert all(record is None for layer in cache.layers for record in layer.records)
    cache.crop(0)
    with pytest.raises(ValueError, match="cannot crop 1 tokens: 0 are recorded without activate_past_recording"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="minus the number"):
        cache.crop(3)
    cache.activate_past_recording()
    model(ids, past_key_values=cache)
    cache.reset()
    model(ids, past_key_values=cache)
    assert all(record is None for layer in cache.layers for record in layer.records)
    assert_same_states(cache, from_scratch(model, ids))
    cache.activate_past_recording()  # in the middle of a text: from here on
    model(ids[:, :7], past_key_values=cache)
    cache.crop(-7)
    assert_same_states(cache, from_scratch(model, ids))
    with pytest.raises(ValueError, match="since the last crop"):
        cache.crop(-1)


@pytest.mark.parametrize("kind", [("s4",), ("s5",), ("s4d", MIXTURE)], ids=str)
@torch.no_grad()
def test_a_record_follows_its_batch(kind):
    model, ids = build(*kind), tokens(30, batch=3)
    rows = torch.tensor([2, 0, 0])
    for change, expected in (
        (lambda cache: cache.reorder_cache(rows), ids[rows]),
        (lambda cache: cache.batch_select_indices(rows[:2]), ids[rows[:2]]),
        (lambda cache: cache.batch_repeat_interleave(2), ids.repeat_interleave(2, 0)),
        (lambda cache: [cache.layers[0].offload(), cache.layers[0].prefetch()], ids),
    ):
        cache = recording(model)
        model(ids, past_key_values=cache)
        change(cache)
        cache.crop(-11)
        assert_same_states(cache, from_scratch(model, expected[:, :19]))


@pytest.mark.parametrize("arch", ["s4", MIXTURE], ids=str)
@torch.no_grad()
def test_padding_and_documents_are_recorded_as_they_drove_the_states(arch):
    model, ids = build("s4d", arch), tokens(24, batch=2)
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[0, :9] = 0
    cache = recording(model)
    model(ids, attention_mask=mask, past_key_values=cache)
    cache.crop(-5)
    assert_same_states(cache, from_scratch(model, ids[:, :19], attention_mask=mask[:, :19]))

    seq_idx = torch.tensor([[0] * 5 + [1] * 9 + [2] * 10, [0] * 8 + [-1] * 6 + [1] * 10])
    cache = recording(model)
    model(ids, seq_idx=seq_idx, past_key_values=cache)
    for k in (0, 3, 9, 11, 12, 19, 20):
        cropped = copy.deepcopy(cache)
        cropped.crop(-k)
        assert_same_states(cropped, from_scratch(model, ids[:, : 24 - k], seq_idx=seq_idx[:, : 24 - k]))
    for layer in cache.layers:  # and when the snapshot moves over their borders
        for record in layer.records:
            record.keep_last(4, memo=None)
    cache.crop(-2)
    assert_same_states(cache, from_scratch(model, ids[:, :22], seq_idx=seq_idx[:, :22]))


@torch.no_grad()
def test_copies_and_pickles():
    model, ids = build(), tokens(30)
    cache = recording(model)
    model(ids[:, :20], past_key_values=cache)
    copied = copy.deepcopy(cache)
    assert copied.layers[0].records[0].ssm.get() is model.model.layers[0].sublayers[0].inner.ssm  # not a copy of it
    loaded = pickle.loads(pickle.dumps(cache))
    with pytest.raises(ValueError, match="needs a forward first"):
        copy.deepcopy(loaded).crop(-3)
    for each in (cache, copied, loaded):
        model(ids[:, 20:], past_key_values=each)
        each.crop(-15)
        assert_same_states(each, from_scratch(model, ids[:, :15]))
    # a cache keeps no model alive
    model(ids, past_key_values=cache)
    del model
    gc.collect()
    assert cache.layers[0].records[0].ssm.get() is None


@pytest.mark.parametrize("arch", ["s4", MIXTURE], ids=str)
def test_a_crop_between_two_backward_passes(arch):
    model, ids = build(arch=arch, dtype=torch.float64), tokens(12)

    def loss(cropped):
        cache = recording(model)
        model(ids[:, :10], past_key_values=cache)
        if cropped:
            model(tokens(5, seed=3), past_key_values=cache)
            cache.crop(-5)
        return model(ids[:, 10:], past_key_values=cache).logits.square().sum()

    found, expected = (torch.autograd.grad(loss(cropped), list(model.parameters())) for cropped in (True, False))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_a_static_cache_says_that_it_cannot():
    model = build()
    cache = StaticCache(config=model.config, max_cache_len=8)
    assert not cache.is_croppable
    with pytest.raises(ValueError, match="DynamicCache"):
        cache.activate_past_recording()
    assert DynamicCache(config=model.config).is_croppable
    assert S4CacheLayer.min_recorded < S4CacheLayer.max_recorded
