"""Ranks without a launcher, and without the seconds of their imports.

A small run spends most of its life importing torch, transformers and DeepSpeed. Here one process a test session,
multiprocessing's fork server, imports them, and every rank is a fork of it: a process of its own, with its own
environment, signals, output and exit code. Tests of launchers, and of how a process starts, use `harness.run`.
"""

import multiprocessing
import multiprocessing.connection
import os
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
from harness import REPO, process_environment

# what a run imports, of itself or late; a name that is gone is passed over, and its import costs each rank its time
PRELOADED = (
    "ssm_lm.auto",
    "ssm_lm.training.tasks",
    "ssm_lm.training.train",
    "deepspeed",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.runtime.zero.muon",
    "torch._dynamo.repro.after_dynamo",
    "torch._inductor.compile_fx",
    "setuptools",
    "distutils.ccompiler",
)
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(list(PRELOADED))


def _become(words: list[str], folder: str, environment: dict, out: str, err: str) -> None:
    """In the fork: run as `python *words` would in that folder."""
    multiprocessing.set_start_method(None, force=True)  # the child of a fork server would use one itself
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number, path in ((1, out), (2, err)):
        with open(path, "ab") as file:
            os.dup2(file.fileno(), number)
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).parent))
        runpy.run_path(words[0], run_name="__main__")


class Ranks:
    """`ranks` processes that run as `python *words` would, with the variables of torchrun where they are several.

    A context manager: none of them is left behind, whatever a test finds.
    Attributes: processes (one a rank, with pid, exitcode, terminate() and kill()).
    """

    def __init__(self, words: list[str], ranks: int = 1, folder: Path = REPO, **environment):
        self.words, self._folder = words, tempfile.TemporaryDirectory()
        self._out, self._err = (Path(self._folder.name, name) for name in ("out", "err"))
        for path in (self._out, self._err):
            path.touch()
        # the ranks meet in a store of this process, as under torchrun in one of its agent: its port is taken already
        self._store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        group = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "TORCHELASTIC_USE_AGENT_STORE": "True"}
        group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self._store.port}
        self.processes = []
        with mock.patch.dict(os.environ, process_environment(DS_ACCELERATOR="cpu")):  # for the server, if it starts now
            for rank in range(ranks):
                place = group | {"RANK": rank, "LOCAL_RANK": rank} if ranks > 1 else {}
                variables = process_environment(**place, **environment)
                arguments = (words, str(folder), variables, str(self._out), str(self._err))
                self.processes.append(_context.Process(target=_become, args=arguments))
                self.processes[-1].start()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.kill()

    def said(self) -> str:
        """What the ranks have written until now, to stdout and then to stderr."""
        return self._out.read_text() + self._err.read_text()

    def wait_until(self, condition, seconds: float = 200) -> None:
        """Until condition() is true. Fails the test after `seconds`, or where a rank ends first."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert all(process.is_alive() for process in self.processes), self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.01)

    def kill(self) -> None:
        """SIGKILL to all."""
        for process in self.processes:
            process.kill()
            process.join()

    def wait(self, seconds: float = 200) -> subprocess.CompletedProcess:
        """The end, with the first exit code that is not 0. As under torchrun, a rank that fails ends the others."""
        code, running, deadline = 0, list(self.processes), time.monotonic() + seconds
        while running:
            ready = multiprocessing.connection.wait([p.sentinel for p in running], deadline - time.monotonic())
            if not ready and not code:
                raise subprocess.TimeoutExpired(self.words, seconds, self._out.read_text(), self._err.read_text())
            if not ready:
                break
            for process in [process for process in running if process.sentinel in ready]:
                process.join()
                running.remove(process)
                if process.exitcode and not code:
                    code, deadline = process.exitcode, time.monotonic() + 20
                    for other in running:
                        other.terminate()
        return subprocess.CompletedProcess(self.words, code, self._out.read_text(), self._err.read_text())


def attempt(words: list[str], ranks: int = 1, seconds: float = 200, **environment) -> subprocess.CompletedProcess:
    """Run to the end, whatever the exit code."""
    with Ranks(words, ranks, **environment) as started:
        return started.wait(seconds)


def run(words: list[str], ranks: int = 1, **options) -> subprocess.CompletedProcess:
    """Run to the end; fail the test with the output if it fails. options: as of `attempt`."""
    done = attempt(words, ranks, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def train(config: str, *overrides: str, ranks: int = 1, **options) -> subprocess.CompletedProcess:
    """`ssm-lm train` on so many ranks, to the end."""
    return run(["-m", "ssm_lm", "train", config, *overrides], ranks, **options)
