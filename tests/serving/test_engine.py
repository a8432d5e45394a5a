"""Rows that come and go get the texts that each would have got alone, and nothing that is known is read again."""

import time

import pytest
import torch

from ssm_lm.modeling import native_library, native_step
from ssm_lm.serving.engine import READ_AT_ONCE, Engine, Finished, Full, Request
from ssm_lm.serving.prefixes import Prefixes
from ssm_lm.serving.sampling import Draw, choose
from ssm_lm.serving.text import GrowingText

GREEDY = Draw(temperature=0)

KINDS = {
    "s4": {"ssm": "s4"},
    "s4d": {"ssm": "s4d"},
    "s5": {"ssm": "s5"},
    "ssd": {"ssm": "ssd", "arch": ["gated", "swiglu"], "selective_dt": True},
    "mixture": {"ssm": "s4d", "arch": ["h3", "gated", "swiglu"]},
}


class Heard:
    """What a request received."""

    def __init__(self):
        self.text, self.end = "", None

    def __call__(self, event):
        assert self.end is None
        if isinstance(event, Finished):
            self.end = event
        else:
            self.text += event.text


def ask(ids, tokens=8, draw=GREEDY, **options):
    heard = Heard()
    return Request(list(ids), tokens, draw, heard, **options), heard


def expected(model, ids, tokens):
    ids = torch.tensor([ids])
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, pad_token_id=0)[0].tolist()


def prompts(number, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 80, (number,), generator=generator).tolist()
    return [torch.randint(1, 250, (length,), generator=generator).tolist() for length in lengths]


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_gets_the_tokens_that_it_would_get_alone(build, tokenizer, kind):
    model = build(**KINDS[kind])
    engine = Engine(model, tokenizer, rows=5)
    asked = [(ids, 3 + number % 7, *ask(ids, 3 + number % 7)) for number, ids in enumerate(prompts(14))]
    most = 0
    for *_, request, _ in asked:
        engine.submit(request)
        engine.step()  # so that rows join between the tokens of others
        most = max(most, len(engine.rows))
    while not engine.is_idle:
        engine.step()
        most = max(most, len(engine.rows))
    assert most == 5
    assert len(engine.batch) == 0
    for ids, tokens, _, heard in asked:
        assert heard.end.ids == expected(model, ids, tokens)[len(ids) :]
        assert heard.end[0] == "length"


@pytest.mark.skipif(native_library.library() is None, reason="no library of the step")
def test_the_model_is_looked_at_once_a_size_and_not_once_a_token(model, tokenizer, monkeypatch):
    """And again after a hook, which is heard."""
    looks, is_same = [], native_step._Seen.is_same
    monkeypatch.setattr(native_step._Seen, "is_same", lambda *given: looks.append(1) or is_same(*given))
    engine = Engine(model, tokenizer, rows=1)
    request, heard = ask(prompts(1)[0], 20)
    engine.run(request)
    assert len(heard.end.ids) == 20
    assert len(looks) <= 2  # a program for tokens of the prompt, and one for those that follow
    called = []
    handle = model.model.layers[0].register_forward_hook(lambda *_: called.append(1))
    request, heard = ask(prompts(1)[0], 20)
    engine.run(request)
    handle.remove()
    assert len(called) >= 20


def test_what_is_known_is_not_read_again(model, tokenizer):
    engine = Engine(model, tokenizer)
    long = [1 + number % 250 for number in range(READ_AT_ONCE + 90)]
    first, heard = ask(long)
    engine.run(first)
    assert heard.end.read == len(long)
    assert heard.end.ids == expected(model, long, 8)[len(long) :]
    again, heard_again = ask(long)
    engine.run(again)
    assert heard_again.end.read == 1  # the last token, whose logits are asked for
    assert heard_again.end.ids == heard.end.ids
    further = long + heard.end.ids + [7, 8, 9]
    third, heard_further = ask(further)
    engine.run(third)
    assert heard_further.end.read == 4  # and the last token of the text, which had not gone through the model
    assert heard_further.end.ids == expected(model, further, 8)[len(further) :]


def test_the_text_ends_before_a_stop_and_goes_on_from_there(model, tokenizer):
    ids = tokenizer("the cat sat")["input_ids"]
    whole = ask(ids, 40)
    Engine(model, tokenizer).run(whole[0])
    stop = whole[1].text[12:16]
    at = whole[1].text.index(stop)
    engine = Engine(model, tokenizer)
    request, heard = ask(ids, 40, stops=("never", stop))
    engine.run(request)
    assert heard.end.reason == "stop"
    assert heard.text == whole[1].text[:at]
    assert heard.end.written < 40
    assert tokenizer.decode(heard.end.ids) == heard.text
    further = ids + heard.end.ids + [5]
    after, heard_after = ask(further)
    engine.run(after)
    assert heard_after.end.read <= 4  # the rest of a token that the stop has cut, and the new one
    assert heard_after.end.ids == expected(model, further, 8)[len(further) :]


def test_an_end_of_text_ends_it(build, tokenizer):
    model = build(ssm="s4d", arch="s4-ffn")
    ids = [5, 6, 7]
    plain = expected(model, ids, 12)[3:]
    model.generation_config.eos_token_id = plain[6]
    engine = Engine(model, tokenizer)
    request, heard = ask(ids, 12)
    engine.run(request)
    assert heard.end[:2] == ("stop", plain[: plain.index(plain[6])])


def test_whole_characters_come_and_parts_of_a_stop_wait(tokenizer):
    ids = tokenizer("a 猫 b")["input_ids"]
    growing = GrowingText(tokenizer, [], ("b c",))
    said = [growing.add(token) for token in ids]
    assert "".join(said) == "a 猫 "
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(said)
    assert not growing.at_rest
    assert growing.rest() == "b"
    assert growing.at_rest


def test_draws_depend_on_the_seed_alone(model, tokenizer):
    def drawn(others, seed):
        engine = Engine(model, tokenizer)
        request, heard = ask([3, 4], 12, Draw(1.0, 0.9, seed))
        for ids in prompts(others):
            engine.submit(ask(ids, 20, Draw(seed=1))[0])
        engine.run(request)
        return heard.end.ids

    assert drawn(0, 5) == drawn(6, 5) != drawn(0, 6)


def test_draws_follow_the_probabilities():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    for top_p, kept in ((1.0, 4), (0.8, 2), (1e-9, 1)):
        draws = [Draw(0.7, top_p, seed) for seed in range(3000)]
        found = torch.tensor(choose(logits.expand(3000, 4), draws)).bincount(minlength=4) / 3000
        wanted = torch.softmax(logits[0] / 0.7, -1)
        wanted[kept:] = 0
        torch.testing.assert_close(found, wanted / wanted.sum(), atol=0.03, rtol=0)
    assert choose(torch.tensor([[0.0, torch.nan], [0.0, 1.0]]), [GREEDY, GREEDY]) == [None, 1]


def test_limits(model, tokenizer):
    engine = Engine(model, tokenizer, rows=1, queue=2)
    long, heard = ask([3], 10_000, deadline=time.monotonic() + 0.3)
    engine.submit(long)
    engine.step()
    late, heard_late = ask([4], deadline=time.monotonic() + 0.1)
    gone, heard_gone = ask([5])
    engine.submit(late)
    engine.submit(gone)
    with pytest.raises(Full):
        engine.submit(ask([6])[0])
    gone.cancelled = True
    while not engine.is_idle:
        engine.step()
    assert (heard.end.reason, heard_late.end.reason, heard_gone.end.reason) == ("length", "queue", "cancelled")
    assert 1 < heard.end.written < 10_000
    assert heard.end.written == len(heard.end.ids)


def test_whoever_finds_a_row_does_not_wait(model, tokenizer):
    engine = Engine(model, tokenizer, rows=2, queue=1)
    for _ in range(3):  # all before a step: two for the rows, one for the queue
        engine.submit(ask([3])[0])
    with pytest.raises(Full):
        engine.submit(ask([3])[0])
    engine.step()
    with pytest.raises(Full):
        engine.submit(ask([3])[0])


def test_a_model_that_makes_no_numbers_fails_its_texts_and_keeps_nothing(build, tokenizer):
    model = build(ssm="s4d", arch="s4-ffn")
    engine = Engine(model, tokenizer)
    with torch.no_grad():
        model.lm_head.weight[0] = torch.nan
    request, heard = ask([3, 4])
    engine.run(request)
    assert heard.end.reason == "error"
    engine.submit(ask([3])[0])
    waiting, heard = ask([4])
    engine.submit(waiting)
    engine.fail()
    assert heard.end.reason == "error"
    assert engine.is_idle


def test_states_are_kept_within_their_memory_the_oldest_go():
    def states(number):
        return [[torch.full((1, 4, 2), float(number))]]

    prefixes = Prefixes(most_bytes=3 * 32)
    for number in range(1, 5):
        prefixes.keep(list(range(number)), states(number))
        prefixes.longest([0, 1, 2])  # so that what it finds stays
    assert prefixes.bytes == 96
    assert prefixes.longest(list(range(9)))[0] == 4
    assert prefixes.longest([0, 1, 2])[0] == 2
    assert prefixes.longest([0, 1])[0] == 0  # it went, and the last token is always read
    assert prefixes.longest([1, 2, 3]) == (0, None)
