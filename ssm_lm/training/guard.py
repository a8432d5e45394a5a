"""Which steps are not taken: those whose loss or gradient is not finite, or stands out of what came before.

With v the loss or the gradient norm of a step,

    z = (log v - usual) / max(1.4826 MAD(log v), FLOOR)

and z > threshold is a spike. Median and MAD are of the last `window` steps that were taken; spikes do not move them.
The logarithm makes the test the same at loss 10 and at loss 2. A loss that falls is never one.

What stays is no spike: other data, or gradients that grow, are a new level, and a guard that compared with the steps
that it lets pass alone would refuse them for ever. So `usual` is the larger of two medians, that of the window and that
of the last RECENT steps, taken or not. A level that is reached at once costs RECENT // 2 + 1 skipped steps, one that
is crept up to none. How far above the window's median the second one may be is limited to a factor LEVEL: a model that
has broken, whose loss stays too, is to go back to a checkpoint. Where going back has not helped it is not the model,
and the limit falls (`trusts_levels`).
"""

import math
import statistics
from collections import deque

MIN_HISTORY = 20  # steps before anything can be a spike: the first ones move the most
FLOOR = 0.03  # of the spread: on a smooth curve, a few per cent would count as a spike otherwise
RECENT = 5  # steps, skipped ones among them, of which more than half make a new level
LEVEL = math.log(3)  # above the old one


NAMES = ("loss", "gradient norm")


class StepGuard:
    """threshold: z beyond which a step is skipped; 0: only what is not finite is. window: steps that are remembered.

    trusts_levels: whether a level that stays is learnt however high it is.
    """

    def __init__(self, threshold: float, window: int):
        self.threshold, self.trusts_levels = threshold, False
        self.history = {name: deque(maxlen=window) for name in NAMES}
        self.recent = {name: deque(maxlen=RECENT) for name in NAMES}

    def verdict(self, loss: float, gradient_norm: float) -> str | None:
        """Why this step is not to be taken, or None; then its numbers join the history."""
        values = dict(zip(NAMES, (loss, gradient_norm), strict=True))
        for name, value in values.items():
            if not math.isfinite(value):
                return f"{name} is {value}"
        reason = self._spike(values) if self.threshold else None
        for name, value in values.items():
            self.recent[name].append(_log(value))
            if reason is None:
                self.history[name].append(_log(value))
        return reason

    def _spike(self, values: dict[str, float]) -> str | None:
        for name, value in values.items():
            if len(self.history[name]) < MIN_HISTORY:
                continue
            usual = self._usual(name)
            z = (_log(value) - usual) / max(self._deviation(name), FLOOR)
            if z > self.threshold:
                return f"{name} {value:.4g}, usually {math.exp(usual):.4g}, is {z:.0f} deviations off"
        return None

    def _usual(self, name: str) -> float:
        median = statistics.median(self.history[name])
        recent = statistics.median(self.recent[name]) if len(self.recent[name]) == RECENT else median
        return max(median, recent if self.trusts_levels else min(recent, median + LEVEL))

    def _deviation(self, name: str) -> float:
        history = self.history[name]
        median = statistics.median(history)
        return 1.4826 * statistics.median(abs(v - median) for v in history)

    def state(self) -> dict:
        """What a checkpoint keeps, so that a resumed run judges as the first one would have."""
        recent = {name: list(values) for name, values in self.recent.items()}
        return {name: list(values) for name, values in self.history.items()} | {"recent": recent}

    def load_state(self, state: dict) -> None:
        for kept, values in ((self.history, state), (self.recent, state.get("recent", {}))):
            for name in NAMES:
                kept[name].clear()
                kept[name].extend(values.get(name, []))


def _log(value: float) -> float:
    return math.log(max(value, 1e-30))
