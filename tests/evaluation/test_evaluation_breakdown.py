"""Single tokens' NLLs: the standard error over documents, and the tokens that only the context tells."""

import itertools

import numpy as np
import pytest

from ssm_lm.evaluation.breakdown import documents_of, recalled, standard_error

EOS = 0


def test_an_end_belongs_to_the_document_that_it_ends():
    assert documents_of(np.array([5, 6, EOS, EOS, 7]), EOS).tolist() == [0, 0, 0, 1, 2]


def test_the_standard_error_is_that_of_repeated_draws():
    """Documents of unequal length whose tokens share a level: the spread of the mean over 2,000 corpora."""
    rng = np.random.default_rng(0)

    def corpus():
        lengths = rng.integers(1, 20, 50)
        documents = np.repeat(np.arange(50), lengths)
        return rng.normal(3, 1, 50)[documents] + rng.normal(0, 0.5, len(documents)), documents

    draws = [corpus() for _ in range(2000)]
    spread = np.std([nlls.mean() for nlls, _ in draws])
    estimated = np.mean([standard_error(nlls, documents)[0] for nlls, documents in draws])
    assert estimated == pytest.approx(spread, rel=0.05)
    # of single tokens it would be less than half of that
    assert estimated > 2 * np.mean([nlls.std() / len(nlls) ** 0.5 for nlls, _ in draws])
    assert standard_error(np.ones(3), np.zeros(3, int)) == (None, 1)


def loop(tokens, documents, context, training, at_most):
    """The definition, token by token."""
    found = []
    for i in range(len(tokens)):
        first = i - 1
        while first >= 0 and documents[first] == documents[i] and (context is None or first // context == i // context):
            first -= 1
        earlier = [(tokens[j - 1], tokens[j]) for j in range(max(first + 1, 1), i)]
        bigram = (tokens[i - 1], tokens[i])
        count = sum(pair == bigram for pair in itertools.pairwise(training))
        found.append(i > 0 and bigram in earlier and count <= at_most)
    return found


@pytest.mark.parametrize("context", [None, 7])
@pytest.mark.parametrize("at_most", [0, 4])
def test_recalled_tokens_are_their_definition(context, at_most):
    rng = np.random.default_rng(1)
    tokens, training = rng.integers(0, 6, 120).astype(np.uint16), rng.integers(0, 5, 150).astype(np.uint16)
    documents = documents_of(tokens, EOS)
    found = recalled(tokens, documents, context, training, 6, at_most)
    assert found.tolist() == loop(tokens.tolist(), documents, context, training.tolist(), at_most)
    assert 0 < found.sum() < len(tokens)
