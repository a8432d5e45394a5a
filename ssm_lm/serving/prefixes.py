"""States that were met, by the tokens that led to them: what goes on from there is not read again."""

import hashlib
from array import array
from collections import Counter, OrderedDict

from .states import States, size_of


class Prefixes:
    """The states after sequences of tokens, as many as `most_bytes` hold; those not asked for longest go first."""

    def __init__(self, most_bytes: int):
        self.most_bytes, self.bytes = most_bytes, 0
        self.states: OrderedDict[tuple[int, bytes], States] = OrderedDict()
        self.lengths: Counter[int] = Counter()

    def keep(self, ids: list[int], states: States) -> None:
        """The states after `ids`."""
        size = size_of(states)
        if not ids or size > self.most_bytes:
            return
        key = len(ids), digests(ids, [len(ids)])[0]
        if key in self.states:
            self.states.move_to_end(key)
            return
        self.states[key] = states
        self.lengths[len(ids)] += 1
        self.bytes += size
        while self.bytes > self.most_bytes:
            (length, _), dropped = self.states.popitem(last=False)
            self.lengths -= Counter([length])
            self.bytes -= size_of(dropped)

    def longest(self, ids: list[int]) -> tuple[int, States | None]:
        """(length, states) of the longest beginning of `ids`, short of its last token, that is known; or (0, None)."""
        lengths = sorted(length for length in self.lengths if length < len(ids))
        for key in reversed(list(zip(lengths, digests(ids, lengths), strict=True))):
            if key in self.states:
                self.states.move_to_end(key)
                return key[0], self.states[key]
        return 0, None


def digests(ids: list[int], lengths: list[int]) -> list[bytes]:
    """Of the first n ids, for each n of `lengths`, which grow: one pass over all."""
    hashed, found, done = hashlib.blake2b(digest_size=16), [], 0
    for length in lengths:
        hashed.update(array("q", ids[done:length]).tobytes())
        found.append(hashed.copy().digest())
        done = length
    return found
