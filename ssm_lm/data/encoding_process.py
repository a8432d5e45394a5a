"""The main function of a process that encodes units for `ssm-lm prepare`; see processes.py."""

import contextlib
import os
import pickle
import signal
import sys
import traceback

from ..errors import UserError
from ..noise import drop_known_lines
from .hub import one_line_errors
from .processes import send


def main() -> None:
    """Read an Encoding and then units from standard input until it ends, and answer each on standard output."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the caller's to answer
    drop_known_lines()
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    units = sys.stdin.buffer
    encoding = pickle.load(units)
    # the caller is done, or was killed, perhaps in the middle of a unit
    with one_line_errors(), contextlib.suppress(EOFError, BrokenPipeError, pickle.UnpicklingError):
        while True:
            unit = pickle.load(units)
            try:
                answer = ("counts", encoding(unit))
            except (UserError, OSError) as error:
                answer = ("error", error)
            except Exception as error:
                traceback.print_exc()
                answer = ("error", RuntimeError(f"unit {unit.number} failed: {error}"))
            send(answers, answer)
