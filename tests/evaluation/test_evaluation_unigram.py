"""The unigram reference against a count by hand."""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ssm_lm.data import stream as stream_module
from ssm_lm.data.stream import TokenStream
from ssm_lm.evaluation import unigram


def stream(ids, vocab_size, folder=Path(), counts=""):
    manifest = SimpleNamespace(vocab_size=vocab_size, splits={"train": SimpleNamespace(unigram=counts)})
    return TokenStream(folder, "train", manifest, np.array(ids, dtype=np.uint16))


def test_a_split_that_prepare_has_counted_is_not_read(tmp_path):
    """The file of counts is the word: of the tokens there are none here."""
    np.array([3, 1, 1, 0], dtype="<i8").tofile(tmp_path / "train.counts")
    counted = stream([], 4, tmp_path, "train.counts")
    test = stream([0, 3, 3, 1], 4)
    assert unigram.unigram_perplexity(counted, test) == unigram.unigram_perplexity(stream([0, 0, 0, 1, 2], 4), test)


@pytest.mark.parametrize("block", [2, 1 << 24])
def test_add_one_counts_by_hand(monkeypatch, block):
    monkeypatch.setattr(stream_module, "_BLOCK", block)
    train, test = stream([0, 0, 0, 1, 2], 4), stream([0, 3, 3, 1], 4)  # 3 is not in train
    expected = math.exp(-(math.log(4 / 9) + 2 * math.log(1 / 9) + math.log(2 / 9)) / 4)
    assert unigram.unigram_perplexity(train, test) == pytest.approx(expected, rel=1e-12)


def test_uniform_counts_give_the_vocabulary():
    assert unigram.unigram_perplexity(stream(range(50), 50), stream([7, 7, 9], 50)) == pytest.approx(50)
