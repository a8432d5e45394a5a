"""The perplexity of word frequencies alone: what a model must beat to have learned anything of context."""

import math

import numpy as np


def unigram_perplexity(train_stream, split_stream) -> float:
    """Token perplexity on one split of a unigram model counted on another, with add-one smoothing.

    Both are TokenStreams of one vocabulary of V ids: p(t) = (count of t in train + 1) / (tokens of train + V). A split
    is read only where prepare has not counted it.
    """
    vocab_size = train_stream.vocab_size
    train, split = train_stream.unigram_counts(), split_stream.unigram_counts()
    log_probability = np.log(train + 1.0) - math.log(train.sum() + vocab_size)
    return float(np.exp(-(split @ log_probability) / split.sum()))
