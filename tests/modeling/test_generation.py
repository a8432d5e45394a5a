"""generate() against full forwards: states that are carried, reordered, padded or prefilled in parts change nothing."""

from functools import partial

import pytest
import tiny
import torch
from tiny import ENDLESS, MIXTURE, SSD, tiny_model
from transformers import DynamicCache, GenerationConfig, StaticCache

VOCAB = 97


def build(ssm="s4", arch="s4", **values):
    return tiny_model(seed=1, vocab_size=VOCAB, hidden_size=32, ssm=ssm, arch=arch, **ENDLESS, **values)


KINDS = [("s4", "s4"), ("s4", "s4-ffn"), ("s4d", "s4"), ("s4d", MIXTURE), ("ssd", SSD)]


@pytest.fixture(scope="module", params=KINDS, ids=str)
def model(request):
    return build(*request.param)


prompt = partial(tiny.prompt, vocabulary=VOCAB)


def generate(model, ids, tokens, **options):
    given = {name: options.pop(name) for name in ("attention_mask", "inputs_embeds") if name in options}
    options = {"do_sample": False, "pad_token_id": 0, **options}
    return model.generate(ids, generation_config=GenerationConfig(max_new_tokens=tokens, **options), **given)


def last_logits(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits[:, -1]


def greedy_by_full_forwards(model, ids, tokens):
    for _ in range(tokens):
        ids = torch.cat([ids, last_logits(model, ids).argmax(-1, keepdim=True)], 1)
    return ids


def test_greedy(model):
    ids = prompt(7)
    expected = greedy_by_full_forwards(model, ids, 64)
    assert len(expected[0, 7:].unique()) > 8  # a constant could agree by accident
    assert torch.equal(generate(model, ids, 64), expected)


def test_greedy_of_a_batch_and_of_one_token(model):
    for ids in (prompt(5, batch=3), prompt(1)):
        assert torch.equal(generate(model, ids, 16), greedy_by_full_forwards(model, ids, 16))


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
def test_a_prompt_of_embeddings(model, options):
    """Of the prompt alone: what follows are tokens, of which generate() returns no others."""
    ids, mask = prompt(9, batch=2), torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    expected = generate(model, ids, 12, attention_mask=mask, **options)
    embeddings = model.get_input_embeddings()(ids).detach()
    found = generate(model, None, 12, inputs_embeds=embeddings, attention_mask=mask, **options)
    assert torch.equal(found, expected[:, 9:])


@pytest.mark.parametrize("mode", ["chunk", "fft", "recurrent"])
def test_greedy_in_every_mode(mode):
    ids = prompt(70)
    assert torch.equal(generate(build(mode=mode), ids, 16), greedy_by_full_forwards(build(), ids, 16))


def test_left_padding(model):
    lengths, width, tokens = (3, 9, 1), 9, 24
    prompts = [prompt(length, seed=length) for length in lengths]
    ids = torch.full((len(lengths), width), 5)  # padding is a token like any other to the embedding
    mask = torch.zeros_like(ids)
    for row, single in enumerate(prompts):
        ids[row, width - single.shape[1] :] = single
        mask[row, width - single.shape[1] :] = 1
    together = generate(model, ids, tokens, attention_mask=mask)
    for row, single in enumerate(prompts):
        assert torch.equal(together[row, width:], generate(model, single, tokens)[0, single.shape[1] :])
    assert not torch.equal(together[:, width:], generate(model, ids, tokens)[:, width:])  # the mask does something


def test_left_padding_with_prefill_in_parts(model):
    ids, mask = prompt(40, batch=2), torch.ones(2, 40, dtype=torch.long)
    mask[0, :23] = 0
    expected = generate(model, ids, 12, attention_mask=mask)
    for size, cache in ((10, None), (1, None), (1, "static")):  # a token that comes alone may be padding, too
        options = {"prefill_chunk_size": size, "cache_implementation": cache}
        assert torch.equal(generate(model, ids, 12, attention_mask=mask, **options), expected), options
    assert torch.equal(expected[0, 40:], generate(model, ids[:1, 23:], 12)[0, 17:])


def beams_by_full_forwards(model, ids, num_beams, tokens):
    """Beam search without an end token: the num_beams best continuations by summed log-probability survive."""
    beams, scores = ids, torch.zeros(1)
    for _ in range(tokens):
        totals = scores[:, None] + last_logits(model, beams).log_softmax(-1)
        scores, flat = totals.flatten().topk(num_beams)
        beams = torch.cat([beams[flat // VOCAB], flat[:, None] % VOCAB], 1)
    return beams, scores / tokens


def test_beam_search(model):
    # prompts of which a beam that is not the first wins in the middle, so states must follow their beams
    crossed = 0
    for seed in range(4):
        ids = prompt(6, seed=seed)
        expected, scores = beams_by_full_forwards(model, ids, 3, 12)
        out = generate(
            model, ids, 12, num_beams=3, num_return_sequences=3, return_dict_in_generate=True, output_scores=True
        )
        assert torch.equal(out.sequences, expected)
        torch.testing.assert_close(out.sequences_scores, scores, rtol=1e-4, atol=1e-5)
        crossed += not torch.equal(expected[0], greedy_by_full_forwards(model, ids, 12)[0])
    assert crossed > 0


def test_sampling(model):
    ids = prompt(6, batch=2)
    torch.manual_seed(3)
    expected = ids
    for _ in range(24):
        expected = torch.cat([expected, torch.multinomial(last_logits(model, expected).softmax(-1), 1)], 1)
    torch.manual_seed(3)
    assert torch.equal(generate(model, ids, 24, do_sample=True, top_k=0), expected)
    torch.manual_seed(4)
    assert not torch.equal(generate(model, ids, 24, do_sample=True, top_k=0), expected)


def test_several_sequences_of_one_prompt(model):
    ids = prompt(6)
    torch.manual_seed(3)
    expected = ids.repeat(3, 1)
    for _ in range(12):
        expected = torch.cat([expected, torch.multinomial(last_logits(model, expected).softmax(-1), 1)], 1)
    torch.manual_seed(3)
    assert torch.equal(generate(model, ids, 12, do_sample=True, top_k=0, num_return_sequences=3), expected)


@torch.no_grad()
def test_prefill_then_a_step_equals_the_steps_alone(model):
    ids = prompt(1001)
    prefilled = DynamicCache(config=model.config)
    model(ids[:, :1000], past_key_values=prefilled)
    stepped = DynamicCache(config=model.config)
    for t in range(1000):
        model(ids[:, t : t + 1], past_key_values=stepped)
    assert prefilled.get_seq_length() == stepped.get_seq_length() == 1000
    after_prefill = model(ids[:, 1000:], past_key_values=prefilled).logits[:, -1]
    after_steps = model(ids[:, 1000:], past_key_values=stepped).logits[:, -1]
    scale = after_steps.abs().max()
    assert (after_prefill - after_steps).abs().max() < 1e-4 * scale
    assert (after_prefill - last_logits(model, ids)).abs().max() < 1e-4 * scale


@pytest.mark.parametrize("size", [1, 7, 64])
def test_prefill_in_parts(model, size):
    ids = prompt(90 if size > 1 else 20, batch=2)
    expected = greedy_by_full_forwards(model, ids, 12)
    assert torch.equal(generate(model, ids, 12, prefill_chunk_size=size), expected)


def test_going_on_from_a_cache(model):
    ids = prompt(10)
    expected = generate(model, ids, 30)
    first = generate(model, ids, 14, return_dict_in_generate=True)
    second = model.generate(
        first.sequences,
        past_key_values=first.past_key_values,
        generation_config=GenerationConfig(max_new_tokens=16, do_sample=False, pad_token_id=0),
    )
    assert torch.equal(second, expected)


def test_static_cache(model):
    ids = prompt(10, batch=2)
    expected = generate(model, ids, 16)
    assert torch.equal(generate(model, ids, 16, cache_implementation="static"), expected)
    # the cache is kept on the model and reset: a second call must not begin from the first one's state
    assert torch.equal(generate(model, ids, 16, cache_implementation="static"), expected)
    assert torch.equal(
        generate(model, ids, 12, cache_implementation="static", num_beams=3), generate(model, ids, 12, num_beams=3)
    )


def test_without_a_cache(model):
    ids = prompt(10)
    assert torch.equal(generate(model, ids, 8, use_cache=False), generate(model, ids, 8))


def test_a_change_of_the_weights_between_calls_is_seen():
    # the discretised system is kept between the steps of one call, and must not outlive it
    model, ids = build(), prompt(10)
    before = generate(model, ids, 16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("log_dt"):
                parameter += 1.0
    after = generate(model, ids, 16)
    assert not torch.equal(before, after)
    assert torch.equal(after, greedy_by_full_forwards(model, ids, 16))


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@torch.no_grad()
def test_a_cache_that_was_reset_is_as_new(kind):
    model, ids = build(), prompt(20)
    cache = kind(config=model.config, **({"max_cache_len": 64} if kind is StaticCache else {}))

    def run():
        model(ids[:, :10], past_key_values=cache)
        return torch.cat([model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(10, 20)], 1)

    fresh = run()
    assert cache.get_seq_length() == 20
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(run(), fresh)
    # nor may the system of the old weights be kept
    for name, parameter in model.named_parameters():
        if name.endswith("log_dt"):
            parameter += 1.0
    cache.reset()
    changed = run()
    torch.testing.assert_close(changed, model(ids, use_cache=False).logits[:, 10:], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(changed, fresh, atol=1e-2)
