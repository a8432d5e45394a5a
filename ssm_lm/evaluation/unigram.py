"""The perplexity of word frequencies alone: what a model must beat to have learned anything of context."""

import math

import numpy as np

_BLOCK = 1 << 24


def unigram_perplexity(train_stream, split_stream) -> float:
    """Token perplexity on one split of a unigram model counted on another, with add-one smoothing.

    Both are TokenStreams of one vocabulary of V ids: p(t) = (count of t in train + 1) / (tokens of train + V).
    """
    vocab_size = train_stream.vocab_size
    train, split = (_counts(stream.tokens, vocab_size) for stream in (train_stream, split_stream))
    log_probability = np.log(train + 1.0) - math.log(train.sum() + vocab_size)
    return float(np.exp(-(split @ log_probability) / split.sum()))


def _counts(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """How often each id occurs, (V,); in blocks, for bincount turns what it is given into int64."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, len(tokens), _BLOCK):
        counts += np.bincount(tokens[start : start + _BLOCK], minlength=vocab_size)
    return counts
