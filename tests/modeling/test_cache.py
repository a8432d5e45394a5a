"""The cache between calls and in the hands of transformers: reordered, repeated, selected, moved, gone on from."""

import copy
from functools import partial

import pytest
import tiny
import torch
from tiny import ENDLESS, MIXTURE, SSD, tiny_model
from transformers import DynamicCache, GenerationConfig, StaticCache

VOCAB = 97
KINDS = {"s4": "s4-ffn", "s4d": "s4-ffn", "s5": "s4-ffn", "s4d in blocks": MIXTURE, "ssd": SSD}


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    ssm, arch = request.param.split()[0], KINDS[request.param]
    return tiny_model(seed=1, vocab_size=VOCAB, chunk_size=16, ssm=ssm, arch=arch, **ENDLESS)


prompt = partial(tiny.prompt, vocabulary=VOCAB)


def generate(model, ids, tokens, mask=None, cache=None, **options):
    config = GenerationConfig(**({"max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0} | options))
    return model.generate(ids, attention_mask=mask, past_key_values=cache, generation_config=config)


def left_padded(prompts):
    width = max(p.shape[1] for p in prompts)
    ids, mask = torch.full((len(prompts), width), 5), torch.zeros(len(prompts), width, dtype=torch.long)
    for row, p in enumerate(prompts):
        ids[row, width - p.shape[1] :] = p
        mask[row, width - p.shape[1] :] = 1
    return ids, mask


def new_cache(kind, model):
    return kind(config=model.config, **({"max_cache_len": 512} if kind is StaticCache else {}))


# ---- rows of a batch


@torch.no_grad()
@pytest.mark.parametrize(("kernels", "bounds"), [("torch", {}), ("auto", {"rtol": 1e-4, "atol": 1e-4})])
def test_the_cache_by_the_name_of_newer_versions(model, kernels, bounds, monkeypatch):
    """transformers 5.24 passes it as `cache`; a forward that took it for something else would begin from zero. By the
    twins within PyTorch's own bounds; in C a scan is compared with float32 steps.
    """
    monkeypatch.setenv("SSM_LM_KERNELS", kernels)
    ids = prompt(20)
    cache = model(ids[:, :12], use_cache=True).past_key_values
    torch.testing.assert_close(model(ids[:, 12:], cache=cache).logits, model(ids).logits[:, 12:], **bounds)


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@torch.no_grad()
def test_rows_are_reordered_repeated_and_selected(model, kind):
    ids, ends = prompt(20, batch=3), prompt(4, batch=6, seed=2)
    for change, rows in (
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda cache: cache.batch_select_indices(torch.tensor([2, 1])), [2, 1]),
    ):
        cache = new_cache(kind, model)
        model(ids, past_key_values=cache)
        change(cache)
        end = ends[: len(rows)]
        expected = model(torch.cat([ids[rows], end], 1), use_cache=False).logits[:, -4:]
        torch.testing.assert_close(model(end, past_key_values=cache).logits, expected, rtol=1e-4, atol=1e-4)
        assert int(cache.get_seq_length()) == 24


# ---- implementations


# transformers asks for a stream of the device when it makes one of these, which such a torch refuses
NO_DRIVER = torch.version.cuda is not None and not torch.cuda.is_available()
offloads = pytest.mark.skipif(NO_DRIVER, reason="a torch with CUDA on a machine without a driver")


@pytest.mark.parametrize(
    "implementation",
    ["static", *(pytest.param(kind, marks=offloads) for kind in ("offloaded", "offloaded_static"))],
)
def test_cache_implementations(model, implementation):
    ids, mask = left_padded([prompt(30), prompt(7, seed=3)])
    for options in ({}, {"num_beams": 3}, {"prefill_chunk_size": 8}):
        expected = generate(model, ids, 10, mask, **options)
        assert torch.equal(generate(model, ids, 10, mask, cache_implementation=implementation, **options), expected)


@torch.no_grad()
def test_several_tokens_on_a_filled_cache(model):
    ids = prompt(60, batch=2)
    expected = model(ids, use_cache=False).logits
    for kind in (DynamicCache, StaticCache):
        cache, start = new_cache(kind, model), 0
        for size in (1, 20, 1, 3, 33, 2):
            logits = model(ids[:, start : start + size], past_key_values=cache).logits
            torch.testing.assert_close(logits, expected[:, start : start + size], rtol=1e-4, atol=1e-4)
            start += size
        assert start == int(cache.get_seq_length()) == 60


@pytest.mark.parametrize("cache", [DynamicCache(), ((torch.zeros(1),) * 2,) * 2], ids=["no config", "tuples"])
def test_a_cache_without_states_is_refused_in_words(model, cache):
    with pytest.raises(ValueError, match=r"states of 2 layers: make it with DynamicCache\(config=model.config\)"):
        model(prompt(5), past_key_values=cache)


def test_a_cache_of_other_rows_is_refused_in_words(model):
    cache = model(prompt(5, batch=3), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="initial_state must be"):
        model(prompt(5, batch=2), past_key_values=cache)


@torch.no_grad()
def test_a_text_of_inference_mode_goes_on_outside_of_it(model, monkeypatch):
    monkeypatch.setattr(model.config, "kernels", "torch")  # the step in C writes where PyTorch would refuse to
    ids = prompt(20)
    for kind in (DynamicCache, StaticCache):
        cache = new_cache(kind, model)
        with torch.inference_mode():
            model(ids[:, :12], past_key_values=cache)
        torch.testing.assert_close(
            model(ids[:, 12:], past_key_values=cache).logits, model(ids).logits[:, 12:], rtol=1e-4, atol=1e-4
        )
        cache.reset()


# ---- a conversation


@pytest.mark.parametrize("turn", ["full ids", "new ids"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_conversation_goes_on_from_its_cache(model, turn, padded):
    prompts = [prompt(12), prompt(5 if padded else 12, seed=4)]
    ids, mask = left_padded(prompts)
    first = generate(model, ids, 8, mask, return_dict_in_generate=True)
    said = torch.cat([first.sequences, prompt(6, batch=2, seed=5)], 1)
    mask = torch.cat([mask, torch.ones(2, 8 + 6, dtype=torch.long)], 1)
    # the last token that was generated has not been through the model
    assert first.past_key_values.get_seq_length() == first.sequences.shape[1] - 1
    given = said if turn == "full ids" else said[:, first.past_key_values.get_seq_length() :]
    second = generate(model, given, 8, mask, first.past_key_values)
    for row, start in enumerate([12 - p.shape[1] for p in prompts]):
        whole = said[row : row + 1, start:]  # a 0 that was generated is a token: the mask says so
        alone = generate(model, whole, 8, torch.ones_like(whole))
        assert torch.equal(second[row, -8:], alone[0, -8:])


@torch.no_grad()
def test_padding_in_the_middle_of_a_conversation(model):
    """A row that has less to say waits for the others: its state decays alike in one forward and in two."""
    ids, mask = prompt(20, batch=2), torch.ones(2, 20, dtype=torch.long)
    mask[1, 11:16] = 0
    whole = model(ids, attention_mask=mask, use_cache=False).logits
    cache = new_cache(DynamicCache, model)
    model(ids[:, :11], attention_mask=mask[:, :11], past_key_values=cache)
    rest = model(ids[:, 11:], attention_mask=mask, past_key_values=cache).logits
    torch.testing.assert_close(rest, whole[:, 11:], rtol=1e-4, atol=1e-4)


# ---- lengths and batches


def test_very_different_lengths_and_sixteen_rows(model):
    lengths = [1, 300, 17, 64, 2, 150, 16, 15, 33, 128, 5, 90, 299, 48, 31, 3]
    prompts = [prompt(length, seed=length) for length in lengths]
    ids, mask = left_padded(prompts)
    together = generate(model, ids, 12, mask)
    beams = generate(model, ids[:2], 6, mask[:2], num_beams=3)
    for row, single in enumerate(prompts):
        assert torch.equal(together[row, 300:], generate(model, single, 12)[0, single.shape[1] :]), lengths[row]
    for row in range(2):
        alone = generate(model, prompts[row], 6, num_beams=3)
        assert torch.equal(beams[row, 300:], alone[0, lengths[row] :])


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("length", [1, 40])
def test_one_new_token_and_one_token_prompts(model, batch, length):
    ids = prompt(length, batch=batch)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits[:, -1].argmax(-1)
    one = generate(model, ids, 1)
    assert torch.equal(one, torch.cat([ids, expected[:, None]], 1))
    assert torch.equal(generate(model, ids, 5)[:, : length + 1], one)
    assert torch.equal(generate(model, ids, 1, num_beams=3), one)
    for implementation in ("dynamic", "static"):
        assert torch.equal(generate(model, ids, 1, cache_implementation=implementation), one)


def test_a_prompt_longer_than_anything_seen(model):
    """There is no longest length: 5000 tokens, in one forward and in parts, go on as the last forward says."""
    ids = prompt(5000)
    with torch.no_grad():
        last = model(ids, use_cache=False, logits_to_keep=1).logits[:, -1]
        assert torch.isfinite(last).all()
    out = generate(model, ids, 4, prefill_chunk_size=512)
    assert out[0, 5000] == last.argmax()
    assert torch.equal(out, generate(model, ids, 4))


@torch.no_grad()
def test_right_padding(model):
    """In a forward the real tokens do not see it; generate() would go on from padding, and transformers warns."""
    ids, mask = prompt(20, batch=2), torch.ones(2, 20, dtype=torch.long)
    ids[0, 13:], mask[0, 13:] = 5, 0
    logits = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(logits[:1, :13], model(ids[:1, :13]).logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits[1:], model(ids[1:]).logits, rtol=1e-4, atol=1e-4)
    loss = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
    rows = [model(ids[:1, :13], labels=ids[:1, :13]).loss * 12, model(ids[1:], labels=ids[1:]).loss * 19]
    torch.testing.assert_close(loss, sum(rows) / 31)


def test_right_padding_is_warned_of(model, monkeypatch):
    from transformers.generation import utils

    warnings = []
    monkeypatch.setattr(utils.logger, "warning", lambda text, *args, **kwargs: warnings.append(text))
    ids = prompt(8, batch=2)
    ids[0, 5:] = 0
    generate(model, ids, 2, (ids != 0).long())
    assert any("right-padding was detected" in text for text in warnings)


@torch.no_grad()
def test_parameters_that_leave_after_each_forward(model):
    """accelerate's offload, as a device_map with "cpu" or "disk" has it; ZeRO 3 takes its parameters back likewise."""
    from accelerate import cpu_offload

    offloaded = cpu_offload(copy.deepcopy(model), execution_device="cpu")
    assert next(offloaded.parameters()).is_meta
    ids = prompt(40)
    assert torch.equal(generate(offloaded, ids, 12), generate(model, ids, 12))
    logits = []
    for which in (model, offloaded):  # a past of more than is recorded, of which some is taken back
        cache = DynamicCache(config=model.config)
        cache.activate_past_recording()
        which(prompt(300), past_key_values=cache)
        which(prompt(6), past_key_values=cache)
        cache.crop(-4)
        logits.append(which(prompt(1), past_key_values=cache).logits)
    torch.testing.assert_close(*logits)


@pytest.mark.parametrize("change", ["an optimizer's step", "load_state_dict"])
def test_weights_that_change_under_a_kept_cache_are_seen(model, change):
    """The states go on as they are, and every number after them is of the new weights, as with an attention's cache."""
    model, other = copy.deepcopy(model), tiny_model(seed=9, **model.config.to_diff_dict())
    ids = prompt(30)
    with torch.no_grad():
        kept = new_cache(DynamicCache, model)
        model(ids, past_key_values=kept)
        model(prompt(1, seed=2), past_key_values=kept)  # what single steps need is derived
    if change == "load_state_dict":
        model.load_state_dict(other.state_dict())
    else:
        model(ids, labels=ids).loss.backward()
        torch.optim.SGD(model.parameters(), 0.5).step()
    with torch.no_grad():
        fresh = copy.deepcopy(kept)
        for layer in fresh.layers:
            layer.memos.clear()
        logits = [model(prompt(1, seed=3), past_key_values=cache).logits for cache in (kept, fresh)]
    assert torch.equal(*logits)
