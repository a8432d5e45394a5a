"""`ssm_lm.network`: how a host is reached, and what the test of a job says when a rank is missing."""

import socket
import subprocess
import sys
import time

import pytest
from hosts import REPO, launcher_environment

from ssm_lm import network
from ssm_lm.cli import main
from ssm_lm.errors import UserError


def test_the_way_to_oneself():
    assert network.route_to("127.0.0.1") == ("lo", "127.0.0.1", "127.0.0.1", True)


def test_a_name_that_is_a_loopback_address_is_reached_from_outside(monkeypatch):
    """As Debian's /etc/hosts has it for a machine's own name."""
    monkeypatch.setattr(
        network.socket, "getaddrinfo", lambda *_, **__: [(socket.AF_INET, socket.SOCK_DGRAM, 0, "", ("127.0.1.1", 9))]
    )
    monkeypatch.setattr(network, "own_addresses", lambda: {"127.0.0.1": "lo", "127.0.1.1": "lo", "10.9.0.1": "eth9"})
    assert network.route_to("this-host") == ("eth9", "10.9.0.1", "10.9.0.1", True)


def test_an_unknown_host_is_waited_for_and_named(monkeypatch):
    calls = []

    def unknown(*_, **__):
        calls.append(1)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(network.socket, "getaddrinfo", unknown)
    monkeypatch.setattr(network.time, "sleep", lambda seconds: None)
    with pytest.raises(UserError, match="the host 'nowhere' is not known here"):
        network.route_to("nowhere", wait=0.01)
    assert len(calls) > 1


def test_a_silent_machine_is_given_up_and_a_refusing_one_is_not(monkeypatch):
    """The clock is made up: each attempt and each pause takes its seconds at once."""
    now, answers = [0.0], [ConnectionRefusedError(), ConnectionRefusedError(), *[TimeoutError()] * 9]

    def connect(address, timeout):
        now[0] += timeout
        raise answers.pop(0)

    monkeypatch.setattr(network.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(network.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    monkeypatch.setattr(network.socket, "create_connection", connect)
    network.watch("10.9.0.1", 1, patience=40)
    assert 40 <= now[0] - 15 <= 60  # the second refusal was heard after 15 s
    assert len(answers) == 5


def test_one_process_is_told_what_to_do(capsys):
    assert main(["doctor", "--network", "--json"]) == 0
    assert "one process has no network to test" in capsys.readouterr().out


@pytest.mark.slow
def test_a_missing_rank_ends_the_test_by_name():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    job = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "ssm_lm", "doctor", "--network", "--timeout", "2"],
        cwd=REPO,
        env=launcher_environment(**job),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 1
    assert time.monotonic() - start < 60
    assert f"rank 0 on {socket.gethostname()} failed after" in done.stderr
    assert f"of joining the 2 ranks at 127.0.0.1:{port}" in done.stderr
