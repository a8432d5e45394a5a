"""Runs what a contest still lacks, a process a run; what is there is not run again.

All that is known lies in the contest's folder: `configs/` and `logs/`, `runs/` with the folders of `ssm-lm train`, and
`results/`, a file for each run that was measured. So the command may be killed at any moment and given again.
"""

import fcntl
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

from ..errors import PREEMPTED, UserError
from ..loading.folder import read_json
from .contest import Contest, Run

WORKER = (sys.executable, "-m", "ssm_lm.comparison.worker")
PATIENCE = 120  # seconds that runs of an earlier call are given to write their checkpoints
LOWER_IS_BETTER = {"perplexity": True, "accuracy": False}
# what may differ between a run and its result: where it lies, how it reports
FREE = ("output_dir", "report_to", "disable_tqdm", "logging_steps", "save_steps", "save_total_limit")


def result_file(contest: Contest, run: Run) -> Path:
    return contest.folder / "results" / f"{run.name}.json"


def read_result(contest: Contest, run: Run) -> dict | None:
    """The result of a run, or None. Raises UserError where it is of another config than the run's."""
    path = result_file(contest, run)
    if not path.is_file():
        return None
    result = read_json(path)
    theirs, ours = ({k: v for k, v in c.items() if k not in FREE} for c in (result.get("config", {}), run.values))
    for key in {**theirs, **ours}:
        if theirs.get(key) != ours.get(key):
            raise UserError(
                f"{path}: is of another config, with {key} {theirs.get(key)!r}, not {ours.get(key)!r}; choose another "
                "output_dir, or the config that it was made with"
            )
    return result


def best_run(contest: Contest, contender: str) -> tuple[Run, dict] | None:
    """(run, result) of a contender's best rate with the first seed, or None where none has a result."""
    found = [(run, read_result(contest, run)) for run in contest.first_runs(contender)]
    found = [(run, result) for run, result in found if result is not None]
    if not found:
        return None
    sign = 1 if LOWER_IS_BETTER[found[0][1]["measure"]] else -1
    return min(found, key=lambda pair: sign * pair[1]["value"])


def missing(contest: Contest, given_up: set[str]) -> list[Run]:
    """The runs to do next: all rates with the first seed, then a contender's best rate with the others.

    In turns, a run of every contender before the second of any, so that a table of few runs has all of them.
    """
    lacking = []
    for contender in contest.contenders:
        first = contest.first_runs(contender)
        wanted = [run for run in first if run.name not in given_up and read_result(contest, run) is None]
        if not wanted and (best := best_run(contest, contender)):
            repeats = contest.repeats(contender, best[0].rate)
            wanted = [run for run in repeats if run.name not in given_up and read_result(contest, run) is None]
        lacking.append(wanted)
    return [run for turn in itertools.zip_longest(*lacking) for run in turn if run is not None]


class Signals:
    """SIGTERM and SIGINT within the block are kept in `received`, and end nothing."""

    received: int | None = None

    def __enter__(self):
        self._before = {number: signal.signal(number, self._keep) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _keep(self, number, frame):
        self.received = number


def run_missing(contest: Contest, jobs: int) -> list[str]:
    """Do all that is missing, `jobs` runs at a time; the names of runs that failed.

    Raises UserError where the folder cannot be written to or another call works in it, and SystemExit(75) where a
    signal asked to end: the runs have written their checkpoints.
    """
    try:
        for name in ("configs", "logs", "runs", "results"):
            (contest.folder / name).mkdir(parents=True, exist_ok=True)
        lock = open(contest.folder / ".lock", "a")
    except OSError as error:
        raise UserError(f"{contest.where}: output_dir: {error.filename}: {error.strerror}; choose another") from error
    wait_for(lock, contest.folder)
    running, failed, asked = {}, set(), False
    with Signals() as signals:
        while running or signals.received is None:
            if signals.received is None:
                started = {run.name for run in running.values()}
                waiting = [run for run in missing(contest, failed) if run.name not in started]
                for run in waiting[: jobs - len(running)]:
                    running[start(contest, run, lock.fileno(), jobs)] = run
                if not running:
                    break
            for process in [process for process in running if process.poll() is not None]:
                run = running.pop(process)
                if process.returncode == PREEMPTED and signals.received is None:
                    signals.received = signal.SIGTERM  # a scheduler may signal the runs and not this process
                # one that was signalled before it could take a checkpoint has lost nothing that it had
                stopped = process.returncode == PREEMPTED or (asked and process.returncode == -signal.SIGTERM)
                if process.returncode and not stopped:
                    failed.add(run.name)
                print(outcome(contest, run, PREEMPTED if stopped else process.returncode), flush=True)
            if signals.received is not None and not asked:
                asked = True
                for process in running:
                    process.terminate()
            time.sleep(0.2)
    if signals.received is not None:
        print("stopped   the runs have written their checkpoints, and the same command goes on from them", flush=True)
        raise SystemExit(PREEMPTED)
    return sorted(failed)


def wait_for(lock, folder: Path) -> None:
    """Take the lock of a folder, which every run holds too: one that a kill of its parent has left ends soon."""
    deadline, said = time.monotonic() + PATIENCE, False
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(f"{folder}: another `ssm-lm compare` works in it; let that one end first") from error
        if not said:
            print(f"{folder}: waiting for runs of another call to end", flush=True)
            said = True
        time.sleep(0.2)


def start(contest: Contest, run: Run, lock: int, jobs: int) -> subprocess.Popen:
    """The process of a run, in a session of its own: the terminal's Ctrl-C reaches this process alone."""
    config, log = contest.folder / "configs" / f"{run.name}.yaml", contest.folder / "logs" / f"{run.name}.log"
    config.write_text(yaml.safe_dump(run.values, sort_keys=False), encoding="utf-8")
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    words = [str(config), str(result_file(contest, run)), str(os.getpid())]
    print(f"started   {run.name}: {log}", flush=True)
    with open(log, "a", encoding="utf-8") as output:
        return subprocess.Popen(
            [*WORKER, *words],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            pass_fds=(lock,),
            start_new_session=True,
        )


def outcome(contest: Contest, run: Run, code: int) -> str:
    """What became of a run, in one line."""
    if code == PREEMPTED:
        return f"stopped   {run.name}"
    result = read_result(contest, run) if code == 0 else None
    if result is not None:
        return f"done      {run.name}: {result['measure']} {result['value']:.4g}"
    log = contest.folder / "logs" / f"{run.name}.log"
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    last = lines[-1].strip() if lines else "it has written nothing"
    ended = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
    return f"failed    {run.name} ({ended}): {last}"
