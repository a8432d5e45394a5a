"""The short loop of greedy search and sampling beside transformers' own, and who gets which."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from in_c import needs, searched
from tiny import ENDLESS, prompt, tiny_model
from transformers import DynamicCache, TextStreamer

from ssm_lm import S4ForCausalLM
from ssm_lm.modeling import decoding_sampling, modeling_s4, native_step, native_tokens

pytestmark = needs("step")  # most of these count its tokens

KINDS = {
    "s4d": {},
    "s4": {"ssm": "s4"},
    "ssd": {"ssm": "ssd", "arch": ["gated", "swiglu"], "head_dim": 4, "expand": 2},
    "adaptive": {"adaptive_cutoffs": [10, 20], "adaptive_div_val": 2},
}
PADDED = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
OPTIONS = {
    "greedy": {},
    "drawn": {"do_sample": True, "top_p": 0.9},
    "padded": {"attention_mask": PADDED, "do_sample": True},
    "penalised": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "ends": {"eos_token_id": [4, 5, 6, 7, 8], "pad_token_id": 3, "do_sample": True},
    "heard": {"streamer": True},
    "chunks": {"prefill_chunk_size": 2},
    "static": {"cache_implementation": "static"},
}


class Heard:
    """A streamer."""

    def __init__(self):
        self.tokens = []

    def put(self, tokens):
        self.tokens.append(tokens.tolist())

    def end(self):
        self.tokens.append("end")


@pytest.fixture
def stepped(monkeypatch):
    """Counts the tokens after the prompt, and whether they went from id to logits in the library."""
    count, advance = [], native_step.Program.advance

    def counted(self, cache):
        if self.shape[1] == 1:
            count.append(hasattr(self, "tokens"))
        advance(self, cache)

    monkeypatch.setattr(native_step.Program, "advance", counted)
    searched(monkeypatch, lambda _, tokens: count.extend([True] * tokens))
    return count


def both(model, ids, monkeypatch, looks_on=True, **options):
    """What the short loop and the long one give: tokens, scores, logits, what a streamer heard, the states after.

    looks_on: whether scores and logits are asked for, of each token.
    """
    options = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True} | options
    options |= {"output_scores": looks_on, "output_logits": looks_on}
    found = []
    for way in (modeling_s4.serves, lambda *_: False):
        monkeypatch.setattr(modeling_s4, "serves", way)
        torch.manual_seed(7)
        heard = Heard()
        out = model.generate(ids, **options | ({"streamer": heard} if "streamer" in options else {}))
        states = [state for layer in out.past_key_values.layers for state in layer.states]
        length = int(out.past_key_values.get_seq_length())
        seen = [*(out.scores or ()), *(out.logits or ())]
        found.append([out.sequences, *seen, *states, torch.tensor(length), heard.tokens])
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_it_gives_what_transformers_gives(kind, options, dtype, monkeypatch, stepped):
    model = tiny_model(**KINDS[kind], **ENDLESS).to(dtype)
    short, long = both(model, prompt(5, 2), monkeypatch, **options)
    assert short.pop() == long.pop()
    for found, expected in zip(short, long, strict=True):
        assert torch.equal(found, expected)
    assert any(stepped) == (kind != "adaptive")  # whose head is no table


ENDS = {"eos_token_id": [4, 5, 6, 7, 99], "pad_token_id": 3}  # 99: beyond the vocabulary


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attention_mask": PADDED},
        {"streamer": True},
        ENDS,
        ENDS | {"min_new_tokens": 9, "min_length": 17},
        ENDS | {"streamer": True, "min_length": 11},
        {"cache_implementation": "static"},
    ],
    ids=["plain", "padded", "heard", "ends", "least", "all", "static"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_search_goes_on_without_anyone_to_look(kind, options, dtype, monkeypatch, stepped):
    """Several tokens in one run of the library: the same tokens and states."""
    for module in (native_tokens, decoding_sampling):
        monkeypatch.setattr(module, "AT_ONCE", 3)
    monkeypatch.setattr(native_tokens, "STRETCH", 7)
    model = tiny_model(**KINDS[kind], **ENDLESS).to(dtype)
    sizes = []
    searched(monkeypatch, lambda room, _: sizes.append(room))
    short, long = both(model, prompt(5, 2), monkeypatch, looks_on=False, max_new_tokens=20, **options)
    assert short.pop() == long.pop()
    assert len(short) == len(long)
    assert all(map(torch.equal, short, long))
    if kind != "adaptive":  # whose head is no table
        after = short[0].shape[1] - 6
        assert len(stepped) == 2 * after
        stretch = 3 if "streamer" in options else 7  # a streamer of somebody else's
        assert sizes == [min(stretch, 19 - done) for done in range(0, after, stretch)]


def test_a_streamer_that_is_known_hears_every_token(monkeypatch):
    """In one stretch, may write to what it hears, and may end it all: then the cache knows how far it has come."""
    model, ids = tiny_model(**ENDLESS), prompt(5, 2)
    expected = model.generate(ids, max_new_tokens=20, do_sample=False)

    class Scribbler(Heard):
        __module__ = TextStreamer.__module__
        stops_after = 99

        def put(self, tokens):
            super().put(tokens)
            if len(self.tokens) > self.stops_after:
                raise KeyboardInterrupt
            if tokens.dim() == 1:  # not the prompt
                tokens.fill_(10**9)

    sizes = []
    searched(monkeypatch, lambda room, _: sizes.append(room))
    heard = Scribbler()
    assert torch.equal(model.generate(ids, max_new_tokens=20, do_sample=False, streamer=heard), expected)
    assert torch.equal(torch.tensor(heard.tokens[1:-1]).T, expected[:, 5:])
    assert sizes == [19]
    heard, cache = Scribbler(), DynamicCache(config=model.config)
    heard.stops_after = 9
    with pytest.raises(KeyboardInterrupt):
        model.generate(ids, max_new_tokens=20, do_sample=False, streamer=heard, past_key_values=cache)
    assert cache.get_seq_length() == 5 + 8  # the prompt, its first token and seven of eight more
    found = model.generate(expected[:, :14], max_new_tokens=6, do_sample=False, past_key_values=cache)
    assert torch.equal(found, expected[:, :20])


def test_a_hook_of_another_thread_is_heard_at_the_next_token():
    """As one may be set while a text is streamed."""
    model, called, handles = tiny_model(**ENDLESS), [], []

    class Hooker(Heard):
        __module__ = TextStreamer.__module__

        def put(self, tokens):
            super().put(tokens)
            if len(self.tokens) == 5:
                handles.append(hooked(model.model.layers[0], called))

    model.generate(prompt(5), max_new_tokens=12, do_sample=False, streamer=Hooker())
    handles[0].remove()
    assert len(called) == 12 - 4


@pytest.mark.parametrize("value", [1.0, -1.0, float("nan"), float("-inf")])
def test_of_equal_logits_the_first_is_chosen_and_before_all_what_is_no_number(value, monkeypatch, stepped):
    """As torch.argmax does."""
    model = tiny_model(**ENDLESS)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[9:11] = value
    short, long = both(model, prompt(5), monkeypatch, looks_on=False)
    assert torch.equal(short[0], long[0])
    assert set(short[0][0, 5:].tolist()) <= {0, 9}
    assert any(stepped)


@pytest.mark.parametrize("rows", [1, native_step.FEW_ROWS + 2])
def test_other_numbers_of_rows(rows, monkeypatch, stepped):
    short, long = both(tiny_model(**ENDLESS).to(torch.bfloat16), prompt(5, rows), monkeypatch)
    assert all(map(torch.equal, short[:-1], long[:-1]))
    assert sum(stepped) == 7


@pytest.mark.parametrize("rows", [1, native_step.FEW_ROWS + 2])
def test_a_text_goes_on_from_a_cache_that_is_handed_on(rows, stepped):
    """Also out of torch.inference_mode and into it: what is written to belongs to neither."""
    model, ids = tiny_model(**ENDLESS), prompt(5, rows)
    whole = model.generate(ids, max_new_tokens=12, do_sample=False)
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    with torch.inference_mode():
        part = model.generate(ids, **options)
    part = model.generate(part.sequences.clone(), past_key_values=part.past_key_values, **options)
    with torch.inference_mode():
        part = model.generate(part.sequences, past_key_values=part.past_key_values, **options)
    assert torch.equal(part.sequences, whole)
    assert sum(stepped) == 11 + 3 + 3 + 3


def hooked(model, heard):
    """Somebody who wants to hear of every token."""
    return model.register_forward_hook(lambda *_: heard.append(1))


@pytest.mark.parametrize("part", ["", "model", "model.embed_tokens", "model.layers.0", "lm_head", "all"])
def test_a_hook_is_heard(part):
    model, heard = tiny_model(**ENDLESS), []
    if part == "all":
        handle = torch.nn.modules.module.register_module_forward_hook(
            lambda module, *_: heard.append(1) if module is model else None
        )
    else:
        handle = hooked(model.get_submodule(part), heard)
    try:
        model.generate(prompt(5), max_new_tokens=8, do_sample=False)
    finally:
        handle.remove()
    assert sum(heard) == 8


def test_what_others_do_between_two_tokens(monkeypatch):
    """A criterion that changes the newest token or counts in whole numbers, a streamer that writes to what it is given,
    a processor with more entries than there are, a function of allowed tokens that replaces a state.
    """
    model, ids = tiny_model(**ENDLESS), prompt(5, 2)
    first = model.generate(ids, max_new_tokens=3, do_sample=False)[0, -1]

    def replace(ids, scores, **_):
        ids[:, -1] = torch.where(ids[:, -1] == first, 7, ids[:, -1])
        return (ids[:, -1] == 3).long()

    class Scribbler(Heard):
        def put(self, tokens):
            super().put(tokens)
            if tokens.dim() == 1:  # not the prompt
                tokens.fill_(10**9)

    short, long = both(model, ids, monkeypatch, stopping_criteria=[replace])
    assert all(map(torch.equal, short[:-1], long[:-1]))
    for cls in (Heard, Scribbler):
        heard = cls()
        found = model.generate(ids, max_new_tokens=8, do_sample=False, streamer=heard)
        assert torch.equal(torch.tensor(heard.tokens[1:-1]).T, found[:, 5:])
    with pytest.raises(IndexError):
        model.generate(ids, max_new_tokens=4, logits_processor=[lambda _, scores: F.pad(scores, (0, 3), value=1e9)])

    def allowed(_, ids):
        if len(ids) == 8:
            for layer in cache.layers:
                layer.states = [state * 0 for state in layer.states]
        return list(range(60))

    found = []
    for way in (modeling_s4.serves, lambda *_: False):
        monkeypatch.setattr(modeling_s4, "serves", way)
        cache = DynamicCache(config=model.config)
        options = {"past_key_values": cache, "prefix_allowed_tokens_fn": allowed}
        found.append(model.generate(ids[:1], max_new_tokens=8, do_sample=False, **options))
    assert torch.equal(*found)


def test_dropout_of_the_backbone_alone_is_not_in_the_library(stepped):
    model = tiny_model(dropout=0.5, **ENDLESS)
    model.model.train()
    model.generate(prompt(5), max_new_tokens=4, do_sample=False)
    assert not stepped


def test_nobody_is_kept(stepped):
    """A cache that lives on does not keep its model."""
    model = tiny_model(**ENDLESS)
    found = model.generate(prompt(5), max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    there = weakref.ref(model.model)
    gc.collect()
    gc.disable()
    try:
        del model
        assert there() is None
    finally:
        gc.enable()
    assert found.past_key_values is not None
    assert all(stepped)


class Subclass(S4ForCausalLM):
    def forward(self, *given, **kwargs):
        self.called = getattr(self, "called", 0) + 1
        return super().forward(*given, **kwargs)


def test_a_subclass_and_what_was_put_on_a_model_are_called():
    """As PEFT does with prompts that were learned, and torch.compile where it is asked for a forward."""
    model = tiny_model(Subclass, **ENDLESS)
    model.generate(prompt(5), max_new_tokens=8, do_sample=False)
    assert model.called == 8
    for name in ("forward", "prepare_inputs_for_generation"):
        model, called = tiny_model(**ENDLESS), []
        own = getattr(model, name)
        setattr(model, name, lambda *given, own=own, called=called, **kwargs: called.append(1) or own(*given, **kwargs))
        model.generate(prompt(5), max_new_tokens=8, do_sample=False)
        assert len(called) == 8


def test_other_settings_are_transformers_own(monkeypatch, stepped):
    model = tiny_model(**ENDLESS)
    for options in ({"use_cache": False}, {"output_hidden_states": True, "return_dict_in_generate": True}):
        model.generate(prompt(5), max_new_tokens=4, do_sample=False, **options)
    assert not any(stepped)
    with torch.autocast("cpu", torch.bfloat16):
        model.generate(prompt(5), max_new_tokens=4, do_sample=False)
    monkeypatch.setenv("SSM_LM_KERNELS", "torch")
    model.generate(prompt(5), max_new_tokens=4, do_sample=False)
    assert not any(stepped)


def test_a_token_that_fills_up_is_one_of_the_vocabulary():
    """Beyond the table of embeddings the library would read on."""
    model, ids = tiny_model(**ENDLESS), prompt(5, 2)
    first = model.generate(ids, max_new_tokens=1, do_sample=False)[0, -1].item()
    with pytest.raises(IndexError):
        model.generate(ids, max_new_tokens=9, do_sample=False, eos_token_id=first, pad_token_id=model.vocab_size + 7)


def test_between_known_parts_it_looks_once(monkeypatch):
    """And behind a processor of somebody else's at every token, behind a streamer at every eighth."""
    looks, is_current = [], native_tokens.TokenProgram.is_current
    counted = lambda *given: looks.append(1) or is_current(*given)  # noqa: E731
    monkeypatch.setattr(native_tokens.TokenProgram, "is_current", counted)
    model = tiny_model(**ENDLESS)
    model.generate(prompt(5), max_new_tokens=8, do_sample=False, repetition_penalty=1.2)
    assert not looks  # the program was written in it
    model.generate(prompt(5), max_new_tokens=8, do_sample=False, logits_processor=[lambda ids, scores: scores])
    assert len(looks) == 6
    for drawn in (False, True):
        looks.clear()
        model.generate(prompt(5), max_new_tokens=20, do_sample=drawn, streamer=Heard())
        assert len(looks) == 2  # after 8 and 16 of 19
