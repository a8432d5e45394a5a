"""The lock of an output folder: who holds it, who may take it over, and what a second start does."""

import json
import os
import threading
import time

import psutil
import pytest
from test_universal import rewind

from ssm_lm.cli import main
from ssm_lm.errors import UserError
from ssm_lm.runs.listing import state_of
from ssm_lm.training import lock as lock_module
from ssm_lm.training.lock import LOCK_FILE, describe, is_held, locked


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lock_module, "BEAT", 0.05)
    monkeypatch.setattr(lock_module, "STALE", 0.6)


def in_a_fork(work) -> int:
    """The number of a process that does this, and ends with exit code 0, or 2 for a UserError."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except UserError:
            os._exit(2)
        finally:
            os._exit(3)
    return child


def exit_code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def wait_for(condition, seconds=20) -> None:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)


def leave_behind(folder, **facts):
    """A lock as another machine's process would have left it."""
    (folder / LOCK_FILE).write_text(json.dumps(describe("theirs") | {"host": "elsewhere", "machine": "else"} | facts))


def test_a_second_start_is_refused_and_touches_nothing(write_config, tmp_path, straight, capsys):
    settings = {"max_steps": 12, "save_strategy": "steps", "save_steps": 1000}
    folder = tmp_path / "run"
    rewind(straight(**settings), folder, 0)
    (folder / ".partial" / "checkpoint-3").mkdir(parents=True)  # being written
    with locked(folder):
        assert is_held(folder)
        assert state_of(folder) == "running"
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != LOCK_FILE}
        assert main(["train", write_config(**settings)]) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert f"in use by the run in {folder} on {os.uname().nodename} (process {os.getpid()}, started 20" in said
        assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != LOCK_FILE}
    assert not is_held(folder)
    assert not (folder / LOCK_FILE).exists()


@pytest.mark.parametrize("reaped", [True, False])
def test_a_process_that_was_killed_here_holds_nothing(tmp_path, capsys, reaped):
    child = in_a_fork(lambda: (lock_module.take(tmp_path / LOCK_FILE, "theirs"), os._exit(9)))
    if reaped:
        assert exit_code(child) == 9
    else:  # nobody has asked for its exit code yet: its number is still taken
        while psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
    assert not is_held(tmp_path)
    with locked(tmp_path):
        assert f"(process {child}, " in capsys.readouterr().out
        assert is_held(tmp_path)
    if not reaped:
        assert exit_code(child) == 9


def test_a_number_that_another_process_has_now_holds_nothing(tmp_path, capsys):
    leave_behind(tmp_path, machine=lock_module.machine(), process_started=0)
    with locked(tmp_path):
        assert "takes over the run in" in capsys.readouterr().out


def test_another_machines_lock_is_taken_over_when_it_is_not_touched(tmp_path, capsys):
    leave_behind(tmp_path)
    start = time.monotonic()
    with locked(tmp_path):
        assert 0.3 < time.monotonic() - start < 20
        said = capsys.readouterr().out
        assert "waits for up to" in said
        assert "takes over the run in" in said
        assert " on elsewhere (process" in said
    leave_behind(tmp_path)
    os.utime(tmp_path / LOCK_FILE, (0, 0))
    with locked(tmp_path):
        assert "waits for" not in capsys.readouterr().out


def test_another_machines_lock_that_is_touched_is_respected(tmp_path):
    leave_behind(tmp_path)
    ended = threading.Event()

    def touch():
        while not ended.wait(0.05):
            os.utime(tmp_path / LOCK_FILE)

    thread = threading.Thread(target=touch)
    thread.start()
    try:
        with pytest.raises(UserError, match=r"in use by .* on elsewhere"), locked(tmp_path):
            pass
    finally:
        ended.set()
        thread.join()
    assert json.loads((tmp_path / LOCK_FILE).read_text())["token"] == "theirs"


def test_one_that_ends_during_the_wait_is_said(tmp_path):
    leave_behind(tmp_path)
    threading.Timer(0.2, (tmp_path / LOCK_FILE).unlink).start()
    with pytest.raises(UserError, match="has just ended; the same command goes on"), locked(tmp_path):
        pass


def test_of_several_that_take_over_one_does(tmp_path):
    leave_behind(tmp_path)
    os.utime(tmp_path / LOCK_FILE, (0, 0))

    def work():
        with locked(tmp_path):
            wait_for((tmp_path / "refused").exists)

    children = [in_a_fork(work) for _ in range(4)]
    ended = os.WEXITED | os.WNOHANG | os.WNOWAIT
    wait_for(lambda: sum(os.waitid(os.P_PID, child, ended) is not None for child in children) == 3)
    (tmp_path / "refused").touch()
    assert sorted(map(exit_code, children)) == [0, 2, 2, 2]


def test_who_has_lost_the_lock_ends(tmp_path):
    def work():
        with locked(tmp_path):
            (tmp_path / "held").touch()
            time.sleep(20)

    child = in_a_fork(work)
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    leave_behind(tmp_path)
    assert exit_code(child) == 1
    assert json.loads((tmp_path / LOCK_FILE).read_text())["token"] == "theirs"


def test_a_damaged_lock_is_no_traceback(tmp_path):
    (tmp_path / LOCK_FILE).write_text("[")
    with locked(tmp_path):
        assert is_held(tmp_path)
