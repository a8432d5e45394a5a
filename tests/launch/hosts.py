"""Two hosts on one machine: two network namespaces with a veth pair between them, and nothing else to talk to."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

REPO = Path(__file__).parents[2]
LAUNCH = REPO / "launch"
STAND_IN = Path(__file__).parent / "stand_in"  # has a small ssm_lm, which `python -m` finds first where it is the cwd
PREFIX = "ssmlm"


def launcher_environment(**extra) -> dict:
    """For a launcher: this checkout and Python, one thread, none of the variables that a launcher reads or sets."""
    prefixes = ("SLURM", "PET_", "NCCL_", "GLOO_", "TORCH_", "TORCHINDUCTOR", "TRITON", "DS_", "MASTER_")
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "CUDA_VISIBLE_DEVICES", "INTERFACE", "ADDRESS")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(prefixes) and k not in names}
    environment |= {"PYTHONPATH": str(REPO), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return environment | {key: str(value) for key, value in extra.items()}


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


class Host:
    """A network namespace with an address on eth0, and a hostname of its own."""

    def __init__(self, name: str, address: str):
        self.name, self.address = name, address

    def command(self, *words) -> list[str]:
        # not `ip netns exec`: that mounts /sys anew, and slurmd then finds no cgroups
        words = list(map(str, words))
        inside = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', self.name, *words]
        return ["nsenter", f"--net=/run/netns/{self.name}", *inside]

    def start(self, log: Path, *words, cwd: Path = REPO, **environment) -> subprocess.Popen:
        with open(log, "ab") as out:
            return subprocess.Popen(
                self.command(*words),
                cwd=cwd,
                env=launcher_environment(**environment),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    def pids(self) -> list[int]:
        done = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True)
        return [int(word) for word in done.stdout.split()]

    def kill(self, keep: tuple[int, ...] = ()) -> None:
        """As if its power were cut: SIGKILL to everything that runs there."""
        for _ in range(20):
            victims = [pid for pid in self.pids() if pid not in keep]
            if not victims:
                return
            for pid in victims:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)


class TwoHosts:
    """`a` at 10.77.0.1 and `b` at 10.77.0.2, with one name for the interface at both ends."""

    def __init__(self):
        mark = f"{PREFIX}-{os.getpid()}-{os.urandom(2).hex()}"
        self.a, self.b = Host(f"{mark}a", "10.77.0.1"), Host(f"{mark}b", "10.77.0.2")

    def __enter__(self):
        _sweep()
        try:
            for host in (self.a, self.b):
                ip("netns", "add", host.name)
                ip("-n", host.name, "link", "set", "lo", "up")
            ip(
                "link",
                "add",
                "eth0",
                "netns",
                self.a.name,
                "type",
                "veth",
                "peer",
                "name",
                "eth0",
                "netns",
                self.b.name,
            )
            for host in (self.a, self.b):
                ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", "eth0")
            self.cable(plugged=True)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for host in (self.a, self.b):
            _remove(host)

    def cable(self, plugged: bool) -> None:
        for host in (self.a, self.b) if plugged else (self.b,):
            ip("-n", host.name, "link", "set", "eth0", "up" if plugged else "down")

    def __iter__(self):
        return iter((self.a, self.b))


def _remove(host: Host) -> None:
    host.kill()
    subprocess.run(["ip", "netns", "del", host.name], capture_output=True)


def _sweep() -> None:
    """Remove what a test process that was itself killed has left."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout.split()
    for name in listed:
        if name.startswith(PREFIX + "-") and not psutil.pid_exists(int(name.split("-")[1])):
            _remove(Host(name, ""))


def why_no_two_hosts() -> str | None:
    """None where two hosts can be had, or the reason."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces need root on Linux"
    for tool in ("ip", "nsenter", "unshare"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed"
    try:
        with TwoHosts() as hosts:
            subprocess.run(hosts.a.command("true"), check=True, capture_output=True)
    except subprocess.CalledProcessError as error:
        return f"no network namespaces here: {str(error.stderr).strip()}"
    return None


def wait_for(condition, seconds: float, what: str, *processes: subprocess.Popen):
    """The first true value of condition(); fails the test after `seconds`, or if one of `processes` ends first."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        for process in processes:
            assert process.poll() is None, f"a process ended (exit code {process.returncode}) before {what}"
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.05)
    return value


def end(processes: list[subprocess.Popen], seconds: float, logs: list[Path]) -> list[int]:
    """The exit codes; fails the test, with the logs, where they do not come in time."""
    try:
        deadline = time.monotonic() + seconds
        return [process.wait(max(0.1, deadline - time.monotonic())) for process in processes]
    except subprocess.TimeoutExpired:
        pytest.fail(f"still running after {seconds} s\n" + "\n".join(log.read_text()[-3000:] for log in logs))
