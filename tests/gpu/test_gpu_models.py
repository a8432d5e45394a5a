"""Whole models: the kernels change no logit beyond rounding, and a static cache no token."""

import contextlib

import pytest
import torch
from transformers import StaticCache

from ssm_lm import S4Config, S4ForCausalLM
from ssm_lm.modeling.ssm import LAYERS


def build(place, ssm: str) -> S4ForCausalLM:
    arch = "s4" if LAYERS[ssm].is_time_invariant else "gated"
    config = S4Config(vocab_size=place.V, hidden_size=place.H, num_hidden_layers=2, state_size=64, ssm=ssm, arch=arch)
    return S4ForCausalLM(config).to(place.device).eval()


@pytest.mark.parametrize("ssm", LAYERS)
@pytest.mark.parametrize("precision", ["float32", "autocast", "bfloat16"])
def test_logits_and_gradients(place, ssm, precision, monkeypatch, assert_close):
    model = build(place, ssm)
    if precision == "bfloat16":
        model = model.to(torch.bfloat16)
    tokens = torch.randint(0, place.V, (place.B, min(place.L, 2048)), device=place.device)
    results = []
    for kernels in ("torch", "auto"):
        monkeypatch.setenv("SSM_LM_KERNELS", kernels)
        autocast = torch.autocast(place.device, torch.bfloat16) if precision == "autocast" else contextlib.nullcontext()
        with autocast:
            output = model(tokens, labels=tokens)
        gradients = torch.autograd.grad(output.loss, list(model.parameters()))
        results.append((output.logits.detach(), gradients))
    (expected, expected_gradients), (logits, gradients) = results
    assert_close(logits, expected, 1e-4 if precision == "float32" else 3e-2)
    for (name, _), a, b in zip(model.named_parameters(), gradients, expected_gradients, strict=True):
        assert_close(a, b, 1e-3 if precision == "float32" else 0.1, f"gradient of {name}")


@pytest.mark.parametrize("ssm", LAYERS)
def test_a_static_cache_generates_the_same_tokens(place, ssm):
    """On a GPU transformers compiles the decode step of a static cache and replays it as a CUDA graph."""
    model = build(place, ssm)
    prompt = torch.randint(1, place.V, (2, 50), device=place.device)
    options = dict(max_new_tokens=12, do_sample=False, eos_token_id=None)
    expected = model.generate(prompt, **options)
    assert torch.equal(model.generate(prompt, cache_implementation="static", **options), expected)
    cache = StaticCache(model.config, max_cache_len=80)
    for _ in range(2):  # the second time in the same memory, as a graph that was captured once is replayed
        assert torch.equal(model.generate(prompt, past_key_values=cache, **options), expected)
        cache.reset()
    assert expected.shape == (2, 62)


def test_the_cache_keeps_its_size(place):
    """Memory does not grow with the text."""
    model = build(place, "s4d")
    ids = torch.randint(1, place.V, (1, 40), device=place.device)
    sizes = []
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        for _ in range(3):
            sizes.append(sum(state.numel() for layer in cache.layers for state in layer.states))
            cache = model(ids, past_key_values=cache, use_cache=True).past_key_values
    assert len(set(sizes)) == 1
    assert sizes[0] == 2 * 2 * place.H * 64  # layers, state spaces a layer, channels, states
