"""Processes that encode units, each fed through a pipe.

A process reads its units from its standard input and ends with it, so none outlives the one that started it, however
that ended. It starts without torch and transformers. `multiprocessing` would start the caller's main module again.
"""

import contextlib
import os
import pickle
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from ..errors import UserError
from .encoding import Encoding
from .units import Unit

# Seconds of work in this process, by the tokenizer's threads, before others are started: a small corpus needs none.
ALONE = 2.0
WORKER = "from ssm_lm.data.encoding_process import main; main()"


def run_units(units: Iterator[Unit], encoding: Encoding, workers: int, done: Callable[[Unit, dict], None]) -> None:
    """Encode units, in `workers` processes where it takes longer than ALONE, and call done(unit, counts) after each.

    Raises the first error that reading or a process meets; what is encoded by then stays.
    """
    start = time.monotonic()
    while workers == 1 or time.monotonic() - start < ALONE:
        unit = next(units, None)
        if unit is None:
            return
        done(unit, encoding(unit))
    _Processes(units, encoding, workers, done).run()


class _Processes:
    """One thread reads the units, one a process hands them over; the first error ends all."""

    def __init__(self, units: Iterator[Unit], encoding: Encoding, workers: int, done: Callable[[Unit, dict], None]):
        self._units, self._encoding, self._done = units, encoding, done
        self._workers = workers
        self._queue: queue.Queue[Unit | None] = queue.Queue(maxsize=workers)
        self._errors: list[BaseException] = []
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._processes: list[subprocess.Popen] = []

    def run(self) -> None:
        threads = [threading.Thread(target=self._guarded, args=(self._serve,)) for _ in range(self._workers)]
        threads.append(threading.Thread(target=self._guarded, args=(self._read,)))
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except BaseException as error:  # Ctrl-C
            self._fail(error)
            for thread in threads:
                thread.join()
        if self._errors:
            raise self._errors[0]

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # it is raised again in the thread that waits
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self._errors.append(error)
            self._ended.set()
            for process in self._processes:
                process.kill()

    def _read(self) -> None:
        for unit in chain(self._units, [None] * self._workers):
            while not self._ended.is_set():
                try:
                    self._queue.put(unit, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if self._ended.is_set():
                return

    def _next(self) -> Unit | None:
        while not self._ended.is_set():
            try:
                return self._queue.get(timeout=0.1)
            except queue.Empty:
                continue
        return None

    def _serve(self) -> None:
        process = None
        try:
            # a process is started when there is a unit for it
            while (unit := self._next()) is not None:
                process = process or self._start()
                counts = self._ask(process, unit)
                with self._lock:
                    if not self._ended.is_set():
                        self._done(unit, counts)
        finally:
            if process is not None:
                with contextlib.suppress(OSError):  # of one that was killed
                    process.stdin.close()
                process.wait()
                process.stdout.close()

    def _start(self) -> subprocess.Popen:
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}
        process = subprocess.Popen(
            [sys.executable, "-c", WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        with self._lock:
            self._processes.append(process)
            if self._ended.is_set():
                process.kill()
        self._send(process, self._encoding)
        return process

    def _ask(self, process: subprocess.Popen, unit: Unit) -> dict:
        self._send(process, unit)
        try:
            kind, value = pickle.load(process.stdout)
        except EOFError:
            raise _gone(process) from None
        if kind == "error":
            raise value
        return value

    def _send(self, process: subprocess.Popen, value: object) -> None:
        try:
            send(process.stdin, value)
        except BrokenPipeError:
            raise _gone(process) from None


def _gone(process: subprocess.Popen) -> UserError:
    code = process.wait()
    return UserError(
        f"a process of prepare ended with {f'signal {-code}' if code < 0 else f'code {code}'} (fewer --workers need "
        "less memory)"
    )


def send(pipe: BinaryIO, value: object) -> None:
    """Write a value that `pickle.load` reads at the other end."""
    pickle.dump(value, pipe, protocol=pickle.HIGHEST_PROTOCOL)
    pipe.flush()
