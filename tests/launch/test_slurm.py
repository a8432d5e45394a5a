"""launch/slurm.sbatch under a real slurmctld, slurmd and munge: two nodes that are network namespaces."""

import os
import pwd
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from hosts import LAUNCH, STAND_IN, launcher_environment, wait_for

pytestmark = [pytest.mark.multinode, pytest.mark.slow]

TOOLS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "setpriv")
PATH = f"{os.environ['PATH']}:/usr/sbin"


class Slurm:
    """A controller on the first host, a daemon on each."""

    def __init__(self, hosts, folder: Path):
        self.hosts, self.folder = hosts, folder
        self.environment = {"SLURM_CONF": folder / "slurm.conf", "PATH": PATH}
        self.daemons: list[subprocess.Popen] = []

    def start(self) -> None:
        nodes = "\n".join(f"NodeName={host.name} NodeAddr={host.address} CPUs=2 RealMemory=500" for host in self.hosts)
        munge = self.folder / "munge"
        munge.mkdir()
        for host in self.hosts:
            (self.folder / f"spool.{host.name}").mkdir()
        (self.folder / "slurm.conf").write_text(f"""\
ClusterName=test
SlurmctldHost={self.hosts.a.name}({self.hosts.a.address})
AuthType=auth/munge
AuthInfo=socket={munge}/socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={self.folder}/state
SlurmdSpoolDir={self.folder}/spool.%n
SlurmctldPidFile={self.folder}/slurmctld.pid
SlurmdPidFile={self.folder}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
SchedulerParameters=sched_interval=1,bf_interval=1
KillWait=10
{nodes}
PartitionName=all Nodes={",".join(host.name for host in self.hosts)} Default=YES State=UP MaxTime=INFINITE
""")
        key = munge / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        user = pwd.getpwnam("munge")
        for path in (munge, key):
            os.chown(path, user.pw_uid, user.pw_gid)
        for folder in [munge, *munge.parents]:  # munged runs as its own user, and must reach its folder
            if folder == Path("/tmp"):
                break
            folder.chmod(folder.stat().st_mode | 0o011)
        words = ["munged", "--foreground", "--force", "--socket", munge / "socket", "--key-file", key]
        words += ["--pid-file", munge / "pid", "--log-file", munge / "log", "--seed-file", munge / "seed"]
        self._daemon("munged", "setpriv", "--reuid=munge", "--regid=munge", "--clear-groups", *words)
        wait_for((munge / "socket").exists, 10, "munged listens", *self.daemons)
        self._daemon("slurmctld", *self.hosts.a.command("slurmctld", "-D", "-i"))
        for host in self.hosts:
            self._daemon(host.name, *host.command("slurmd", "-D", "-N", host.name))
        wait_for(lambda: self("sinfo", "-h", "-o", "%D %t").strip() == "2 idle", 40, "two idle nodes", *self.daemons)

    def _daemon(self, name: str, *words) -> None:
        with open(self.folder / f"{name}.log", "wb") as log:
            self.daemons.append(
                subprocess.Popen(
                    list(map(str, words)), env=launcher_environment(**self.environment), stdout=log, stderr=log
                )
            )

    def __call__(self, *words) -> str:
        """What a command of Slurm prints, run on the first host."""
        done = subprocess.run(
            self.hosts.a.command("timeout", "20", *words),
            cwd=STAND_IN,  # where jobs run too
            env=launcher_environment(**self.environment),
            capture_output=True,
            text=True,
        )
        return done.stdout + done.stderr

    def submit(self, log: Path, *words) -> str:
        said = self("sbatch", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0",
                    f"--output={log}", *words)  # fmt: skip
        number = re.search(r"Submitted batch job (\d+)", said)
        assert number, said
        return number[1]

    def state(self, job: str) -> str:
        found = re.search(r"JobState=(\w+)", self("scontrol", "show", "job", job))
        return found[1] if found else ""

    def stop(self) -> None:
        for host in self.hosts:
            host.kill()
        for process in self.daemons:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def slurm(two_hosts, tmp_path_factory):
    missing = [tool for tool in TOOLS if shutil.which(tool, path=PATH) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (slurm-wlm, munge)")
    slurm = Slurm(two_hosts, tmp_path_factory.mktemp("slurm"))
    try:
        slurm.start()
        yield slurm
    finally:
        slurm.stop()


def read(log: Path) -> str:
    return log.read_text() if log.exists() else ""


def test_a_job_is_signalled_requeued_and_finished(slurm, tmp_path):
    """USR1 to the ranks, as --signal=USR1@120 sends it: a checkpoint, 75, the queue, and on from there to the end."""
    config, log = tmp_path / "config.yaml", tmp_path / "out"
    config.touch()
    job = slurm.submit(log, LAUNCH / "slurm.sbatch", config, tmp_path, 60, 0.1)
    wait_for(lambda: "step 3 of 2" in read(log), 90, f"the third step ({read(log)[-2000:]})")
    slurm("scancel", "--signal=USR1", job)
    wait_for(lambda: slurm.state(job) == "PENDING", 60, "all nodes have let the job go, and it is in the queue")
    # Slurm would hold it back for two minutes. Not for no time: a node refuses what starts in the second in which it
    # ended the job before ("Job credential revoked"), and the job would end there
    slurm("scontrol", "update", f"JobId={job}", "StartTime=now+2seconds")
    wait_for(lambda: "start 1" in read(log), 120, "the job is started again")
    wait_for(lambda: slurm.state(job) == "COMPLETED", 120, "the job is finished")
    text = read(log)
    left = re.findall(r"left: rank (\d) at step (\d+)", text)
    assert sorted(rank for rank, _ in left) == ["0", "1"]
    # 143: the first rank to end has srun end the others, and one of them was about to exit by itself
    assert re.search(r"exit code (75|143): back into the queue", text), text
    assert f"begin: rank 0 of 2 on {slurm.hosts.a.name} at step {left[0][1]}" in text
    assert f"begin: rank 1 of 2 on {slurm.hosts.b.name} at step {left[0][1]}" in text
    assert f"meeting at   10.77.0.1:{20000 + int(job)}, Slurm job {job}, start 0" in text
    assert "10.77.0.2 on eth0, ranks from 1" in text
    assert f"done: {60 * 61 / 2:.6f}" in text


def test_a_wrong_config_is_not_requeued(slurm, tmp_path):
    log = tmp_path / "out"
    job = slurm.submit(log, LAUNCH / "slurm.sbatch", tmp_path / "none.yaml")
    start = time.monotonic()
    wait_for(lambda: slurm.state(job) == "FAILED", 60, "the job has failed")
    assert "there is no config" in read(log)
    assert time.monotonic() - start < 60
    assert "ExitCode=2:0" in slurm("scontrol", "show", "job", job)


def test_a_cancelled_job_writes_its_checkpoint_and_stays_ended(slurm, tmp_path):
    """scancel is a SIGTERM to the ranks, as a pre-emption is, and the user has said that the job is over."""
    config, log = tmp_path / "config.yaml", tmp_path / "out"
    config.touch()
    job = slurm.submit(log, LAUNCH / "slurm.sbatch", config, tmp_path, 600, 0.1)
    wait_for(lambda: "step 3 of" in read(log), 90, f"the third step ({read(log)[-2000:]})")
    slurm("scancel", job)
    wait_for(lambda: slurm.state(job) == "CANCELLED", 60, f"the job has ended: {slurm.state(job)}")
    text = read(log)
    assert sorted(re.findall(r"left: rank (\d) at step", text)) == ["0", "1"], text
    assert "cancelled, and not put back" in text, text
    assert "start 1" not in text
    assert "Restarts=0" in slurm("scontrol", "show", "job", job)
