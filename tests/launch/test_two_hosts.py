"""Two hosts for real, each a network namespace: the launchers, a lost node, a pulled cable."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from hosts import LAUNCH, REPO, STAND_IN, end, wait_for

pytestmark = [pytest.mark.multinode, pytest.mark.slow, pytest.mark.seconds(20)]

STEPS = 6


@pytest.fixture
def write_config(tmp_path, corpus):
    from harness import base_config

    def write(name: str, **overrides) -> Path:
        path = tmp_path / f"{name}.yaml"
        settings = {"max_steps": STEPS, "deepspeed": str(REPO / "configs" / "deepspeed" / "zero2.json")}
        settings |= {"per_device_train_batch_size": 2} | overrides
        path.write_text(yaml.safe_dump(base_config(corpus, tmp_path / name, **settings)))
        return path

    return write


@pytest.fixture
def no_config(tmp_path) -> Path:
    """For the ssm_lm of stand_in/, which reads none."""
    path = tmp_path / "empty.yaml"
    path.touch()
    return path


@pytest.fixture(scope="module")
def one_host_losses(corpus, tmp_path_factory):
    """Of two ranks on this machine, without a second host and without a launcher."""
    import forked
    from harness import base_config, losses

    folder = tmp_path_factory.mktemp("one_host")
    config = folder / "config.yaml"
    settings = {"max_steps": STEPS, "per_device_train_batch_size": 2}
    settings["deepspeed"] = str(REPO / "configs" / "deepspeed" / "zero2.json")
    config.write_text(yaml.safe_dump(base_config(corpus, folder / "run", **settings)))
    forked.train(str(config), ranks=2)
    found = losses(folder / "run")
    assert len(found) == STEPS
    return found


def torchrun(host, hosts, log, *words, port=29400, **options):
    command = ["bash", LAUNCH / "torchrun.sh", "--head", f"{hosts.a.address}:{port}", *words]
    return host.start(log, *command, **options)


def test_torchrun(two_hosts, tmp_path, write_config, one_host_losses):
    from harness import losses

    config, logs = write_config("run"), [tmp_path / "a", tmp_path / "b"]
    processes = [
        torchrun(host, two_hosts, log, "--nodes", 2, config) for host, log in zip(two_hosts, logs, strict=True)
    ]
    assert end(processes, 200, logs) == [0, 0], [log.read_text()[-2000:] for log in logs]
    assert losses(tmp_path / "run") == pytest.approx(one_host_losses, rel=1e-6)
    head, other = (log.read_text() for log in logs)
    assert re.search(r"^nodes +2 x 1 ranks = 2 ranks$", head, re.MULTILINE)
    assert re.search(r"^this node +10\.77\.0\.1 on eth0, the head$", head, re.MULTILINE)
    assert re.search(r"^this node +10\.77\.0\.2 on eth0$", other, re.MULTILINE)
    assert "4 windows of 40 = 160 tokens (2 ranks x 2 x 1 accumulated)" in head


def test_deepspeed_without_ssh(two_hosts, tmp_path, no_config):
    """Its command on each host; what `ssm-lm train` makes of such ranks is seen over sshd, below."""
    logs, hostfile = [tmp_path / "a", tmp_path / "b"], tmp_path / "hostfile"
    hostfile.write_text("".join(f"{host.address} slots=1\n" for host in two_hosts))
    command = ["bash", LAUNCH / "deepspeed.sh", "--hostfile", hostfile, "--no-ssh", "--node-rank"]
    processes = [
        host.start(log, *command, number, no_config, tmp_path, STEPS, 0, cwd=STAND_IN)
        for number, (host, log) in enumerate(zip(two_hosts, logs, strict=True))
    ]
    assert end(processes, 200, logs) == [0, 0], [log.read_text()[-2000:] for log in logs]
    for number, (host, log) in enumerate(zip(two_hosts, logs, strict=True)):
        assert f"begin: rank {number} of 2 on {host.name} at step 0" in log.read_text()
    assert f"done: {STEPS * (STEPS + 1) / 2:.6f}" in logs[0].read_text()  # both have added their share


@pytest.fixture
def with_sshd(two_hosts, tmp_path):
    """sshd in both hosts; the folder of an `ssh` that knows their key and nothing else."""
    sshd = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin")
    missing = [name for name in ("pdsh", "ssh", "ssh-keygen") if shutil.which(name) is None]
    if sshd is None or missing:
        pytest.skip(f"not installed: {', '.join([*missing, *([] if sshd else ['sshd'])])}")
    for name in ("user", "host"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / f"{name}.key"], check=True)
    server, client, folder = tmp_path / "sshd_config", tmp_path / "ssh_config", tmp_path / "bin"
    server.write_text(
        f"HostKey {tmp_path}/host.key\nAuthorizedKeysFile {tmp_path}/user.key.pub\nStrictModes no\nUsePAM no\n"
        "PidFile none\nPermitRootLogin prohibit-password\nPasswordAuthentication no\n"
    )
    client.write_text(
        f"IdentityFile {tmp_path}/user.key\nStrictHostKeyChecking no\nUserKnownHostsFile /dev/null\nLogLevel ERROR\n"
    )
    folder.mkdir()
    (folder / "ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {client} "$@"\n')
    (folder / "ssh").chmod(0o755)
    Path("/run/sshd").mkdir(exist_ok=True)  # sshd will not start without it
    servers = [host.start(tmp_path / f"sshd{host.address}", sshd, "-D", "-e", "-f", server) for host in two_hosts]
    try:
        for host in two_hosts:
            answers = lambda host=host: subprocess.run(  # noqa: E731
                two_hosts.a.command(folder / "ssh", host.address, "true"), capture_output=True
            )
            wait_for(lambda: answers().returncode == 0, 20, f"sshd of {host.address}", *servers)  # noqa: B023
        yield folder
    finally:
        for process in servers:
            process.kill()
            process.wait()


def test_deepspeed_by_pdsh_over_sshd(two_hosts, with_sshd, tmp_path, write_config, no_config, one_host_losses):
    """Started on one host alone; then stopped as a scheduler would: by a signal to the launcher."""
    from harness import losses

    config, log, hostfile = write_config("run"), tmp_path / "log", tmp_path / "hostfile"
    hostfile.write_text("".join(f"{host.address} slots=1\n" for host in two_hosts))
    path = f"{with_sshd}:{os.environ['PATH']}"
    command = ["bash", LAUNCH / "deepspeed.sh", "--hostfile", hostfile]
    process = two_hosts.a.start(log, *command, config, PATH=path)
    assert end([process], 200, [log]) == [0], log.read_text()[-3000:]
    assert losses(tmp_path / "run") == pytest.approx(one_host_losses, rel=1e-6)

    log = tmp_path / "log2"
    process = two_hosts.a.start(log, *command, no_config, tmp_path, 500, 0.1, cwd=STAND_IN, PATH=path)
    wait_for(lambda: "step 3 of 2" in log.read_text(), 100, "the third step", process)
    process.terminate()
    assert end([process], 60, [log]) == [75], log.read_text()[-3000:]
    assert log.read_text().count("left: rank") == 2


def test_doctor_measures_the_cable(two_hosts, tmp_path):
    logs = [tmp_path / "a", tmp_path / "b"]
    words = ("--nodes", 2, "--network", "--json")
    processes = [torchrun(host, two_hosts, log, *words) for host, log in zip(two_hosts, logs, strict=True)]
    assert end(processes, 150, logs) == [0, 0], [log.read_text()[-2000:] for log in logs]
    text = next(log.read_text() for log in logs if "all_reduce" in log.read_text())
    report = json.loads(text[text.index("\n{") : text.rindex("}") + 1])
    assert report["backend"] == "gloo"
    assert {(rank["host"], rank["address"], rank["interface"]) for rank in report["ranks"]} == {
        (host.name, host.address, "eth0") for host in two_hosts
    }
    assert [row["bytes"] for row in report["all_reduce"]] == [1024 * 4**n for n in range(8)]
    for row in report["all_reduce"]:
        assert row["bus_bandwidth"] == pytest.approx(row["bytes"] / row["seconds"])  # 2 (n - 1) / n = 1 of two ranks
        assert 1e-6 < row["seconds"] < 10
    assert [(link["from"], link["to"]) for link in report["links"]] == [(1, 0), (0, 1)]


def test_a_node_is_lost_and_comes_back(two_hosts, tmp_path, no_config):
    """Elastic: both, then one alone, then both again; every step counts once, and none is lost."""
    logs = [tmp_path / "a", tmp_path / "b"]
    words = ("--nodes", "1:2", "--last-call", 3, no_config, tmp_path, 100000, 0.1)

    def start(host, log):
        return torchrun(host, two_hosts, log, *words, cwd=STAND_IN)

    processes = [start(host, log) for host, log in zip(two_hosts, logs, strict=True)]
    said = lambda: logs[0].read_text() + logs[1].read_text()  # noqa: E731
    wait_for(lambda: "step 5 of 2 ranks" in said(), 100, "both train", *processes)
    two_hosts.b.kill()
    processes[1].wait()
    wait_for(lambda: re.search(r"step \d+ of 1 ranks", said()), 60, "one goes on alone", processes[0])
    alone = len(re.findall(r"of 2 ranks", said()))
    processes[1] = start(two_hosts.b, logs[1])
    wait_for(lambda: len(re.findall(r"of 2 ranks", said())) > alone, 60, "both train again", *processes)
    # and a node that is asked to leave: it says 75, and the other goes on
    before = len(re.findall(r"of 1 ranks", said()))
    processes[1].terminate()
    assert end([processes[1]], 60, logs) == [75]
    wait_for(lambda: len(re.findall(r"of 1 ranks", said())) > before, 60, "one goes on alone again", processes[0])
    processes[0].terminate()
    assert end([processes[0]], 60, logs) == [75]
    step, total = map(float, (tmp_path / "checkpoint").read_text().split())
    assert total == pytest.approx(step * (step + 1) / 2)


@pytest.mark.long
def test_training_goes_on_with_half_the_nodes(two_hosts, tmp_path, write_config, one_host_losses):
    """The real thing: ZeRO 2 on two nodes; one is lost, the other converts the checkpoint and goes on to the end."""
    from harness import losses

    settings = {"save_strategy": "steps", "save_steps": 2, "train_batch_size_total": 4, "disable_tqdm": False}
    config, logs = write_config("run", **settings), [tmp_path / "a", tmp_path / "b"]
    words = ("--nodes", "1:2", "--last-call", 3, config)
    processes = [torchrun(host, two_hosts, log, *words) for host, log in zip(two_hosts, logs, strict=True)]
    mark = tmp_path / "run" / "checkpoint-2" / "complete.json"
    wait_for(mark.exists, 200, "the first checkpoint", *processes)
    two_hosts.b.kill()
    processes[1].wait()
    assert end([processes[0]], 300, logs) == [0], logs[0].read_text()[-3000:]
    assert "(1 ranks x 2 x 2 accumulated)" in logs[0].read_text()
    assert losses(tmp_path / "run") == pytest.approx(one_host_losses, rel=1e-5)


def test_a_cable_is_pulled_in_mid_step(two_hosts, tmp_path, write_config):
    """No packet comes or goes and no connection is closed: only a timeout ends it, and it is named."""
    seconds = 15
    config = write_config("run", max_steps=100000, ddp_timeout=seconds, disable_tqdm=False)
    logs = [tmp_path / "a", tmp_path / "b"]
    words = ("--nodes", 2, "--max-restarts", 0, "--head-timeout", 2 * seconds, config)
    processes = [torchrun(host, two_hosts, log, *words) for host, log in zip(two_hosts, logs, strict=True)]
    try:
        wait_for(lambda: "step 3/" in logs[0].read_text() + logs[1].read_text(), 150, "three steps", *processes)
        two_hosts.cable(plugged=False)
        start = time.monotonic()
        codes = end(processes, 4 * seconds, logs)
        took = time.monotonic() - start
        print(f"ended {took:.0f} s after the cable was pulled, with a timeout of {seconds} s: {codes}")
    finally:
        for host in two_hosts:
            host.kill()
        with contextlib.suppress(subprocess.CalledProcessError):
            two_hosts.cable(plugged=True)
    assert codes == [1, 75]  # the head has failed; the other has given the head up
    assert f"the head {two_hosts.a.address} has not answered for {2 * seconds} s" in logs[1].read_text()
    for rank, log in enumerate(logs):
        named = rf"ssm-lm: rank {rank}: another rank is gone, or hung for more than ddp_timeout = {seconds} s"
        assert re.search(named, log.read_text()), log.read_text()[-3000:]
