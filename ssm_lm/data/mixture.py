"""Windows of several sources in fixed shares, in an order that is a function of the place in the run alone.

A mixture says how many windows each source has among D in a row, as parts (7, 2, 1) of D = 10. Within D the places are
dealt as a fair schedule deals a processor among periodic tasks: the j-th window of a source with m parts may come from
place floor(j D / m) on and must come before place ceil((j + 1) D / m), and of those that may come the one that must
come first does (Baruah, Cohen, Plaxton and Varvel 1996; on one processor, earliest deadline first keeps every
deadline). So at every place the number of windows that a source has had is its share of the places, to less than one
window. After D places all is as at the beginning, and a place far ahead costs what the first one does.
"""

import functools
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

FINEST = 10_000  # parts that a mixture may have: shares are told apart to a ten-thousandth


def parts_of(weights: Sequence[float]) -> tuple[int, ...]:
    """Weights as whole parts: exactly, where at most FINEST parts do that, else FINEST in all, by largest remainders.

    Raises ValueError, in words, for weights that make no shares.
    """
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not any(weights):
        raise ValueError("weights are numbers of at least 0, and one of them is more")
    exact = [Fraction(str(weight)) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    parts = math.lcm(*(share.denominator for share in shares))
    if parts <= FINEST:
        return tuple(int(share * parts) for share in shares)
    whole = [int(share * FINEST) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda number: whole[number] - shares[number] * FINEST)
    for number in by_remainder[: FINEST - sum(whole)]:
        whole[number] += 1
    if any(share and not part for share, part in zip(shares, whole, strict=True)):
        raise ValueError(f"a weight is less than 1/{FINEST} of their sum")
    common = math.gcd(*whole)
    return tuple(part // common for part in whole)


@functools.lru_cache(maxsize=64)
def pattern(parts: tuple[int, ...]) -> np.ndarray:
    """The source of each of sum(parts) places, (D,)."""
    places, had = sum(parts), [0] * len(parts)
    dealt = np.empty(places, dtype=np.int64)
    for place in range(places):
        may_come = [s for s, part in enumerate(parts) if had[s] * places < part * (place + 1)]
        chosen = min(may_come, key=lambda s: -(-(had[s] + 1) * places // parts[s]))
        dealt[place] = chosen
        had[chosen] += 1
    return dealt


class Phase:
    """Parts that hold from place `first` on; before: the windows that each source has had until then, (sources,)."""

    def __init__(self, first: int, parts: tuple[int, ...], before: np.ndarray):
        self.first, self.parts, self.before = first, np.array(parts), before
        self.length, self.sources = sum(parts), pattern(parts)
        had = np.cumsum(self.sources[:, None] == np.arange(len(parts)), axis=0)  # (D, sources), the place included
        self.had = np.concatenate([np.zeros((1, len(parts)), dtype=np.int64), had])

    def counts(self, place: int) -> np.ndarray:
        """The windows of each source among the first `place` of the run, which lies in this phase or at its end."""
        rounds, rest = divmod(place - self.first, self.length)
        return self.before + rounds * self.parts + self.had[rest]

    def at(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(the source, how many windows it had before) of each of the places, which lie in this phase."""
        rounds, rest = np.divmod(places - self.first, self.length)
        sources = self.sources[rest]
        return sources, self.before[sources] + rounds * self.parts[sources] + self.had[rest, sources]


class Mixture:
    """`mixture.at(places)`: the windows at places of a run, as numbers of a dataset that holds the sources in a row.

    orders: a `WindowSampler` a source; offsets: where each begins in that dataset; phases: (first place, parts), in
    order, the first at 0. A source that is at its end begins its next epoch.
    """

    def __init__(self, orders: Sequence, offsets: Sequence[int], phases: Sequence[tuple[int, Sequence[int]]]):
        self.orders, self.offsets, self.phases = orders, offsets, []
        before = np.zeros(len(orders), dtype=np.int64)
        for first, parts in phases:
            if self.phases:
                before = self.phases[-1].counts(first)
            self.phases.append(Phase(first, tuple(parts), before))

    def __len__(self) -> int:
        """Windows that are all the sources once."""
        return sum(len(order) for order in self.orders)

    def counts(self, place: int) -> np.ndarray:
        """How many of the first `place` windows of the run are of each source, (sources,)."""
        return next(phase for phase in reversed(self.phases) if phase.first <= place).counts(place)

    def at(self, places: np.ndarray) -> np.ndarray:
        sources, had, found = (np.empty_like(places) for _ in range(3))
        of_phase = np.searchsorted([phase.first for phase in self.phases], places, side="right") - 1
        for number in np.unique(of_phase):
            here = of_phase == number
            sources[here], had[here] = self.phases[number].at(places[here])
        for number in np.unique(sources):
            here = sources == number
            found[here] = self.offsets[number] + self.orders[number].at(had[here])
        return found
