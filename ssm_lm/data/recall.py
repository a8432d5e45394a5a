"""Tasks of recall, made on the fly: the next token at a few places of a sequence, which only its earlier tokens tell.

What separates blocks: a state space alone does them badly, products of channels better, attention well.

    induction            30 tokens of 20, random; a special one stands somewhere and again at the end: which token came
                         after it? (Fu et al., "Hungry Hungry Hippos", 2212.14052, section 3)
    mqar-64, mqar-256    4 pairs (16) of key and value begin a sequence of 64 (256) tokens; each key comes again later,
                         soon rather than late, and its value is the next token; all else is noise (Arora et al.,
                         "Zoology", 2312.04927, there with a vocabulary of 8,192; 1,024 here)
    selective-copying    16 tokens of 16 kinds among 256 blanks, at random places; then 16 times a mark: give them in
                         their order (Gu and Dao, "Mamba", 2312.00752, section 4.1.1, there with 4,096 blanks)

An example is a function of (split, its number) alone. It is as a language model takes it, {"input_ids", "labels"}: the
label of a place is the token that is to be predicted there from those before it, -100 where nothing is asked.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

IGNORED = -100
SPLITS = {"train": 1 << 20, "validation": 1_000, "test": 2_000}  # examples; no training comes to the end of them
POWER = 0.01  # of Zoology's law for the distance between a pair and its query


class Draws:
    """Random numbers of one example, from raw bits: their sequence stays the same in later releases of NumPy."""

    def __init__(self, *seed: int):
        self._bits = np.random.PCG64(seed)

    def uniform(self, count: int) -> np.ndarray:
        """(count,) in the open interval (0, 1)"""
        return ((self._bits.random_raw(count) >> np.uint64(11)) + 0.5) / float(1 << 53)

    def integers(self, below: int, count: int) -> np.ndarray:
        return (self.uniform(count) * below).astype(np.int64)

    def distinct(self, below: int, count: int, weights: np.ndarray | None = None) -> np.ndarray:
        """`count` different integers below `below`, in random order; drawn one after the other by their weights."""
        keys = -np.log(self.uniform(below))  # the smallest exponential times belong to such draws
        keys = keys if weights is None else keys / weights
        return np.argsort(keys, kind="stable")[:count]


def induction(draws: Draws, length: int = 30, kinds: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (length + 1,): `length` that are read, and the answer, which is token kinds's successor."""
    tokens, labels = draws.integers(kinds, length + 1), np.full(length + 1, IGNORED)
    place = int(draws.integers(length - 2, 1)[0])
    tokens[place] = tokens[length - 1] = kinds
    tokens[length] = labels[length] = tokens[place + 1]
    return tokens, labels


def recall(draws: Draws, length: int, pairs: int, vocab_size: int = 1024) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (length,): pairs, then queries in noise. Keys are the lower half of the vocabulary, values the upper."""
    half = vocab_size // 2
    keys, values = 1 + draws.distinct(half - 1, pairs), half + draws.integers(half, pairs)
    tokens, labels = draws.integers(vocab_size, length), np.full(length, IGNORED)
    tokens[: 2 * pairs : 2], tokens[1 : 2 * pairs : 2] = keys, values
    gaps = (length - 2 * pairs) // 2
    places = 2 * pairs + 2 * draws.distinct(gaps, pairs, POWER * np.arange(1, gaps + 1) ** (POWER - 1))
    tokens[places] = keys
    labels[places + 1] = values
    return tokens, labels


def selective_copying(draws: Draws, blanks: int = 256, number: int = 16, kinds: int = 16) -> tuple:
    """Tokens (blanks + 2 number + 1,): content among blanks, a mark for each of them, and one place more.

    The mark of the i-th token is read, and it is predicted for the place after that.
    """
    blank, mark, content = kinds, kinds + 1, draws.integers(kinds, number)
    tokens = np.full(blanks + 2 * number + 1, blank)
    labels = np.full(len(tokens), IGNORED)
    tokens[np.sort(draws.distinct(blanks + number, number))] = content
    tokens[-number - 1 :] = mark
    labels[-number:] = content
    return tokens, labels


class Recall(NamedTuple):
    """A task. make: draws -> (tokens, labels), both (length,) int64."""

    name: str
    make: Callable[[Draws], tuple[np.ndarray, np.ndarray]]
    vocab_size: int

    @property
    def length(self) -> int:
        return len(self.make(Draws(0))[0])

    @property
    def splits(self) -> dict[str, Dataset]:
        return {split: Made(self, number, count) for number, (split, count) in enumerate(SPLITS.items())}


class Made(Dataset):
    """The examples of a split."""

    def __init__(self, task: Recall, split: int, count: int):
        self.task, self.split, self.count = task, split, count

    def __len__(self):
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self.count:
            raise IndexError(f"example {index} outside 0 .. {self.count - 1}")
        tokens, labels = self.task.make(Draws(self.split, index))
        return {"input_ids": torch.from_numpy(tokens), "labels": torch.from_numpy(labels)}


RECALL_TASKS = {
    task.name: task
    for task in (
        Recall("induction", induction, 21),
        Recall("mqar-64", lambda draws: recall(draws, 64, 4), 1024),
        Recall("mqar-256", lambda draws: recall(draws, 256, 16), 1024),
        Recall("selective-copying", selective_copying, 18),
    )
}
