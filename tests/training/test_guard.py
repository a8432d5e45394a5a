"""What is judged to be a fault, and which batches a run passes over."""

import json
import math

import pytest
import real_series

from ssm_lm.training.epochs import batch_of_step
from ssm_lm.training.guard import MIN_HISTORY, NAMES, RECENT, StepGuard
from ssm_lm.training.trainer import RunSampler


def seasoned(threshold=10.0, steps=60) -> StepGuard:
    """A guard that has seen a loss fall from 6 to 4, with noise of a few per cent, and norms that vary by a factor."""
    guard = StepGuard(threshold, window=128)
    for step in range(steps):
        loss = 4 + 2 * math.exp(-step / 20) + 0.1 * math.sin(7 * step)
        assert guard.verdict(loss, 1.0 + 0.3 * math.sin(5 * step)) is None
    return guard


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_from_the_first_step(value):
    guard = StepGuard(0.0, window=8)
    assert "loss" in guard.verdict(value, 1.0)
    assert "gradient norm" in guard.verdict(1.0, value)
    assert guard.verdict(1.0, 1.0) is None


def test_a_spike_is_refused_and_does_not_move_what_is_usual():
    guard = seasoned()
    before = {name: guard.state()[name] for name in NAMES}
    assert "loss 400" in guard.verdict(400.0, 1.0)
    assert "gradient norm 100" in guard.verdict(4.0, 100.0)
    assert {name: guard.state()[name] for name in NAMES} == before
    assert guard.verdict(4.1, 1.2) is None


SERIES = json.loads(real_series.FILE.read_text())
LEARNT = RECENT // 2 + 1  # steps that a new level costs


def skipped(series, trusts_levels=False) -> list[int]:
    """The steps of a series of (loss, gradient norm) that are not taken."""
    guard = StepGuard(10.0, window=128)
    guard.trusts_levels = trusts_levels
    return [step for step, (loss, norm) in enumerate(series) if guard.verdict(loss, norm)]


def real(*phases) -> list[tuple[float, float]]:
    return [pair for phase in phases for pair in zip(*(SERIES[phase][name] for name in NAMES), strict=True)]


def test_real_training_is_left_alone_and_a_spike_in_it_is_not():
    """A warm-up, a change of data, a restart with a fresh optimizer: no step is skipped but a hundredfold one."""
    assert skipped(real(*real_series.PHASES)[:600]) == []
    series = real("warm-up", "change of data", "restart")
    for step in range(100, len(series), 29):  # before, the loss falls by more in a window than noise could
        loss, norm = series[step]
        for spike in ((100 * loss, 100 * norm), (loss, 100 * norm), (100 * loss, norm)):
            assert skipped([*series[:step], spike, *series[step + 1 :]]) == [step]


def test_a_level_thirty_times_higher_is_learnt_when_going_back_has_not_helped():
    """Real losses: from sentences that are known by heart to other text. A broken model looks the same at first."""
    series = real("easy data", "hard data")
    change = len(real("easy data"))
    assert skipped(series)[:20] == list(range(change, change + 20))
    assert skipped(series, trusts_levels=True) == list(range(change, change + LEARNT))


@pytest.mark.parametrize(("factors", "expected"), [((1.4, 1.0), LEARNT), ((1.0, 1.4), LEARNT), ((2.8, 2.8), LEARNT)])
def test_a_level_that_stays_is_learnt(factors, expected):
    """After 200 steps without noise, as of a very large batch, 200 at a higher loss or gradient norm."""
    flat, higher = (3.0, 1.0), (3.0 * factors[0], factors[1])
    assert skipped([flat] * 200 + [higher] * 200) == list(range(200, 200 + expected))
    spike = (100 * higher[0], 100 * higher[1])
    assert skipped([flat] * 200 + [higher] * 20 + [spike] + [higher] * 20)[expected:] == [220]


def test_gradients_that_grow_are_followed():
    """By 1% a step, after 128 steps without noise: the median of the window stays behind by a factor of two."""
    assert skipped([(3.0, 1.0)] * 128 + [(3.0, 1.01**step) for step in range(300)]) == []


def test_what_stays_a_hundred_times_higher_is_skipped():
    assert len(skipped([(3.0, 1.0)] * 200 + [(300.0, 100.0)] * 50)) == 50


def test_healthy_training_is_left_alone():
    guard = seasoned()
    assert guard.verdict(4.6, 4.0) is None  # a bad batch
    assert guard.verdict(0.5, 0.01) is None  # falling is no spike
    fresh = StepGuard(10.0, window=128)
    for step in range(MIN_HISTORY):
        assert fresh.verdict(10.0 ** (step % 3), 1.0) is None  # no history, no verdict


def test_zero_turns_spikes_off():
    assert seasoned(threshold=0.0).verdict(1e6, 1e6) is None


def test_the_history_survives_a_checkpoint():
    guard, other = seasoned(), StepGuard(10.0, window=128)
    other.load_state(guard.state())
    assert other.verdict(400.0, 1.0) == guard.verdict(400.0, 1.0) is not None


class Windows:
    """Five windows an epoch."""

    def at(self, places):
        return 100 * (places // 5) + places % 5


def test_batches_that_are_passed_over_are_not_seen_and_the_others_keep_their_order():
    whole = list(RunSampler(Windows(), 40, batch_size=4))
    batches = [whole[i : i + 4] for i in range(0, 40, 4)]
    passed = list(RunSampler(Windows(), 24, batch_size=4, passed_over=(1, 4)))
    assert [passed[i : i + 4] for i in range(0, 24, 4)] == [batches[i] for i in (0, 2, 3, 5, 6, 7)]
    assert [batch_of_step(step, (4, 1)) for step in range(6)] == [0, 2, 3, 5, 6, 7]
