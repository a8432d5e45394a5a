"""One process at a time writes into an output folder: a file in it says which, and since when.

On the machine of the process that wrote the file, the process is there or it is not. From another machine that cannot
be seen, so the file is touched every BEAT seconds: one that was not touched for STALE seconds was left by a process
that was killed. A lock of the operating system (flock) would need neither, but many shared file systems keep it to one
machine or have none, and a job that was killed and put back into the queue comes up on another host. The ages of files
are compared among files of the same folder: the file server has written both times, so no two clocks need to agree.
"""

import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from ..errors import UserError
from ..files import write_json
from ..internals.python import leave

LOCK_FILE = "running.json"
BEAT = 5.0  # seconds between touches
STALE = 30.0  # seconds without one after which nobody holds the lock


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of an output folder, which is there, for the length of the block.

    Raises UserError while another process holds it. A lock that was left behind is taken over, and a line says so; to
    know that of another machine's takes up to STALE seconds. A process that was stopped for so long that another one
    took the lock over ends with exit code 1 as soon as it goes on: the folder is the other's.
    """
    lock, token = folder / LOCK_FILE, secrets.token_hex(8)
    take(lock, token)
    ended = threading.Event()
    beating = threading.Thread(target=_beat, args=(lock, token, ended), daemon=True)
    beating.start()
    try:
        yield
    finally:
        ended.set()
        beating.join()
        if _token(lock) == token:
            lock.unlink(missing_ok=True)


def is_held(folder: Path) -> bool:
    """Whether a process holds the folder's lock, as far as can be told at once."""
    lock = folder / LOCK_FILE
    holder = read(lock)
    if holder is None:
        return False
    here = _process_is_here(holder)
    try:
        return time.time() - lock.stat().st_mtime < 2 * STALE if here is None else here
    except OSError:
        return False


def take(lock: Path, token: str) -> None:
    """Write the lock, or raise UserError. Of two processes that take a stale one over at once, one does."""
    while True:
        try:
            descriptor = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            holder = read(lock)
            if holder is None:
                continue  # it has just gone
            wait_until_stale(lock, holder)
            write_json(lock, describe(token))
            time.sleep(0.2)  # for another process that does the same
            if _token(lock) != token:
                raise _in_use(lock, read(lock) or {}) from None
            print(f"takes over {_said(lock, holder)}, which has ended without a word", flush=True)
            return
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(describe(token), file)
        return


def wait_until_stale(lock: Path, holder: dict) -> None:
    """Return when nobody holds the lock; raise UserError if somebody does, or has until now."""
    here = _process_is_here(holder)
    if here is not None:
        if here:
            raise _in_use(lock, holder)
        return
    first, age = touched(lock)
    if age < STALE:
        print(f"waits for up to {STALE:.0f} s to see whether {_said(lock, holder)} goes on", flush=True)
    while age < STALE:
        time.sleep(min(BEAT, 1.0))
        try:
            last, age = touched(lock)
        except FileNotFoundError:
            raise UserError(f"{_said(lock, holder)} has just ended; the same command goes on from there") from None
        if last != first:
            raise _in_use(lock, read(lock) or holder)


def touched(lock: Path) -> tuple[float, float]:
    """(when the file was touched, seconds since then), both by the clock of the file system. Raises OSError."""
    probe = lock.with_name(f".{lock.name}.{secrets.token_hex(4)}")
    try:
        probe.touch()
        now = probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)
    with open(lock, "rb") as file:  # a network file system may answer from memory about a file that is not opened
        then = os.fstat(file.fileno()).st_mtime
    return then, now - then


def describe(token: str) -> dict:
    """What the lock says of this process."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "process_started": psutil.Process().create_time(),
        "machine": machine(),
        "token": token,
    }


def machine() -> str:
    """The same for all processes that see each other's numbers: of one start of one machine, outside or in one
    container. Host names are no help: containers may share one, and one that is started again keeps its own.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux
        return f"{socket.gethostname()} {psutil.boot_time():.0f}"


def read(lock: Path) -> dict | None:
    """What the lock says; {} where it is damaged or being written, None where there is none."""
    try:
        holder = json.loads(lock.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _token(lock: Path) -> str | None:
    return (read(lock) or {}).get("token")


def _process_is_here(holder: dict) -> bool | None:
    """Whether the process that wrote the lock is alive; None where that cannot be seen from here."""
    if holder.get("machine") != machine():
        return None
    try:
        process = psutil.Process(holder["pid"])
        ended = process.status() == psutil.STATUS_ZOMBIE
        return not ended and abs(process.create_time() - holder["process_started"]) < 1
    except (psutil.NoSuchProcess, KeyError, TypeError, ValueError):
        return False


def _beat(lock: Path, token: str, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        try:
            holder = read(lock)
            if holder == {} or holder is None:
                continue  # the file system fails, or somebody deleted it by hand
            if holder.get("token") == token:
                os.utime(lock)
                continue
        except OSError:
            continue  # a checkpoint will say what is wrong with the disk
        print(
            f"ssm-lm: this process was stopped for so long that {_said(lock, holder)} took over; it ends",
            file=sys.stderr,
        )
        leave(1)


def _said(lock: Path, holder: dict) -> str:
    return (
        f"the run in {lock.parent} on {holder.get('host', 'an unknown host')} (process {holder.get('pid', 'unknown')}, "
        f"started {holder.get('started', 'at an unknown time')})"
    )


def _in_use(lock: Path, holder: dict) -> UserError:
    return UserError(
        f"output_dir is in use by {_said(lock, holder)}; wait for its end or choose another output_dir (or delete "
        f"{lock.name} in it, if that process is none of this run)"
    )
