"""The short loop of greedy search and sampling beside transformers' own, and who gets which."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from in_c import needs
from tiny import ENDLESS, prompt, tiny_model
from transformers import DynamicCache

from ssm_lm import S4ForCausalLM
from ssm_lm.modeling import modeling_s4, native_step, native_tokens

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
    return count


def both(model, ids, monkeypatch, **options):
    """What the short loop and the long one give: tokens, scores, logits, what a streamer heard, the states after."""
    options = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True} | options
    options |= {"output_scores": True, "output_logits": True}
    found = []
    for way in (modeling_s4.serves, lambda *_: False):
        monkeypatch.setattr(modeling_s4, "serves", way)
        torch.manual_seed(7)
        heard = Heard()
        out = model.generate(ids, **options | ({"streamer": heard} if "streamer" in options else {}))
        states = [state for layer in out.past_key_values.layers for state in layer.states]
        length = int(out.past_key_values.get_seq_length())
        found.append([out.sequences, *out.scores, *out.logits, *states, torch.tensor(length), heard.tokens])
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
    """And behind a streamer or a processor of somebody else's at every token."""
    looks, is_current = [], native_tokens.TokenProgram.is_current
    counted = lambda *given: looks.append(1) or is_current(*given)  # noqa: E731
    monkeypatch.setattr(native_tokens.TokenProgram, "is_current", counted)
    model = tiny_model(**ENDLESS)
    model.generate(prompt(5), max_new_tokens=8, do_sample=False, repetition_penalty=1.2)
    assert not looks  # the program was written in it
    model.generate(prompt(5), max_new_tokens=8, do_sample=False, logits_processor=[lambda ids, scores: scores])
    assert len(looks) == 6
