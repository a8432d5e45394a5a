"""The states of rows that come and go: out of a cache, into another, and many rows side by side in one.

A user's past is one row of every state of the model, whatever its length: (1, H, N) of a state space, (1, K - 1, C) of
a convolution. So a row can leave a batch and join another between two tokens, by a copy of a few numbers.
"""

import torch
from transformers import DynamicCache

from ..modeling.single_steps import Memo

States = list[list[torch.Tensor]]  # of one row: [layer][state], each with a batch of 1


def size_of(states: States) -> int:
    """Bytes."""
    return sum(state.nbytes for layer in states for state in layer)


class StateRoom:
    """Makes caches of a model, which share what single steps derive from its parameters.

    zero: the states of a row before its first token.
    """

    def __init__(self, model):
        self.model = model
        self.memos: list[dict[int, Memo]] | None = None
        cache = self._empty()
        with torch.inference_mode():
            model.base_model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), past_key_values=cache)
            self.memos = [layer.memos for layer in cache.layers]
            self.zero = [[torch.zeros_like(state) for state in layer.states] for layer in cache.layers]

    def cache(self, rows: int) -> DynamicCache:
        """A cache of so many rows, all of them zero."""
        cache = self._empty()
        with torch.inference_mode():
            for layer, states, memos in zip(cache.layers, self.zero, self.memos, strict=True):
                layer.memos = memos
                for index, state in enumerate(states):
                    layer.update_state(index, state.repeat_interleave(rows, 0), num_new_tokens=1)
        return cache

    def _empty(self) -> DynamicCache:
        return DynamicCache(config=self.model.config)


def take(cache: DynamicCache, row: int) -> States:
    """A copy of the states of a row."""
    return [[state[row : row + 1].clone() for state in layer.states] for layer in cache.layers]


def put(cache: DynamicCache, row: int, states: States) -> None:
    """Write the states of a row where those of a cache lie."""
    for layer, given in zip(cache.layers, states, strict=True):
        for state, new in zip(layer.states, given, strict=True):
            state[row : row + 1].copy_(new)


class Batch:
    """The rows that are decoded together: the first `len` of a cache whose rows are 1, 2, 4, ... at most `most`.

    The step on a CPU is written out for one cache and its number of rows: with few sizes, each kept, it is written few
    times. Rows behind the first `len` go along and mean nothing.
    """

    def __init__(self, room: StateRoom, most: int):
        self.room, self.most = room, most
        self.length, self.capacity = 0, 1
        self.caches: dict[int, DynamicCache] = {}

    def __len__(self) -> int:
        return self.length

    @property
    def cache(self) -> DynamicCache:
        if self.capacity not in self.caches:
            self.caches[self.capacity] = self.room.cache(self.capacity)
        return self.caches[self.capacity]

    def join(self, states: States) -> None:
        """A row more, behind the others."""
        if self.length == self.capacity:
            self._resize(min(2 * self.capacity, self.most))
        put(self.cache, self.length, states)
        self.length += 1

    def leave(self, row: int) -> None:
        """A row less; the last one takes its place."""
        self.length -= 1
        if row != self.length:
            put(self.cache, row, take(self.cache, self.length))
        if self.capacity > 1 and self.length <= self.capacity // 4:  # a quarter: no growing and shrinking in turns
            self._resize(self.capacity // 2)

    def take(self, row: int) -> States:
        """A copy of the states of a row."""
        return take(self.cache, row)

    def _resize(self, capacity: int) -> None:
        old = self.cache
        self.capacity = capacity
        for layer, other in zip(self.cache.layers, old.layers, strict=True):
            for state, before in zip(layer.states, other.states, strict=True):
                state[: self.length].copy_(before[: self.length])
