"""What the NLLs of single tokens say beside their sum: how sure it is, and how well the model recalls.

The standard error is over documents, for the tokens of one are no independent draws. The recalled tokens are those that
end a bigram which the context has shown before and training hardly has, so that only the context tells them: they
explain most of the gap between attention and gated convolutions (Arora et al., "Zoology", 2312.04927).
"""

import math

import numpy as np

_BLOCK = 1 << 24


def documents_of(tokens: np.ndarray, eos_token_id: int) -> np.ndarray:
    """The number of the document that each token (n,) belongs to; an end-of-text token belongs to the one it ends."""
    ends = np.asarray(tokens) == eos_token_id
    return np.cumsum(ends) - ends


def standard_error(nlls: np.ndarray, documents: np.ndarray) -> tuple[float | None, int]:
    """(the standard error of the mean NLL a token, documents): nlls (n,), documents (n,) from `documents_of`.

    The mean is a ratio of two sums over documents, of NLL and of tokens: with S_d and T_d of document d of m and R the
    ratio, its variance is m / (m - 1) sum_d (S_d - R T_d)^2 / T^2. None where there is one document.
    """
    sums, counts = np.bincount(documents, nlls), np.bincount(documents)
    number = len(counts)
    if number < 2:
        return None, number
    residuals = sums - sums.sum() / counts.sum() * counts
    return math.sqrt(number / (number - 1) * float(residuals @ residuals)) / int(counts.sum()), number


def recalled(
    tokens: np.ndarray, documents: np.ndarray, context: int | None, training: np.ndarray, vocab_size: int, at_most: int
) -> np.ndarray:
    """Which tokens (n,) end a bigram seen before in their context, and at most `at_most` times in `training` (m,).

    A context is a document, or what of it lies in one window of `context` tokens.
    """
    ids = np.asarray(tokens).astype(np.int64)
    bigrams = np.concatenate([[-1], ids[:-1] * vocab_size + ids[1:]])
    contexts = documents.astype(np.int64)
    if context is not None:
        contexts = contexts + np.arange(len(ids)) // context
    known, bigram_numbers = np.unique(bigrams, return_inverse=True)
    # a bigram belongs to the context of its second token; its first may be the one before the context
    _, first_places = np.unique(contexts * len(known) + bigram_numbers, return_index=True)
    seen_before = np.ones(len(ids), dtype=bool)
    seen_before[first_places] = False
    return seen_before & (_counts(known, training, vocab_size) <= at_most)[bigram_numbers]


def _counts(bigrams: np.ndarray, training: np.ndarray, vocab_size: int) -> np.ndarray:
    """How often each of the sorted bigrams (k,) occurs in the training tokens."""
    counts = np.zeros(len(bigrams), dtype=np.int64)
    for start in range(0, len(training) - 1, _BLOCK):
        block = np.asarray(training[start : start + _BLOCK + 1]).astype(np.int64)
        pairs = block[:-1] * vocab_size + block[1:]
        places = np.minimum(np.searchsorted(bigrams, pairs), len(bigrams) - 1)
        counts += np.bincount(places[bigrams[places] == pairs], minlength=len(bigrams))
    return counts
