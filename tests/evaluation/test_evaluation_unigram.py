"""The unigram reference against a count by hand."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from ssm_lm.evaluation import unigram


def stream(ids, vocab_size):
    return SimpleNamespace(tokens=np.array(ids, dtype=np.uint16), vocab_size=vocab_size)


@pytest.mark.parametrize("block", [2, 1 << 24])
def test_add_one_counts_by_hand(monkeypatch, block):
    monkeypatch.setattr(unigram, "_BLOCK", block)
    train, test = stream([0, 0, 0, 1, 2], 4), stream([0, 3, 3, 1], 4)  # 3 is not in train
    expected = math.exp(-(math.log(4 / 9) + 2 * math.log(1 / 9) + math.log(2 / 9)) / 4)
    assert unigram.unigram_perplexity(train, test) == pytest.approx(expected, rel=1e-12)


def test_uniform_counts_give_the_vocabulary():
    assert unigram.unigram_perplexity(stream(range(50), 50), stream([7, 7, 9], 50)) == pytest.approx(50)
