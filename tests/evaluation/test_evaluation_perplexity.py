"""Perplexity: every token is scored once, the state is carried, and no setting of the run changes the number."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ssm_lm import S4Config, S4ForCausalLM
from ssm_lm.evaluation import perplexity
from ssm_lm.evaluation.perplexity import full_context_nll, windowed_nll

VOCAB, EOS, LENGTH = 97, 3, 1501


@pytest.fixture(scope="module", params=["s4", "s4d"])
def model(request):
    torch.manual_seed(0)
    config = S4Config(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        state_size=8,
        ssm=request.param,
        initializer_range=0.3,
        eos_token_id=None,
    )
    return S4ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, VOCAB, LENGTH).astype(np.uint16)


def nll_of_one_forward(model, tokens, first=EOS):
    ids = torch.tensor([first, *tokens.tolist()])
    with torch.no_grad():
        logits = model(ids[None, :-1], use_cache=False).logits[0].double()
    return F.cross_entropy(logits, ids[1:], reduction="sum").item()


@pytest.mark.parametrize("window", [1, 64, 100, 1000, 5000])
def test_full_context_equals_one_forward_whatever_the_window(model, tokens, window):
    tokens = tokens[:200] if window == 1 else tokens
    expected = nll_of_one_forward(model, tokens)
    assert full_context_nll(model, tokens, EOS, window) == pytest.approx(expected, rel=1e-5)


def test_full_context_has_a_context(model, tokens):
    # the tests above would hold for a state that is always reset if context made no difference
    reset = windowed_nll(model, tokens, EOS, 64)
    assert abs(reset - nll_of_one_forward(model, tokens)) > 1e-3 * reset


@pytest.mark.parametrize("context", [1, 64, 100, 2000])
def test_windows_equal_separate_forwards(model, tokens, context):
    tokens = tokens[:101] if context == 1 else tokens  # one more than the largest batch
    expected = 0.0
    for start in range(0, len(tokens), context):
        first = EOS if start == 0 else int(tokens[start - 1])
        expected += nll_of_one_forward(model, tokens[start : start + context], first)
    for batch_size in (1, 3, 8, 100):
        assert windowed_nll(model, tokens, EOS, context, batch_size) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("length", [1, 2, 64, 65, 128])
def test_every_token_is_scored_once(model, tokens, length):
    for score in (
        lambda report: full_context_nll(model, tokens[:length], EOS, 64, report),
        lambda report: windowed_nll(model, tokens[:length], EOS, 16, 3, report),
    ):
        counted = []
        score(counted.append)
        assert sum(counted) == length


def test_logits_in_slices_are_the_same(model, tokens, monkeypatch):
    whole = full_context_nll(model, tokens, EOS)
    sizes = []
    hook = model.lm_head.register_forward_hook(lambda module, inputs, output: sizes.append(output.numel()))
    monkeypatch.setattr(perplexity, "SLICE_ELEMENTS", VOCAB * 7 + 1)
    assert full_context_nll(model, tokens, EOS) == pytest.approx(whole, rel=1e-6)
    hook.remove()
    assert max(sizes) == VOCAB * 7


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary(model, tokens):
    uniform = S4ForCausalLM(model.config).eval()
    torch.nn.init.zeros_(uniform.lm_head.weight)
    assert full_context_nll(uniform, tokens, EOS) == pytest.approx(LENGTH * math.log(VOCAB), rel=1e-6)


def test_the_sum_is_in_double_precision(model):
    # two losses of 1e-6 lose their digits when they are added to 36 in float32
    logits = torch.zeros(3, VOCAB)
    states, ids = torch.zeros(3, 32), torch.tensor([0, 1, 2])
    logits[0, 0] = -32.0
    logits[1:, :] = -18.0
    logits[1, 1], logits[2, 2] = 0.0, 0.0
    expected = F.cross_entropy(logits, ids, reduction="none").double().sum().item()

    class Fixed:
        config = model.config

        def lm_head(self, states):
            return logits

    assert expected != F.cross_entropy(logits, ids, reduction="sum").item()
    assert perplexity._summed_nll(Fixed(), states, ids) == expected


def test_an_adaptive_model_is_scored_by_the_clusters_of_its_targets(tokens):
    torch.manual_seed(0)
    keys = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 1, "state_size": 8, "eos_token_id": None}
    adaptive = S4ForCausalLM(S4Config(**keys, adaptive_cutoffs=[20, 60])).eval()
    with torch.no_grad():
        adaptive.lm_head.projection_0.normal_()  # from zero it would not look at the text
    expected = nll_of_one_forward(adaptive, tokens)
    assert full_context_nll(adaptive, tokens, EOS, window=400) == pytest.approx(expected, rel=1e-5)
    assert full_context_nll(adaptive, tokens, EOS, window=400) != pytest.approx(
        full_context_nll(adaptive, tokens[::-1], EOS)
    )
