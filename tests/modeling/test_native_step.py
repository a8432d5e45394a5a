"""The decoding step in C against the plain one, when it runs, and when it does not."""

import copy
import gc
import math
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from in_c import needs, searched
from tiny import ENDLESS, prompt, tiny_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, GenerationMixin, StaticCache

from ssm_lm import S4ForCausalLM
from ssm_lm.modeling import native_library, native_step
from ssm_lm.modeling.losses import LanguageModelHead

pytestmark = needs("step")

MODELS = {
    "s4": {"ssm": "s4"},
    "s4-legt": {"ssm": "s4", "ssm_init": "legt", "n_ssm": 4, "glu": "half", "norm": "rms"},
    "s4d": {"ssm": "s4d", "hidden_act": "silu"},
    "s5": {"ssm": "s5", "glu": "none"},
    "h3": {"ssm": "s4d", "arch": ["h3", "swiglu"]},
    "gated": {"ssm": "s5", "arch": ["gated", "ffn"], "conv_size": 3},
    "ssd": {"ssm": "ssd", "arch": "gated", "head_dim": 8},
    "ssd-selective": {
        "ssm": "ssd",
        "arch": ["gated", "swiglu"],
        "expand": 1,
        "head_dim": 4,
        "selective_dt": True,
        "ssm_init": "lin+real",
    },
}


@pytest.fixture
def steps(monkeypatch):
    """Counts the forwards that were the library's, of a prompt too."""
    count = []
    run = native_step.Program.advance
    monkeypatch.setattr(native_step.Program, "advance", lambda *given: count.append(1) or run(*given))
    searched(monkeypatch, lambda _, tokens: count.extend([1] * tokens))
    return count


def states_of(cache):
    return [state for layer in cache.layers for state in layer.states]


@torch.no_grad()
def begin(model, ids):
    return model(ids, use_cache=True).past_key_values


@torch.no_grad()
def decode(model, ids, cache=None, first=3, at_a_time=1):
    """Logits of every token from `first` on, from forwards of a few, and the states after them."""
    cache = model(ids[:, :first], past_key_values=cache, use_cache=True).past_key_values
    parts = [ids[:, t : t + at_a_time] for t in range(first, ids.shape[1], at_a_time)]
    logits = [model(part, past_key_values=cache).logits for part in parts]
    return torch.cat(logits, 1), states_of(cache), cache


def plain(model, *arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSM_LM_KERNELS", "torch")
        return decode(model, *arguments)


@pytest.mark.parametrize(("rows", "tokens"), [(1, 1), (11, 1), (2, 3), (native_step.FEW_ROWS + 2, 1)])
@pytest.mark.parametrize("name", MODELS)
def test_equals_the_plain_step(name, rows, tokens, steps):
    """Rows one by one, four at a time and a rest, and by PyTorch's product: logits, states, and the length."""
    model, ids = tiny_model(**MODELS[name]), prompt(12, rows)
    expected, expected_states, _ = plain(model, ids)
    assert not steps
    logits, states, cache = decode(model, ids, None, 3, tokens)
    assert len(steps) == 1 + 9 // tokens
    assert cache.get_seq_length() == 12
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(states, expected_states, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", [20, 90])
@pytest.mark.parametrize("name", MODELS)
def test_a_prompt(name, length, steps):
    """Of few tokens and of more, whose sublayers share their memory: logits, states, what is recorded, what follows."""
    model, ids = tiny_model(**MODELS[name]), prompt(length + 3, 2)
    expected, expected_states, _ = plain(model, ids, None, length)
    recorded = DynamicCache(config=model.config)
    recorded.activate_past_recording()
    for cache in (None, recorded, StaticCache(config=model.config, max_cache_len=8)):
        steps.clear()
        logits, states, cache = decode(model, ids, cache, length)
        assert len(steps) == 4
        assert cache.get_seq_length() == length + 3
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        for ours, theirs in zip(states, expected_states, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        assert length not in model.model._programs.of(cache)
    recorded.crop(-(length + 1))
    for ours, theirs in zip(states_of(recorded), states_of(begin(model, ids[:, :2])), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", [9, 90])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_padded_prompt(name, length, steps):
    """Padding on the left, in the middle and on the right drives nothing, in one forward and in parts."""
    model, ids, mask = tiny_model(**MODELS[name]), prompt(length, 3), torch.ones(3, length + 1, dtype=torch.long)
    mask[0, :5], mask[1, 3:6], mask[2, length - 2 : length] = 0, 0, 0
    results = []
    for kernels, at_a_time in (("torch", length), ("auto", length), ("auto", 4)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SSM_LM_KERNELS", kernels)
            cache, found = DynamicCache(config=model.config), []
            cache.activate_past_recording()
            for start in range(0, length, at_a_time):
                end = min(start + at_a_time, length)
                logits = model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache).logits
                found.append(logits)
            found = [torch.cat(found, 1) * mask[:, :length, None], *(state.clone() for state in states_of(cache))]
            cache.crop(-2)
            results.append(found + states_of(cache))
        assert len(steps) == {"torch": 0, "auto": 1 + (at_a_time == 4) * -(-length // 4)}[kernels]
    for found in results[1:]:
        for one, other in zip(found, results[0], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_whoever_looks_on_sees_the_plain_step(steps):
    """Hooks on all modules, transforms of torch.func, tangents, modes that count."""
    model, ids, heard = tiny_model(), prompt(9, 3), []
    expected = plain(model, ids, None, 4)[0]
    embeddings = model.get_input_embeddings()(ids)
    hook = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: heard.append(type(module).__name__))
    model(ids)
    hook.remove()
    assert "Linear" in heard
    found = torch.func.vmap(lambda row: model(row[None]).logits[0])(ids)
    torch.testing.assert_close(found[:, 4:], expected, rtol=1e-4, atol=1e-4)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(embeddings, torch.randn_like(embeddings))
        logits = model(inputs_embeds=dual).logits
        assert torch.autograd.forward_ad.unpack_dual(logits).tangent is not None
    with FlopCounterMode(display=False) as counter:
        model(ids)
    assert counter.get_total_flops() > 2 * 9 * 3 * 16 * 64 * 2
    assert not steps
    model(ids)
    assert len(steps) == 1


@torch.no_grad()
def test_hidden_states_are_recorded_where_they_are_asked_for(steps):
    """And the hooks that transformers leaves behind for it are no reason to go the long way ever after."""
    model, ids = tiny_model(), prompt(9)
    expected = model(ids).logits
    for ask in ({"output_hidden_states": True}, {}):
        model.config.output_hidden_states = not ask
        steps.clear()
        out = model(ids, **ask)
        assert len(out.hidden_states) == 3
        assert not steps
        torch.testing.assert_close(out.logits, expected, rtol=1e-4, atol=1e-4)
        model.config.output_hidden_states = False
        assert torch.equal(model(ids).logits, expected)
        assert len(steps) == 1
    heard = []
    model.model.layers[0].register_forward_hook(lambda *_: heard.append(1))
    model(ids)
    assert heard


@torch.no_grad()
def test_bad_input_is_the_plain_steps_to_judge(steps):
    """And masks that are to be broadcast: it says what is wrong, and nothing is read that is not there."""
    model, ids = tiny_model(), prompt(9, 3)
    for mask in (torch.tensor([[0] + [1] * 8]), torch.tensor([[0], [1], [1]])):
        whole = model(ids, attention_mask=mask.expand(3, 9)).logits
        torch.testing.assert_close(model(ids, attention_mask=mask).logits, whole, rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="16"):
        model(inputs_embeds=torch.randn(1, 5, 1))
    of_another = begin(tiny_model(state_size=16), ids)
    with pytest.raises(ValueError, match="state"):
        model(ids, past_key_values=of_another)
    assert len(steps) == 3  # two masks of all rows, and the other model's


@torch.no_grad()
def test_a_head_that_is_changed_between_two_forwards():
    """Also where what ran last for so many tokens ran in a generate(), and the second forward is a scan."""
    model = tiny_model(**ENDLESS)
    found = model.generate(prompt(5), num_beams=2, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
    ids = prompt(native_step.PROMPT_ROWS, 2)
    assert not model(ids, past_key_values=found.past_key_values, logits_to_keep=1).logits.any()


def test_a_child_of_a_fork_steps_on_one_thread():
    script = """
import os, torch
from tiny import ENDLESS, prompt, tiny_model
torch.set_num_threads(2)
model = tiny_model(**ENDLESS)
expected = model.generate(prompt(5), max_new_tokens=4, do_sample=False)
child = os.fork()
if not child:
    same = torch.equal(model.generate(prompt(5), max_new_tokens=4, do_sample=False), expected)
    os._exit(0 if same else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    folder = Path(__file__).parent
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_prompts_that_are_scanned(steps):
    """Many tokens, and those of whoever has asked for a scan."""
    many, model = native_step.PROMPT_ROWS // 4 + 1, tiny_model()
    begin(model, prompt(many - 1, 4))
    assert len(steps) == 1
    begin(model, prompt(many, 4))
    begin(tiny_model(mode="chunk"), prompt(40))
    assert len(steps) == 1
    begin(tiny_model(mode="chunk"), prompt(30))  # as few tokens as may have been drafted
    begin(tiny_model(mode="recurrent"), prompt(40))
    assert len(steps) == 3
    begin(tiny_model(mode="fft").bfloat16(), prompt(native_step.PROMPT_ROWS // 32 + 1, 64))
    assert len(steps) > 3
    steps.clear()
    begin(tiny_model(mode="fft").bfloat16(), prompt(40, 64))  # whose parts would be of few tokens
    assert not steps


@pytest.mark.parametrize("emulated", [True, False])
@pytest.mark.parametrize("name", ["s4", "gated"])
def test_a_long_prompt_in_bfloat16(name, emulated, monkeypatch, steps):
    """In parts, where PyTorch's products would take longer, else as one scan; as near to float32 as the plain way."""
    few = native_step.FEW_ROWS
    monkeypatch.setattr(native_step, "most_rows", lambda half: math.inf if half and emulated else few)
    monkeypatch.setattr(native_step, "PROMPT_ROWS", 80)
    model, ids = tiny_model(**MODELS[name]).bfloat16(), prompt(130, 2)
    exact = tiny_model(**MODELS[name])
    exact.load_state_dict(model.state_dict())
    expected = plain(exact, ids, None, 128)
    logits, states, cache = decode(model, ids, None, 128)
    assert len(steps) == 2 + 4 * emulated  # 40 tokens of both rows, three times, and 8
    assert cache.get_seq_length() == 130
    bound = (plain(model, ids, None, 128)[0] - expected[0]).abs().max()
    assert (logits - expected[0]).abs().max() <= max(bound, 0.02 * expected[0].abs().max())
    for ours, theirs in zip(states, expected[1], strict=True):
        assert (ours - theirs).abs().max() < 0.05 * theirs.abs().max().clamp(min=1)


@torch.no_grad()
def test_an_empty_cache_stays_empty_where_the_library_does_not_serve():
    """What was written out of the model until then has left no zeros in it."""
    model, cache = tiny_model(**MODELS["gated"]), DynamicCache(config=tiny_model().config)
    model.model.norm = torch.nn.Sequential(model.model.norm)
    assert native_step.run(model.model, torch.randn(1, 5, 16), cache) is None
    assert not any(layer.is_initialized or layer.states or layer.records for layer in cache.layers)
    model.model.norm = model.model.norm[0]
    assert native_step.run(model.model, torch.randn(1, 6, 16), cache) is not None
    assert all(layer.is_initialized for layer in cache.layers)


def test_a_token_is_one_call_of_the_library(monkeypatch):
    """But for what Python does between: products of many rows."""
    model, lengths, bind = tiny_model(**MODELS["ssd"]), [], native_step.bind
    monkeypatch.setattr(native_step, "bind", lambda calls, threads: lengths.append(len(calls)) or bind(calls, threads))
    decode(model, prompt(12, native_step.FEW_ROWS), None, 1)
    assert len(lengths) == 1
    assert lengths[0] > 10
    decode(model, prompt(12, native_step.FEW_ROWS + 1), None, 1)
    assert len(lengths) > 2


@pytest.mark.parametrize("name", ["s4", "s5", "h3", "ssd"])
def test_bfloat16_weights_are_read_as_they_are(name, steps):
    """Closer to the float32 model with the same weights than the plain step, which rounds what it computes too."""
    model, ids = tiny_model(**MODELS[name]).bfloat16(), prompt(12)
    exact = tiny_model(**MODELS[name])
    exact.load_state_dict(model.state_dict())
    expected = plain(exact, ids)[0]
    logits = decode(model, ids)[0]
    assert steps
    assert logits.dtype == torch.bfloat16
    off = (logits - expected).abs().max()
    assert off < 0.02 * expected.abs().max()
    assert off <= (plain(model, ids)[0] - expected).abs().max()


@pytest.mark.parametrize("name", ["s4", "ssd"])
def test_its_memory_is_float32_whatever_the_default_is(name, steps):
    """In a buffer of another dtype it would write past the end, or what PyTorch reads as other numbers."""
    model, ids = tiny_model(**MODELS[name]), prompt(12, 2)
    expected = plain(model, ids)[0]
    torch.set_default_dtype(torch.float64)  # with half of the bytes the heap would be spoilt
    try:
        logits = decode(model, ids)[0]
    finally:
        torch.set_default_dtype(torch.float32)
    assert len(steps) == 10
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=repr)
def test_generate_takes_it(options, steps):
    model, ids = tiny_model(**ENDLESS), prompt(5, 2)
    chosen = model.generate(ids, max_new_tokens=8, do_sample=False, **options)
    assert len(steps) == 8
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSM_LM_KERNELS", "torch")
        assert torch.equal(chosen, model.generate(ids, max_new_tokens=8, do_sample=False, **options))
    assert len(steps) == 8


def test_follows_weights_modules_and_states(steps):
    """What changes between two tokens is seen by the second: a weight written to or replaced, a module, a state."""
    model, ids = tiny_model(), prompt(4)

    def next_logits(cache):
        with torch.no_grad():
            return model(ids[:, -1:], past_key_values=cache).logits

    def change_weight():
        model.model.layers[0].sublayers[0].inner.out_proj.weight.mul_(1.5)

    def change_data():
        model.model.layers[1].sublayers[2].inner.up_proj.weight.data = torch.randn(64, 16)

    def change_state_space():
        model.model.layers[0].sublayers[1].inner.ssm.C.add_(1)

    def change_module():
        model.model.layers[1].norm = model.model.layers[1].sublayers[0].norm = torch.nn.LayerNorm(16, eps=0.1)

    for change in (change_weight, change_data, change_state_space, change_module):
        cache = decode(model, ids)[2]
        before = next_logits(cache)
        with torch.no_grad():
            change()
        ours, theirs = decode(model, ids)[2], plain(model, ids)[2]
        for layer, other in zip(cache.layers, theirs.layers, strict=True):  # the states of the new weights
            layer.states = [state.clone() for state in other.states]
        count = len(steps)
        changed = next_logits(cache)
        assert len(steps) == count + 1
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SSM_LM_KERNELS", "torch")
            torch.testing.assert_close(changed, next_logits(theirs), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(changed, next_logits(ours), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(changed, before, atol=1e-3)


def test_what_takes_the_plain_step(steps):
    model, ids = tiny_model(), prompt(6)
    expected = plain(model, ids)[0]

    def same():
        return torch.equal(decode(model, ids)[0], expected)

    with torch.enable_grad():
        cache = model(ids[:, :5], use_cache=True).past_key_values
        model(ids[:, 5:], past_key_values=cache).logits.sum().backward()

    hook = model.model.layers[0].sublayers[0].inner.register_forward_hook(lambda *_: None)
    assert same()
    hook.remove()

    linear = model.model.layers[0].sublayers[2].inner.up_proj
    model.model.layers[0].sublayers[2].inner.up_proj = torch.nn.Sequential(linear)  # as adapters wrap it
    assert same()
    model.model.layers[0].sublayers[2].inner.up_proj = linear

    model.config.kernels = "torch"
    assert same()
    model.config.kernels = "auto"

    model.model.layers[1].sublayers[0].inner.ssm.kernels = "torch"
    assert same()
    model.model.layers[1].sublayers[0].inner.ssm.kernels = "auto"

    model.double()
    torch.testing.assert_close(decode(model, ids)[0], expected.double(), rtol=1e-4, atol=1e-4)
    assert not steps
    decode(model.float(), ids)
    assert len(steps) == 4


def in_mid_text(act):
    """A logits processor that acts behind the fifth token after a prompt of six."""

    def processor(ids, scores):
        if ids.shape[1] == 6 + 5:
            act()
        return scores

    return {"logits_processor": [processor], "max_new_tokens": 8, "do_sample": False}


def test_within_a_generate_one_look_serves_all_tokens(monkeypatch, steps):
    """Until a hook is registered; the next generate() looks again."""
    looks, is_same = [], native_step._Seen.is_same
    monkeypatch.setattr(native_step._Seen, "is_same", lambda *given: looks.append(1) or is_same(*given))
    model, ids = tiny_model(**ENDLESS), prompt(6)
    cache = decode(model, ids)[2]
    looks.clear()
    with torch.no_grad():
        for _ in range(3):
            model(ids[:, :1], past_key_values=cache)
    assert len(looks) == 3
    looks.clear()
    steps.clear()
    model.generate(ids, max_new_tokens=8, do_sample=False)
    assert len(steps) == 8
    assert not looks  # the program was written in it
    heard = []
    model.generate(ids, **in_mid_text(lambda: model.model.layers[0].register_forward_hook(lambda *_: heard.append(1))))
    assert len(looks) == 1
    assert sum(heard) == 2  # the tokens after the fifth
    assert model.model._programs.look() is None


def test_a_head_that_is_hooked_in_mid_text_is_called(steps):
    model, heard = tiny_model(**ENDLESS), []
    model.generate(prompt(6), **in_mid_text(lambda: model.lm_head.register_forward_hook(lambda *_: heard.append(1))))
    assert sum(heard) == 2  # the tokens after the fifth
    assert len(steps) == 8


def test_a_state_space_that_is_written_to_in_mid_text_is_followed(monkeypatch, steps):
    logits = []
    for kernels in ("auto", "torch"):
        monkeypatch.setenv("SSM_LM_KERNELS", kernels)
        model = tiny_model(**ENDLESS)
        write = torch.no_grad()(model.model.layers[0].sublayers[1].inner.ssm.C.add_)
        options = in_mid_text(partial(write, 1)) | {"return_dict_in_generate": True, "output_logits": True}
        logits.append(torch.cat(model.generate(prompt(6), **options).logits))
    assert len(steps) == 8
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def test_a_token_of_a_cache_without_states_is_prepared():
    prepared = tiny_model().prepare_inputs_for_generation(
        prompt(1), next_sequence_length=1, past_key_values=DynamicCache(), use_cache=True
    )
    assert torch.equal(prepared["input_ids"], prompt(1))


PADDED = {"attention_mask": [[0, 0, 1, 1], [1, 1, 1, 1]]}


@pytest.mark.parametrize("options", [{}, PADDED, {"cache_implementation": "static"}], ids=["", "padded", "static"])
def test_a_token_is_prepared_as_transformers_would(options, monkeypatch, steps):
    """Handed on as it is, where the prompt and what is not in C go the long way."""
    model, ids = tiny_model(**ENDLESS), prompt(4, 2)
    if options is PADDED:
        options = {"attention_mask": torch.tensor(PADDED["attention_mask"])}
    prepare, long_way = S4ForCausalLM.prepare_inputs_for_generation, GenerationMixin.prepare_inputs_for_generation
    long, short = [], []

    def compare(self, *given, **kwargs):
        count = len(long)
        prepared = prepare(self, *given, **kwargs)
        if len(long) == count:
            short.append(1)
            found, expected = dict(prepared), long_way(self, *given, **kwargs)
            assert torch.equal(found.pop("input_ids"), expected.pop("input_ids"))
            assert expected.pop("attention_mask", None) is None  # of a token that is not padding
            found.pop("attention_mask")
            assert found == expected
        return prepared

    def counted(self, *given, **kwargs):
        long.append(1)
        return long_way(self, *given, **kwargs)

    monkeypatch.setattr(GenerationMixin, "prepare_inputs_for_generation", counted)
    monkeypatch.setattr(S4ForCausalLM, "prepare_inputs_for_generation", compare)
    model.generate(ids, max_new_tokens=8, do_sample=False, num_beams=2, **options)
    assert len(steps) == 8
    assert len(short) == 6  # the first of a cache is not written out yet


@pytest.mark.parametrize("head", ["tied", "other", "hooked"])
def test_the_head(head, monkeypatch):
    """Logits in float32 and bfloat16, of one token and of several; PyTorch's head is called where it has a hook."""
    calls, forward = [], LanguageModelHead.forward
    monkeypatch.setattr(LanguageModelHead, "forward", lambda *given: calls.append(1) or forward(*given))
    model, ids = tiny_model(tie_word_embeddings=head == "tied"), prompt(12, 2)
    if head == "hooked":
        model.lm_head.register_forward_hook(lambda *_: None)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.05)):
        model.to(dtype)
        for at_a_time in (1, 3):
            expected = plain(model, ids, None, 3, at_a_time)[0]
            calls.clear()
            found = decode(model, ids, None, 3, at_a_time)[0]
            assert len(calls) == (1 + 9 // at_a_time if head == "hooked" else 0)
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["s4", "gated", "ssd-selective"])
def test_a_cache_that_records_can_be_cropped(name, steps):
    """To any of the tokens that the library has stepped, and on from there."""
    model, ids = tiny_model(**MODELS[name]), prompt(14)
    for left in (9, 4):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(ids[:, :3], past_key_values=cache)
            for layer in cache.layers:
                layer.activate_past_recording()
        steps.clear()
        decode(model, ids[:, 3:], cache, 4, 4)
        assert len(steps) == 3
        cache.crop(left - int(cache.get_seq_length()))
        expected = plain(model, ids[:, : left + 1])[0][:, -1:]
        with torch.no_grad():
            logits = model(ids[:, left : left + 1], past_key_values=cache).logits
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 7, 33, 200, 5000])  # of the last 26 rows fit what a thread parts at a time
def test_a_row_of_a_product_is_the_same_beside_any_others(width, dtype):
    torch.manual_seed(0)
    x, W, bias = torch.randn(30, width), torch.randn(5, width).to(dtype), torch.randn(5).to(dtype)
    expected = x.double() @ W.double().T + bias.double()

    def product(x):
        y = torch.full((len(x) + 1, 5), float("nan"))
        given = len(x), *W.shape, x, W, bias, int(dtype == torch.bfloat16), y, 2
        native_library.library().product(*map(native_library.for_c, given))
        assert y[-1].isnan().all()
        return y[:-1]

    together = product(x)
    assert ((together - expected).abs() <= 1e-6 * (x.abs().double() @ W.abs().double().T + 1)).all()
    for first, last in ((0, 1), (1, 5), (2, 9), (27, 30)):
        assert torch.equal(product(x[first:last].clone()), together[first:last])


@pytest.mark.parametrize(("kind", "twin"), [(1, torch.nn.functional.gelu), (2, torch.nn.functional.silu)])
def test_activations(kind, twin):
    """To two units of the last digit of x, as PyTorch's are, of everything that float32 holds."""
    x = torch.cat([torch.linspace(-100, 100, 100_001), torch.randn(100_000), torch.logspace(-38, 38, 1001)])
    x, y = torch.cat([x, -x]), torch.empty(2 * len(x))
    native_library.bind([("activate", (kind, len(x), *map(native_library.address, (x, y))))], 1)()
    assert ((y - twin(x.double())) / (x.abs() + 1e-30)).abs().max() <= 3e-7
    x = torch.tensor([float("nan"), float("inf")])
    y = torch.empty(2)
    native_library.bind([("activate", (kind, 2, *map(native_library.address, (x, y))))], 1)()
    assert y.isnan().tolist() == [True, False]


def test_a_cache_is_let_go_of_and_a_static_one_counts():
    model, ids = tiny_model(), prompt(6)
    cache = decode(model, ids)[2]
    assert cache.layers[0] in model.model._programs.by_cache
    gone = weakref.ref(cache.layers[0])
    del cache
    gc.collect()
    assert gone() is None
    assert not model.model._programs.by_cache
    copied = copy.deepcopy(model)
    assert torch.equal(decode(copied, ids)[0], decode(model, ids)[0])
    gone = weakref.ref(copied.model)
    kept = decode(copied, ids)[2]
    del copied
    assert gone() is None  # at once: neither the cache nor a circle keeps a model
    assert kept.get_seq_length() == 6
    static = decode(model, ids, StaticCache(config=model.config, max_cache_len=20))[2]
    assert int(static.get_seq_length()) == 6


def test_without_a_compiler(monkeypatch, tmp_path):
    """None at all, and one that fails; the reason is said, nothing is raised, PyTorch decodes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho cannot find crt1.o >&2\nexit 1\n")
    broken.chmod(0o755)
    model, ids = tiny_model(), prompt(6)
    expected = plain(model, ids)[0]
    for path, compiler, reason in ((str(tmp_path / "none"), "cc", "there is no C compiler"),
                                   (str(tmp_path), str(broken), "did not build it: cannot find crt1.o")):  # fmt: skip
        monkeypatch.setenv("PATH", path + ":/usr/bin" * (path == str(tmp_path)))
        monkeypatch.setenv("CC", compiler)
        native_library._load.cache_clear()
        try:
            assert native_library.library() is None
            assert reason in native_library.why_not()
            assert torch.equal(decode(model, ids)[0], expected)
        finally:
            native_library._load.cache_clear()
    assert not list(tmp_path.glob("ssm_lm/*.so"))


def test_the_library_is_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native_library._load.cache_clear()
    try:
        assert native_library.library() is not None
        (built,) = tmp_path.glob("ssm_lm/*")
        native_library._load.cache_clear()
        monkeypatch.setattr(native_library, "_compile", None)
        assert native_library.library()._name == str(built)
    finally:
        native_library._load.cache_clear()
