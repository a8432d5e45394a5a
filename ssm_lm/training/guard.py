"""Which steps are not taken: those whose loss or gradient is not finite, or stands out of what came before.

With v the loss or the gradient norm of a step, and over the last `window` steps that were taken,

    z = (log v - median(log v)) / max(1.4826 MAD(log v), FLOOR)

and z > threshold is a spike. The logarithm makes the test the same at loss 10 and at loss 2; median and MAD are not
moved by the spikes themselves. A loss that falls is never one.
"""

import math
import statistics
from collections import deque

MIN_HISTORY = 20  # steps before anything can be a spike: the first ones move the most
FLOOR = 0.03  # of the spread: on a smooth curve, a few per cent would count as a spike otherwise


class StepGuard:
    """threshold: z beyond which a step is skipped; 0: only what is not finite is. window: steps that are remembered."""

    def __init__(self, threshold: float, window: int):
        self.threshold = threshold
        self.history = {"loss": deque(maxlen=window), "gradient norm": deque(maxlen=window)}

    def verdict(self, loss: float, gradient_norm: float) -> str | None:
        """Why this step is not to be taken, or None; then its numbers join the history."""
        values = {"loss": loss, "gradient norm": gradient_norm}
        for name, value in values.items():
            if not math.isfinite(value):
                return f"{name} is {value}"
        for name, value in values.items():
            z = self._z(name, value)
            if self.threshold and z > self.threshold:
                usual = math.exp(statistics.median(self.history[name]))
                return f"{name} {value:.4g}, usually {usual:.4g}, is {z:.0f} deviations off"
        for name, value in values.items():
            self.history[name].append(_log(value))
        return None

    def _z(self, name: str, value: float) -> float:
        history = self.history[name]
        if len(history) < MIN_HISTORY:
            return 0.0
        median = statistics.median(history)
        deviation = 1.4826 * statistics.median(abs(v - median) for v in history)
        return (_log(value) - median) / max(deviation, FLOOR)

    def state(self) -> dict:
        """What a checkpoint keeps, so that a resumed run judges as the first one would have."""
        return {name: list(values) for name, values in self.history.items()}

    def load_state(self, state: dict) -> None:
        for name, values in state.items():
            self.history[name].clear()
            self.history[name].extend(values)


def _log(value: float) -> float:
    return math.log(max(value, 1e-30))
