"""The shuffle without a table: a permutation whatever the size, the same in later releases, and fair."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssm_lm.data.permutation import LARGEST, ROUNDS, Permutation


def keys(*seed) -> np.ndarray:
    return np.random.PCG64(seed).random_raw(ROUNDS)


@settings(deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**32))
def test_every_number_lands_once(size, seed):
    assert sorted(Permutation(size, keys(seed))(np.arange(size)).tolist()) == list(range(size))


def test_the_order_stays_the_same_in_later_releases():
    """A run that goes on must see what it would have seen: this is part of the format."""
    assert Permutation(11, keys(1))(np.arange(11)).tolist() == [9, 0, 7, 10, 6, 1, 4, 5, 3, 8, 2]
    far = np.array([0, 1, 9_999_999_999], dtype=np.int64)
    assert Permutation(10_000_000_000, keys(1, 2))(far).tolist() == [8867981337, 1723173735, 4718587296]
    assert Permutation(LARGEST, keys(3))(np.array([LARGEST - 1]))[0] == 64197287932494611


def test_sizes_that_cannot_be():
    for size in (0, LARGEST + 1):
        with pytest.raises(ValueError, match="1 to 2"):
            Permutation(size, keys(1))


def chi_square(counts: np.ndarray) -> float:
    """In standard deviations from what equal chances give."""
    expected = counts.sum() / counts.size
    degrees = counts.size - 1
    return (((counts - expected) ** 2 / expected).sum() - degrees) / math.sqrt(2 * degrees)


def test_each_of_the_24_orders_of_four_is_as_likely():
    orders = {order: number for number, order in enumerate(itertools.permutations(range(4)))}
    drawn = [orders[tuple(Permutation(4, keys(7, seed))(np.arange(4)).tolist())] for seed in range(3000)]
    assert abs(chi_square(np.bincount(drawn, minlength=24))) < 4


@pytest.mark.parametrize("size", [50, 100_003])
def test_a_place_goes_anywhere_and_neighbours_part(size):
    """Over many keys: where a place lands, and how far apart two neighbours do, is anything, equally often."""
    places = np.array([0, 1, size // 2, size - 2, size - 1])
    landed = np.array([Permutation(size, keys(8, seed))(places) for seed in range(3000)])
    for column in range(len(places)):
        assert abs(chi_square(np.bincount(landed[:, column] * 50 // size, minlength=50))) < 4
    for one, other in ((0, 1), (3, 4), (0, 4)):
        apart = (landed[:, one] - landed[:, other]) % size - 1  # 0 .. size - 2
        assert abs(chi_square(np.bincount(apart * 49 // (size - 1), minlength=49))) < 4


def test_the_order_within_one_key_has_no_pattern():
    """A million windows, one epoch: tenths of the text in every tenth of the epoch, no drift, no correlation."""
    size = 1_000_003
    landed = Permutation(size, keys(9))(np.arange(size))
    table = np.bincount((np.arange(size) * 20 // size) * 20 + landed * 20 // size, minlength=400)
    assert abs(chi_square(table)) < 4
    for lag in (1, 2, 1000, 1001):  # the sides of the square that the numbers are laid out in are 1001 and 1000
        correlation = np.corrcoef(landed[:-lag], landed[lag:])[0, 1]
        assert abs(correlation) * math.sqrt(size) < 4
    moved = len(np.unique((landed - np.arange(size)) % size)) / size
    assert abs(moved - (1 - 1 / math.e)) < 0.004  # as of random draws
