"""Signals that ask a run to end, and what lets it end in the middle of a step as if that step had not begun."""

import os
import random
import signal
import time

import numpy
import torch

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SAME_KEY = 1.0  # seconds within which a second SIGINT is a launcher's copy of the first


class StopSignals:
    """Within the block, SIGTERM, SIGUSR1 and Ctrl-C set `received` instead of ending the process.

    A second Ctrl-C ends it at once. talks: whether this process says so at the first one.
    """

    def __init__(self, talks: bool = False):
        self.received: str | None = None
        self.talks = talks
        self._interrupted_at: float | None = None

    def __enter__(self):
        # a job in the background has Ctrl-C ignored: it is meant for another one
        numbers = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._remember) for number in numbers}
        return self

    def __exit__(self, *exception):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number, frame):
        self.received = self.received or signal.Signals(number).name
        if number != signal.SIGINT:
            return
        now = time.monotonic()
        if self._interrupted_at is None:
            self._interrupted_at = now
            if self.talks:  # not by print: its lock may be held by what was interrupted
                os.write(2, b"\nssm-lm: a checkpoint, and then the end; Ctrl-C once more ends the run without it\n")
        elif now - self._interrupted_at > SAME_KEY:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)


class RandomState:
    """The random numbers of this moment: of Python, numpy, torch and the devices."""

    def __init__(self):
        self.python, self.numpy, self.cpu = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
        self.devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []

    def restore(self) -> None:
        random.setstate(self.python)
        numpy.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        if self.devices:
            torch.cuda.set_rng_state_all(self.devices)
