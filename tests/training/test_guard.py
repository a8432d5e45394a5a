"""What is judged to be a fault, and which batches a run passes over."""

import math

import pytest

from ssm_lm.training.epochs import batch_of_step
from ssm_lm.training.guard import MIN_HISTORY, StepGuard
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
    before = guard.state()
    assert "loss 400" in guard.verdict(400.0, 1.0)
    assert "gradient norm 100" in guard.verdict(4.0, 100.0)
    assert guard.state() == before
    assert guard.verdict(4.1, 1.2) is None


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


class Windows(list):
    def set_epoch(self, epoch):
        self[:] = [100 * epoch + number for number in range(5)]


def test_batches_that_are_passed_over_are_not_seen_and_the_others_keep_their_order():
    whole = list(RunSampler(Windows(), 40, batch_size=4))
    batches = [whole[i : i + 4] for i in range(0, 40, 4)]
    passed = list(RunSampler(Windows(), 24, batch_size=4, passed_over=(1, 4)))
    assert [passed[i : i + 4] for i in range(0, 24, 4)] == [batches[i] for i in (0, 2, 3, 5, 6, 7)]
    assert [batch_of_step(step, (4, 1)) for step in range(6)] == [0, 2, 3, 5, 6, 7]
