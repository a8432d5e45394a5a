"""The decoding strategies against plain computations over full forwards, without a cache."""

import threading
from functools import partial

import pytest
import tiny
import torch
import torch.nn.functional as F
from tiny import ENDLESS, tiny_model
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from ssm_lm.modeling.decoding_common import cache_of

VOCAB = 23


def build(ssm="s4", seed=1, dtype=torch.float32, **values):
    sizes = {"vocab_size": VOCAB, "hidden_size": 24, "num_hidden_layers": 1, "initializer_range": 0.4}
    return tiny_model(seed=seed, ssm=ssm, **(sizes | ENDLESS | values)).to(dtype)


@pytest.fixture(scope="module", params=["s4", "s4d", "s5"])
def model(request):
    return build(request.param)


prompt = partial(tiny.prompt, vocabulary=VOCAB)


def generate(model, ids, tokens, strategy=None, mask=None, own=None, **options):
    """own: what the strategy takes itself or generate() takes beside a configuration; the rest configures."""
    own = dict(own or {})
    if strategy is not None:
        own["custom_generate"] = model.strategies[strategy]
    config = GenerationConfig(max_new_tokens=tokens, do_sample=False, **{"pad_token_id": 0, **options})
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, generation_config=config, **own)


def left_padded(lengths):
    width = max(lengths)
    ids, mask = torch.full((len(lengths), width), 5), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, width - length :], mask[row, width - length :] = prompt(length, seed=length)[0], 1
    return ids, mask


@torch.no_grad()
def log_probs(model, ids):
    return model(torch.tensor([ids]), use_cache=False).logits[0, -1].log_softmax(-1)


class ForbidRepeats(LogitsProcessor):
    """No token twice in a row: a constraint that depends on the text."""

    def __call__(self, input_ids, scores):
        return scores.scatter(1, input_ids[:, -1:], -torch.inf)


# ---- contrastive search


@torch.no_grad()
def contrastive_by_full_forwards(model, ids, tokens, alpha, k, eos=None):
    ids = ids.tolist()
    for _ in range(tokens):
        before = F.normalize(model.model(torch.tensor([ids]), use_cache=False).last_hidden_state[0], dim=-1)
        probabilities = log_probs(model, ids).exp()
        best, best_value = None, -torch.inf
        for token in probabilities.topk(k).indices.tolist():
            own = model.model(torch.tensor([[*ids, token]]), use_cache=False).last_hidden_state[0, -1]
            value = (1 - alpha) * probabilities[token] - alpha * (before @ F.normalize(own, dim=-1)).max()
            if value > best_value:
                best, best_value = token, value
        ids.append(best)
        if best == eos:
            break
    return torch.tensor(ids)


@pytest.mark.parametrize(("alpha", "k"), [(0.6, 4), (0.9, 7), (0.3, 2)])
def test_contrastive_search_equals_brute_force(model, alpha, k):
    different = 0
    for length in (1, 9):
        ids = prompt(length, seed=length)
        expected = contrastive_by_full_forwards(model, ids[0], 12, alpha, k)
        found = generate(model, ids, 12, "contrastive", own={"penalty_alpha": alpha, "top_k": k})
        assert torch.equal(found[0], expected)
        different += not torch.equal(found, generate(model, ids, 12))
    assert different


def test_contrastive_search_of_a_left_padded_batch(model):
    ids, mask = left_padded([3, 11, 1])
    free = contrastive_by_full_forwards(model, ids[1], 10, 0.7, 5)
    eos = int(free[14])
    found = generate(model, ids, 10, "contrastive", mask, {"penalty_alpha": 0.7, "top_k": 5}, eos_token_id=eos)
    for row, length in enumerate([3, 11, 1]):
        expected = contrastive_by_full_forwards(model, ids[row, 11 - length :], 10, 0.7, 5, eos)
        assert torch.equal(found[row, 11 - length :][: len(expected)], expected)
        assert (found[row, 11 - length :][len(expected) :] == 0).all()


def test_contrastive_limits_and_settings(model):
    ids = prompt(6, batch=2)
    greedy = generate(model, ids, 10)
    assert torch.equal(generate(model, ids, 10, "contrastive", own={"penalty_alpha": 0.0}), greedy)
    assert torch.equal(generate(model, ids, 10, "contrastive", own={"top_k": 1}), greedy)
    by_config = generate(model, ids, 10, "contrastive", penalty_alpha=0.9, top_k=7)
    assert torch.equal(by_config, generate(model, ids, 10, "contrastive", own={"penalty_alpha": 0.9, "top_k": 7}))
    assert not torch.equal(by_config, greedy)
    allowed = generate(
        model,
        ids,
        10,
        "contrastive",
        own={"penalty_alpha": 1.0, "prefix_allowed_tokens_fn": lambda batch, text: [3, 8]},
    )
    assert set(allowed[:, 6:].flatten().tolist()) <= {3, 8}
    for own in ({"penalty_alpha": 1.5}, {"penalty_alpha": -0.1}, {"top_k": 0}, {"top_k": VOCAB + 1}):
        with pytest.raises(ValueError, match=next(iter(own))):
            generate(model, ids, 4, "contrastive", own=own)


def test_going_on_after_contrastive_search(model):
    ids = prompt(6)
    first = generate(model, ids, 5, "contrastive", return_dict_in_generate=True, output_scores=True)
    assert len(first.scores) == 5
    assert first.past_key_values.get_seq_length() == 10
    rest = generate(model, first.sequences, 5, own={"past_key_values": first.past_key_values})
    assert torch.equal(rest, generate(model, first.sequences, 5))
    with pytest.raises(ValueError, match="no past_key_values"):
        generate(model, rest, 5, "contrastive", own={"past_key_values": first.past_key_values})


# ---- diverse beam search


def diverse_beams_by_full_forwards(model, ids, tokens, beams, groups, penalty, eos=None, length_penalty=1.0):
    """Group beam search as transformers' BeamSearchScorer defined it, early_stopping=True, for one prompt. A text ends
    at eos or, as in transformers' beam search today, where it is as long as it may be.
    """
    size = beams // groups
    running = [[(0.0, ids.tolist())] for _ in range(groups)]
    ended = [[] for _ in range(groups)]
    for step in range(tokens):
        taken = torch.zeros(VOCAB)
        for g in range(groups):
            if len(ended[g]) == size:
                continue
            candidates = []
            for score, text in running[g]:
                values = score + log_probs(model, text) - penalty * taken
                candidates += [(float(values[v]), [*text, v]) for v in range(VOCAB)]
            candidates.sort(key=lambda pair: -pair[0])
            for score, text in candidates[:size]:
                if text[-1] == eos or step == tokens - 1:
                    ended[g].append((score / (step + 1) ** length_penalty, text))
            ended[g] = sorted(ended[g], key=lambda pair: -pair[0])[:size]
            running[g] = [pair for pair in candidates if pair[1][-1] != eos][:size]
            for _, text in running[g]:
                taken[text[-1]] += 1
    return sorted((beam for group in ended for beam in group), key=lambda pair: -pair[0])


@pytest.mark.parametrize(("beams", "groups", "penalty"), [(4, 2, 0.5), (6, 3, 2.0), (3, 3, 1.0)])
def test_diverse_beam_search_equals_an_independent_implementation(model, beams, groups, penalty):
    ids = prompt(5, seed=3)
    expected = diverse_beams_by_full_forwards(model, ids[0], 8, beams, groups, penalty)
    found = generate(
        model,
        ids,
        8,
        "diverse-beam",
        own={"num_beam_groups": groups, "diversity_penalty": penalty},
        num_beams=beams,
        num_return_sequences=beams,
        return_dict_in_generate=True,
        output_scores=True,
    )
    assert found.sequences.tolist() == [text for _, text in expected]
    torch.testing.assert_close(found.sequences_scores, torch.tensor([s for s, _ in expected]), rtol=1e-4, atol=1e-4)
    plain = generate(model, ids, 8, num_beams=beams, num_return_sequences=beams)
    assert not torch.equal(found.sequences, plain)


def test_diverse_beams_that_end_early():
    """In some groups and not in others, with a length penalty."""
    early = 0
    for seed in range(6):
        model, ids = build("s4d", seed=seed, hidden_size=16), prompt(4, seed=seed)
        eos = int(generate(model, ids, 4)[0, -2])
        for length_penalty in (0.0, 1.0, 2.0):
            expected = diverse_beams_by_full_forwards(model, ids[0], 7, 4, 2, 0.7, eos, length_penalty)
            found = generate(
                model,
                ids,
                7,
                "diverse-beam",
                own={"num_beam_groups": 2, "diversity_penalty": 0.7},
                num_beams=4,
                num_return_sequences=4,
                eos_token_id=eos,
                length_penalty=length_penalty,
                early_stopping=True,
            )
            for row, (_, text) in zip(found.tolist(), expected, strict=True):
                assert row[: len(text)] == text
                early += len(text) < 11
    assert early > 5


def test_one_group_is_beam_search(model):
    ids, mask = left_padded([3, 8])
    eos = int(generate(model, ids, 6, mask=mask)[0, 11])
    ended = 0
    for options in (
        {},
        {"eos_token_id": eos},
        {"eos_token_id": eos, "length_penalty": -1.0, "early_stopping": True},
        {"eos_token_id": [eos, 7], "length_penalty": 2.0, "early_stopping": "never", "repetition_penalty": 1.3},
    ):
        options = {"num_beams": 4, "num_return_sequences": 3, "return_dict_in_generate": True, **options}
        options["output_scores"] = True
        expected = generate(model, ids, 9, mask=mask, **options)
        found = generate(model, ids, 9, "diverse-beam", mask, {"num_beam_groups": 1}, **options)
        assert torch.equal(found.sequences, expected.sequences)
        torch.testing.assert_close(found.sequences_scores, expected.sequences_scores)
        ended += found.sequences.shape[1] < 17 or bool((found.sequences[:, -1] != expected.sequences[:, -1]).any())
    by_config = generate(model, ids, 9, "diverse-beam", mask, num_beams=4, num_beam_groups=2, diversity_penalty=0.5)
    own = {"num_beam_groups": 2, "diversity_penalty": 0.5}
    assert torch.equal(by_config, generate(model, ids, 9, "diverse-beam", mask, own, num_beams=4))


def test_diverse_beam_search_refuses():
    model, ids = build(), prompt(4)
    for own, options, message in (
        ({"num_beam_groups": 3}, {"num_beams": 4}, "multiple of num_beam_groups"),
        ({"num_beam_groups": 0}, {"num_beams": 4}, "multiple of num_beam_groups"),
        ({"diversity_penalty": 0.0}, {"num_beams": 4}, "diversity_penalty"),
        ({"streamer": _Words()}, {"num_beams": 4}, "cannot stream|streamer"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(model, ids, 4, "diverse-beam", own=own, **options)


# ---- token recycling


def test_token_recycling_is_greedy_search(model):
    matrix = torch.full((VOCAB, 3), -1)
    ended = 0
    for seed in range(8):
        ids = prompt(1 + 5 * seed % 17, seed=seed)
        expected = generate(model, ids, 24)
        for own in ({}, {"num_drafts": 3, "max_draft_length": 5}, {"matrix": matrix}):
            assert torch.equal(generate(model, ids, 24, "token-recycling", own=own), expected)
        eos = int(expected[0, -6])
        expected = generate(model, ids, 24, eos_token_id=eos)
        found = generate(model, ids, 24, "token-recycling", own={"matrix": matrix}, eos_token_id=eos)
        assert torch.equal(found, expected)
        ended += found.shape[1] < ids.shape[1] + 24
    assert ended > 3
    assert (matrix[:, 0] >= 0).any()


def test_token_recycling_keeps_to_processors_and_criteria(model):
    ids = prompt(5)

    class UpToThree(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.tensor([input_ids[0, -1] % 3 == 0 and input_ids.shape[1] > 12])

    for own, options in (
        ({"logits_processor": LogitsProcessorList([ForbidRepeats()])}, {}),
        ({}, {"repetition_penalty": 1.4}),
        ({}, {"no_repeat_ngram_size": 2}),
        ({"stopping_criteria": StoppingCriteriaList([UpToThree()])}, {}),
        ({}, {"prefill_chunk_size": 2}),
    ):
        expected = generate(model, ids, 24, own=own, **options)
        assert torch.equal(generate(model, ids, 24, "token-recycling", own=own, **options), expected)


def test_going_on_after_token_recycling(model):
    ids = prompt(6)
    want = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    first, expected = (generate(model, ids, 9, strategy, **want) for strategy in ("token-recycling", None))
    assert torch.equal(first.sequences, expected.sequences)
    for name in ("scores", "logits"):
        torch.testing.assert_close(torch.cat(first[name]), torch.cat(expected[name]), rtol=1e-4, atol=1e-4)
    assert first.past_key_values.get_seq_length() == 14
    for strategy in ("token-recycling", None):
        rest = generate(model, first.sequences, 5, strategy, own={"past_key_values": first.past_key_values})
        assert torch.equal(rest, generate(model, rest[:, :-5], 5))
        first = generate(model, ids, 9, "token-recycling", **want)


def test_token_recycling_refuses():
    model, ids = build(), prompt(4)
    for batch, own, message in (
        (2, {}, "one prompt at a time"),
        (1, {"num_drafts": 0}, "num_drafts"),
        (1, {"num_drafts": VOCAB + 1}, "num_drafts"),
        (1, {"max_draft_length": 0}, "max_draft_length"),
        (1, {"matrix": torch.full((VOCAB, 1), -1), "num_drafts": 2}, "matrix must be"),
        (1, {"matrix": torch.full((5, 1), -1)}, "matrix must be"),
        (1, {"matrix": torch.zeros(VOCAB, 1)}, "integers"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(model, ids.repeat(batch, 1), 4, "token-recycling", own=own)


# ---- all of them


class _Words:
    """Tokens as words, for a streamer."""

    all_special_ids = ()

    def decode(self, ids, **kwargs):
        return "".join(f"<{int(i)}>" for i in torch.as_tensor(ids).flatten())


@pytest.mark.parametrize("strategy", ["contrastive", "diverse-beam", "token-recycling"])
def test_edges(model, strategy):
    beams = {"num_beams": 2} if strategy == "diverse-beam" else {}
    for ids in (prompt(1), prompt(7)):
        one = generate(model, ids, 1, strategy, **beams)
        assert one.shape[1] == ids.shape[1] + 1
        eos = int(generate(model, ids, 1)[0, -1])  # the first token ends the text
        if strategy == "token-recycling":
            assert torch.equal(generate(model, ids, 8, strategy, eos_token_id=eos), one)
    if strategy != "token-recycling":
        ids = prompt(6, batch=16)
        whole = generate(model, ids, 6, strategy, **beams)
        for row in (0, 9):
            assert torch.equal(whole[row : row + 1], generate(model, ids[row : row + 1], 6, strategy, **beams))
    ids = prompt(4)
    config = GenerationConfig(max_new_tokens=4, do_sample=True, pad_token_id=0, **beams)
    with pytest.raises(ValueError, match="draws nothing"):
        model.generate(ids, generation_config=config, custom_generate=model.strategies[strategy])
    with pytest.raises(ValueError, match="use_cache"):
        generate(model, ids, 4, strategy, use_cache=False, **beams)
    with pytest.raises(ValueError, match="output_hidden_states"):
        generate(model, ids, 4, strategy, output_hidden_states=True, return_dict_in_generate=True, **beams)
    if strategy != "diverse-beam":
        with pytest.raises(ValueError, match="num_beams must be 1"):
            generate(model, ids, 4, strategy, num_beams=2)


@pytest.mark.parametrize("strategy", [None, "contrastive", "token-recycling"])
def test_streaming(strategy):
    model, ids = build(), prompt(5)
    streamer = TextIteratorStreamer(_Words(), timeout=60)
    thread = threading.Thread(target=generate, args=(model, ids, 12, strategy), kwargs={"own": {"streamer": streamer}})
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == _Words().decode(generate(model, ids, 12, strategy))


def test_the_cache_of_generate_goes_by_either_name():
    assert [cache_of(given) for given in ({"cache": 1}, {"past_key_values": 2}, {})] == [1, 2, None]


def test_a_custom_loop_of_the_caller_still_works():
    model, ids = build(), prompt(5)

    def loop(model, input_ids, logits_processor, stopping_criteria, generation_config, extra=None, **model_kwargs):
        assert isinstance(model_kwargs.get("cache", model_kwargs.get("past_key_values")), DynamicCache)
        return extra

    assert generate(model, ids, 3, own={"custom_generate": loop, "extra": "given"}) == "given"
    with pytest.raises(ValueError, match="cannot stream"):
        generate(model, ids, 3, own={"custom_generate": loop, "streamer": TextIteratorStreamer(_Words())})
