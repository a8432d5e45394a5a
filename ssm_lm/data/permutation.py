"""A shuffle without a table: where the i-th of n numbers lands, in O(1) time and memory, whatever n is.

A number below n is written as a pair (l, r), l < a and r < b, with a b the least such product at or above n for
a = ceil(sqrt(n)). Each round adds to one half a hash of the other half and of a key of the round:

    l <- (l + F(key, r)) mod a      in even rounds
    r <- (r + F(key, l)) mod b      in odd ones

That is a Feistel network, so it can be undone, so it is a permutation of the a b pairs, whatever F is. What lands at n
or above goes through once more until it lands below ("cycle walking"; a b - n < a, so one number in sqrt(n) does),
which leaves a permutation of the n numbers.

Why it is fair: with random functions for F, four rounds are not to be told from a permutation drawn at random by fewer
than n^(1/4) questions (Luby and Rackoff 1988), and each two rounds more raise that towards n (Patarin 2004); here are
eight, and F is the finalizer of SplitMix64 (Steele, Lea and Flood 2014). Cycle walking keeps what is random random
(Black and Rogaway 2002, "Ciphers with arbitrary finite domains"). tests/data/test_data_permutation.py counts it.
"""

import math

import numpy as np

ROUNDS = 8
LARGEST = 1 << 62  # halves and their sums then fit into 64 bits


class Permutation:
    """`permutation(places)` is where places 0 .. size - 1 land, an int64 array; no two land at one place.

    keys: ROUNDS random 64-bit words; others make another permutation. Raises ValueError for a size that cannot be.
    """

    def __init__(self, size: int, keys: np.ndarray):
        if not 1 <= size <= LARGEST or len(keys) != ROUNDS:
            raise ValueError(f"a permutation of {size} numbers by {len(keys)} keys: 1 to 2^62 numbers, {ROUNDS} keys")
        self.size, self.keys = np.uint64(size), np.asarray(keys, dtype=np.uint64)
        left = math.isqrt(size - 1) + 1
        self.left, self.right = np.uint64(left), np.uint64(-(-size // left))

    def __call__(self, places: np.ndarray) -> np.ndarray:
        landed = self._network(np.asarray(places, dtype=np.uint64))
        while (outside := landed >= self.size).any():
            landed[outside] = self._network(landed[outside])
        return landed.astype(np.int64)

    def _network(self, numbers: np.ndarray) -> np.ndarray:
        right, left = np.divmod(numbers, self.left)
        for number, key in enumerate(self.keys):
            if number % 2 == 0:
                left = (left + _hash(right, key) % self.left) % self.left
            else:
                right = (right + _hash(left, key) % self.right) % self.right
        return left + right * self.left


def _hash(values: np.ndarray, key: np.uint64) -> np.ndarray:
    """64 bits of each value, uint64: SplitMix64 from a state that the key and the value give. Wraps around."""
    mixed = (values ^ key) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
