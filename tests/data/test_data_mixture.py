"""Mixtures: exact shares at every place, a place far ahead at once, sources that begin anew, other weights later."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssm_lm.data.mixture import FINEST, Mixture, parts_of, pattern
from ssm_lm.data.phases import gone_on
from ssm_lm.data.sources import read_sources
from ssm_lm.errors import UserError


@pytest.mark.parametrize(
    ("weights", "parts"),
    [
        ((0.7, 0.2, 0.1), (7, 2, 1)),
        ((3, 1), (3, 1)),
        ((1,), (1,)),
        ((0.5, 0, 0.5), (1, 0, 1)),
        ((1e9, 3e9), (1, 3)),
        ((0.333333333, 0.333333333, 0.333333334), (3333, 3333, 3334)),
        ((123_456_789, 987_654_321), (1111, 8889)),
    ],
)
def test_weights_are_whole_parts(weights, parts):
    assert parts_of(weights) == parts


@pytest.mark.parametrize("weights", [(0, 0), (1, -1), (1, float("nan")), (1, float("inf")), (1e-6, 1)])
def test_weights_that_make_no_shares(weights):
    with pytest.raises(ValueError, match="weight"):
        parts_of(weights)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(any))
def test_at_every_place_each_source_has_its_share_to_less_than_a_window(parts):
    dealt = pattern(tuple(parts))
    had = np.cumsum(dealt[:, None] == np.arange(len(parts)), axis=0)
    places = np.arange(1, len(dealt) + 1)[:, None]
    off = had * sum(parts) - places * np.array(parts)  # in parts of a window, exactly
    assert (abs(off) < sum(parts)).all()
    assert (off[-1] == 0).all()


class Counted:
    """A source's order that says which of its windows was asked for."""

    def __init__(self, windows):
        self.windows = windows

    def __len__(self):
        return self.windows

    def at(self, places):
        return places


def mixture():
    phases = [(0, (7, 2, 1)), (1_003, (1, 0, 4)), (5_000, (1, 1, 1))]
    return Mixture([Counted(50), Counted(60), Counted(70)], [0, 10**6, 2 * 10**6], phases)


def test_each_source_goes_through_its_windows_in_order_whatever_the_weights():
    """Asked for in any pieces, the windows are the same: source s gives its windows 0, 1, 2, ..., none twice."""
    made = mixture()
    whole = made.at(np.arange(9_000))
    sources, had = np.divmod(whole, 10**6)
    for source in range(3):
        assert had[sources == source].tolist() == list(range((sources == source).sum()))
    for place in (0, 1, 1_002, 1_003, 1_004, 4_999, 5_000, 9_000):
        assert made.counts(place).tolist() == [(sources[:place] == source).sum() for source in range(3)]
    pieces = [made.at(np.arange(first, first + 7)) for first in range(0, 8_995, 7)]
    assert np.concatenate(pieces).tolist() == whole[:8_995].tolist()
    assert len(made) == 180


def test_shares_are_exact_over_every_stretch_of_steps():
    """Of a phase, to less than two windows between any two steps, and to less than one from its beginning."""
    sources = mixture().at(np.arange(1_000)) // 10**6
    had = np.cumsum(np.stack([sources == source for source in range(3)], 1), axis=0)
    shares = np.array([0.7, 0.2, 0.1])
    for first in range(0, 1_000, 8):
        for last in range(first, 1_000, 40):
            stretch = had[last] - (had[first - 1] if first else 0)
            assert (abs(stretch - shares * (last - first + 1)) < (2 if first else 1)).all()


def test_a_place_far_ahead_is_found_at_once():
    phases = [(0, (7, 2, 1)), (10**12, (1, 0, 4))]
    made = Mixture([Counted(50), Counted(60), Counted(70)], [0, 10**15, 2 * 10**15], phases)
    assert made.counts(10**12 + 5).tolist() == [7 * 10**11 + 1, 2 * 10**11, 10**11 + 4]
    (found,) = made.at(np.array([10**12 - 1]))
    assert found % 10**15 in (7 * 10**11 - 1, 2 * 10**11 - 1, 10**11 - 1)


# ---- the keys of a config


def test_the_keys_of_a_config():
    given = read_sources(["a/x", {"b/y": 2}, {"c/x": 0.5}], {20: [1, 1, 0], 5: [2, 4, 1], 30: [1, 1, 0]}, "config")
    assert given.folders == ["a/x", "b/y", "c/x"]
    assert given.names == given.folders  # two end in x
    assert given.phases == [[0, [2, 4, 1]], [20, [1, 1, 0]]]  # what repeats the weights before it is none
    alone = read_sources("a/x", None, "config")
    assert (alone.names, alone.phases, alone.are_several) == (["x"], [[0, [1]]], False)


@pytest.mark.parametrize(
    ("data", "schedule", "message"),
    [
        (["a", "b", "./a"], None, "a is listed twice"),
        (["a", 3], None, "3 is neither a folder"),
        ([{"a": 1, "b": 2}], None, "neither a folder"),
        ([], None, "the key 'data' is needed"),
        (["a", {"b": "much"}], None, "the weight 'much' is not a number"),
        (["a", {"b": -1}], None, "weights are numbers of at least 0"),
        (["a", {"b": 1e-9}], None, f"less than 1/{FINEST} of their sum"),
        ("a", {5: [1]}, "data_schedule is for several folders"),
        (["a", "b"], {5: [1]}, "5: .* is not a list of 2 weights"),
        (["a", "b"], {0: [1, 1]}, "0 is no step"),
        (["a", "b"], {"soon": [1, 1]}, "soon is no step"),
        (["a", "b"], {5: [0, 0]}, "data_schedule: 5: weights are numbers"),
    ],
)
def test_what_makes_no_mixture_is_one_line(data, schedule, message):
    with pytest.raises(UserError, match=message) as error:
        read_sources(data, schedule, "config")
    assert "\n" not in str(error.value)


def test_a_run_that_goes_on_with_other_weights_keeps_those_that_it_has_seen():
    begun, given = [[0, [1, 1]], [10, [3, 1]]], [[0, [1, 2]], [50, [1, 4]]]
    assert gone_on(begun, given, 0) == given
    assert gone_on(begun, given, 20) == [[0, [1, 1]], [10, [3, 1]], [20, [1, 2]], [50, [1, 4]]]
    assert gone_on(begun, begun, 20) == begun
    assert gone_on(begun, [[0, [1, 1]]], 10) == [[0, [1, 1]]]
    assert gone_on(begun, [[0, [7, 1]], [15, [3, 1]]], 15) == begun  # what held before does not count
