"""S4ForSequenceClassification: pooling, padding on both sides, continuous inputs, both directions, problem types."""

import pytest
import torch
from tiny import tiny_model
from transformers import AutoModelForSequenceClassification

from ssm_lm import S4ForSequenceClassification

POOLINGS = ("mean", "last", "max")


def classifier(**kw):
    defaults = {"vocab_size": 30, "hidden_size": 8, "num_labels": 3, "chunk_size": 8}
    return tiny_model(S4ForSequenceClassification, **(defaults | kw))


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("ssm", ["s4", "s4d", "s5"])
def test_padding_on_either_side_changes_nothing(ssm, pooling, bidirectional):
    m = classifier(ssm=ssm, pooling=pooling, bidirectional=bidirectional)
    ids = torch.randint(0, 30, (1, 13))
    with torch.no_grad():
        expected = m(ids).logits
        for left, right in ((5, 0), (0, 5), (3, 9)):
            padded = torch.nn.functional.pad(ids, (left, right), value=7)
            mask = torch.nn.functional.pad(torch.ones_like(ids), (left, right))
            torch.testing.assert_close(m(padded, attention_mask=mask).logits, expected, rtol=1e-4, atol=1e-5)


def test_the_padding_token_makes_the_mask():
    m = classifier(pad_token_id=0)
    ids = torch.randint(1, 30, (1, 13))
    with torch.no_grad():
        padded = m(torch.nn.functional.pad(ids, (0, 4), value=0)).logits
        torch.testing.assert_close(padded, m(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_pooling(pooling):
    m = classifier(pooling=pooling)
    ids = torch.randint(0, 30, (2, 13))
    with torch.no_grad():
        hidden = m.model(ids).last_hidden_state
        expected = {"mean": hidden.mean(1), "last": hidden[:, -1], "max": hidden.amax(1)}[pooling]
        torch.testing.assert_close(m(ids).logits, m.score(expected))


def test_both_directions_see_the_whole_sequence():
    for bidirectional in (False, True):
        m = classifier(bidirectional=bidirectional)
        ids = torch.randint(1, 30, (1, 13))
        changed = ids.clone()
        changed[0, -1] = 0
        with torch.no_grad():
            difference = (m.model(ids).last_hidden_state - m.model(changed).last_hidden_state)[0, 0].abs().max()
        assert (difference > 1e-4) == bidirectional


def test_a_bidirectional_model_has_no_cache():
    m = classifier(bidirectional=True)
    ids = torch.randint(0, 30, (1, 5))
    assert m.model(ids, use_cache=True).past_key_values is None
    cache = classifier().model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="past_key_values"):
        m.model(ids, past_key_values=cache)


def test_continuous_inputs(tmp_path):
    m = classifier(input_size=5, ssm="s5", bidirectional=True)
    assert not any("embed_tokens" in name for name, _ in m.named_parameters())
    x = torch.randn(2, 13, 5)
    out = m(inputs_embeds=x, labels=torch.tensor([0, 2]))
    out.loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in m.parameters())
    with pytest.raises(ValueError, match="inputs_embeds"):
        m(torch.zeros(2, 3, dtype=torch.long))
    m.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(loaded) is S4ForSequenceClassification
    assert torch.equal(loaded(inputs_embeds=x).logits, m(inputs_embeds=x).logits)


@pytest.mark.parametrize(
    ("num_labels", "labels", "problem", "loss"),
    [
        (3, torch.tensor([0, 2]), "single_label_classification", torch.nn.functional.cross_entropy),
        (1, torch.tensor([0.5, 2.0]), "regression", lambda x, y: torch.nn.functional.mse_loss(x[:, 0], y)),
        (
            3,
            torch.tensor([[0.0, 1, 1], [1, 0, 0]]),
            "multi_label_classification",
            torch.nn.functional.binary_cross_entropy_with_logits,
        ),
    ],
)
def test_problem_types(num_labels, labels, problem, loss):
    m = classifier(num_labels=num_labels)
    out = m(torch.randint(0, 30, (2, 9)), labels=labels)
    assert m.config.problem_type == problem
    torch.testing.assert_close(out.loss, loss(out.logits, labels))


def test_it_learns_something_that_needs_the_whole_sequence():
    """Which of two tokens stood first? Read from the last position alone, after random other tokens."""
    m = classifier(pooling="last", num_labels=2, num_hidden_layers=1, arch="s4-ffn", hidden_size=16).train()
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(m.parameters(), lr=1e-2)
    for _ in range(60):
        ids = torch.randint(2, 6, (32, 24), generator=generator)
        labels = torch.randint(0, 2, (32,), generator=generator)
        ids[:, 0] = labels
        loss = m(ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2
