"""The engine in a thread of its own, which sleeps while there is nothing to do."""

import logging
import threading

from .engine import Engine, Request

LOG = logging.getLogger(__name__)


class EngineThread:
    """Between `start` and `stop`, whatever is submitted is worked on."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.wake, self.ended = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def stop(self) -> None:
        """After the step that is being made."""
        self.ended.set()
        self.wake.set()
        self.thread.join()

    def submit(self, request: Request) -> None:
        """Full where too many wait."""
        self.engine.submit(request)
        self.wake.set()

    def _run(self) -> None:
        while not self.ended.is_set():
            self.wake.clear()
            with self.engine.unchanged():
                while not (self.engine.is_idle or self.ended.is_set()):
                    self._step()
            self.wake.wait()

    def _step(self) -> None:
        try:
            self.engine.step()
        except Exception:  # of the model or its device: who waits is told, and the next may fare better
            LOG.exception("a step failed, and all texts in work end")
            self.engine.fail()
