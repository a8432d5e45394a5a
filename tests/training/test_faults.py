"""Faults of a step, of a rank, of the disk: what a run does about each. The real command, in processes."""

import errno
import json
import os
import random
import re
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import forked
import psutil
import pytest
from harness import REPO, losses, process_environment, train_command, zero

from ssm_lm.cli import main
from ssm_lm.data.stream import TokenStream
from ssm_lm.data.windows import TokenWindows, WindowSampler
from ssm_lm.errors import PREEMPTED, UserError
from ssm_lm.internals.transformers import OpenTrainer
from ssm_lm.training import stopping
from ssm_lm.training.checkpointing import CheckpointedTrainer
from ssm_lm.training.stopping import STOP_SIGNALS, StopSignals
from ssm_lm.training.trainer import RunSampler

pytestmark = pytest.mark.slow

WORKER = str(REPO / "tests" / "training" / "faulty_worker.py")


def faulty(config: str, *overrides: str) -> list[str]:
    """`ssm-lm train`, with faulty_worker.py in the place of the package."""
    return [WORKER, "train", config, *overrides]


# ---- steps


@pytest.fixture(scope="module")
def nan_at_five(corpus, tmp_path_factory):
    """The losses of a run without DeepSpeed whose sixth step is not a number."""
    import yaml
    from harness import base_config

    folder = tmp_path_factory.mktemp("nan")
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(base_config(corpus, folder / "run", max_steps=10)))
    done = forked.run(faulty(str(config)), FAULT_STEPS="5", FAULT_FACTOR="nan")
    assert "step 6: skipped, loss is nan" in done.stdout
    entries = json.loads((folder / "run" / "trainer_state.json").read_text())["log_history"]
    assert [entry.get("skipped_steps", 0) for entry in entries if "loss" in entry] == [0] * 5 + [1] * 5
    return losses(folder / "run")


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_loss_that_is_not_a_number_on_one_rank_is_skipped_by_all(write_config, tmp_path, nan_at_five, stage):
    config = write_config(max_steps=10, per_device_train_batch_size=2, deepspeed=zero(stage))
    done = forked.run(faulty(config), ranks=2, FAULT_STEPS="5", FAULT_FACTOR="nan", FAULT_RANK="1")
    assert "step 6: skipped, loss is nan" in done.stdout
    ours = losses(tmp_path / "run")
    assert ours[:5] == pytest.approx(nan_at_five[:5], rel=1e-5)
    assert ours[6:] == pytest.approx(nan_at_five[6:], rel=1e-5)  # the same weights, the same learning rates


def test_a_spike_is_skipped(write_config, tmp_path):
    config = write_config(max_steps=40)
    done = forked.run(faulty(config), FAULT_STEPS="30", FAULT_FACTOR="100")
    assert "step 31: skipped, loss" in done.stdout
    assert done.stdout.count(": skipped, ") == 1
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]


def check_flushed(said: str, checkpoint: Path, ranks: int) -> None:
    """Each file of a checkpoint reached the disk by the rank that wrote it, before the checkpoint had its name."""
    said = said[: said.index(f"renamed {checkpoint}\n")]
    files = [path.name for path in checkpoint.rglob("*") if path.is_file() and path.name != "complete.json"]
    for name in files:
        numbers = [int(number) for number in re.findall(r"(?:pp_rank|rng_state)_(\d+)", name)]
        assert f"rank {numbers[0] if numbers else 0} flushed {name}\n" in said
    assert "rank 0 flushed complete.json\n" in said
    assert sum("optim" in name for name in files) == ranks


@pytest.mark.parametrize(("ranks", "options"), [(1, []), (2, ["--deepspeed", zero(2)])])
def test_after_several_the_run_goes_back_and_passes_over_their_batches(write_config, corpus, tmp_path, ranks, options):
    settings = {"max_steps": 14, "save_strategy": "steps", "save_steps": 4, "max_skipped_steps": 3}
    settings |= {"per_device_train_batch_size": 4 // ranks}
    windows = TokenWindows(TokenStream.open(str(corpus), "train"), 40)
    starts = list(RunSampler(WindowSampler(windows, seed=1), 14 * 4))
    bad = [windows[starts[4 * batch]]["input_ids"][:8].tolist() for batch in (6, 7, 8)]
    bad = ";".join(" ".join(str(token) for token in first) for first in bad)

    config = write_config("spoilt", **settings)
    done = forked.run(faulty(config, *options), ranks, FAULT_WINDOWS=bad, FAULT_FACTOR="nan", SAY_FLUSHED=1)
    assert "3 steps in a row were skipped; back to" in done.stdout
    assert "checkpoint-4, passing over their batches" in done.stdout
    check_flushed(done.stdout, tmp_path / "spoilt" / "checkpoint-12", ranks)
    record = json.loads((tmp_path / "spoilt" / "run.json").read_text())
    assert record["passed_over"] == [6, 7, 8]

    # the run that never saw those batches
    del record["finished_step"]
    (tmp_path / "clean").mkdir()
    (tmp_path / "clean" / "run.json").write_text(json.dumps(record))
    forked.train(write_config("clean", **settings), *options, ranks=ranks)
    assert losses(tmp_path / "spoilt") == pytest.approx(losses(tmp_path / "clean"), rel=1e-5)


def test_what_does_not_recover_ends_in_one_line(write_config):
    config = write_config(max_steps=40, max_skipped_steps=2)
    done = forked.attempt(faulty(config), FAULT_STEPS=",".join(str(step) for step in range(3, 40)), FAULT_FACTOR="nan")
    assert done.returncode == 2
    assert "going back 3 times did not help" in done.stderr.splitlines()[-1]


def test_a_level_that_is_met_again_behind_other_batches_is_learnt(write_config, tmp_path):
    config = write_config(max_steps=40, save_strategy="steps", save_steps=25, max_skipped_steps=4)
    done = forked.run(faulty(config), FAULT_STEPS=",".join(str(step) for step in range(28, 40)), FAULT_FACTOR="100")
    assert done.stdout.count("4 steps in a row were skipped; back to") == 2
    assert done.stdout.count(": skipped, ") == 4 + 4 + 3
    assert losses(tmp_path / "run")[-1] > 100  # and they were trained on


# ---- signals


def stop(config: str, sent: signal.Signals, ranks: int = 1, **faults) -> str:
    """Start a run that waits where FAULT_FACTOR says "wait", send one rank the signal there; what it said."""
    with forked.Ranks(faulty(config), ranks, FAULT_FACTOR="wait", **faults) as stopped:
        stopped.wait_until(lambda: "waiting in" in stopped.said())
        os.kill(stopped.processes[-1].pid, sent)
        done = stopped.wait()
    assert done.returncode == PREEMPTED, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_signal_ends_in_a_checkpoint_and_an_exit_code_that_asks_for_more(write_config, tmp_path, straight):
    settings = {"max_steps": 12, "save_strategy": "steps", "save_steps": 1000}
    config = write_config("stopped", **settings)
    said = stop(config, signal.SIGINT, FAULT_STEPS="5")
    assert "Ctrl-C once more ends the run without it" in said
    assert "stopped   SIGINT at step 6" in said
    assert f"ssm-lm train {config}\n" in said  # the command that goes on
    assert [path.name for path in (tmp_path / "stopped").glob("checkpoint-*")] == ["checkpoint-6"]
    assert "resuming" in forked.train(config).stdout
    assert losses(tmp_path / "stopped") == pytest.approx(losses(straight(**settings)), rel=1e-6)


def test_a_signal_is_heard_while_batches_are_accumulated(write_config, tmp_path, straight):
    """The half step is as if it had not begun: its random numbers and its carried states are given back."""
    model = {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 8, "ssm": "s4", "chunk_size": 16, "dropout": 0.2}
    settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 1000, "model": model, "carry_state": True}
    settings |= {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1}
    config = write_config("stopped", **settings)
    assert "stopped   SIGTERM at step 5; " in stop(config, signal.SIGTERM, FAULT_STEPS="5")
    assert [path.name for path in (tmp_path / "stopped").glob("checkpoint-*")] == ["checkpoint-5"]
    assert "resuming" in forked.train(config).stdout
    assert losses(tmp_path / "stopped") == pytest.approx(losses(straight(**settings)), rel=1e-6)


def test_a_signal_is_heard_in_an_evaluation_which_is_made_up_for(write_config, tmp_path, straight):
    settings = {"max_steps": 8, "eval_strategy": "steps", "eval_steps": 4, "per_device_eval_batch_size": 1}
    settings |= {"save_strategy": "steps", "save_steps": 4, "load_best_model_at_end": True, "deepspeed": zero(2)}
    settings |= {"per_device_train_batch_size": 2}
    config = write_config("stopped", **settings)
    said = stop(config, signal.SIGUSR1, ranks=2, FAULT_EVALUATION="4", FAULT_RANK="1")
    assert "at step 4" in said
    assert "validation loss" not in said
    assert "resuming" in forked.train(config, ranks=2).stdout
    states = [json.loads((folder / "trainer_state.json").read_text())
              for folder in (tmp_path / "stopped", straight(ranks=2, **settings))]  # fmt: skip
    ours, theirs = (
        [(entry["step"], entry.get("loss"), entry.get("eval_loss")) for entry in state["log_history"]]
        for state in states
    )
    assert ours == theirs
    assert [state["best_global_step"] for state in states] == [8, 8]


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_each_signal_is_remembered_and_its_handler_given_back(sent):
    """Those of schedulers, and Ctrl-C; what a run does after one is the same for all."""
    assert sent in STOP_SIGNALS
    before = signal.getsignal(sent)
    with StopSignals() as signals:
        assert signals.received is None
        os.kill(os.getpid(), sent)
        assert signals.received == sent.name
    assert signal.getsignal(sent) is before


@pytest.mark.parametrize(("pause", "ends"), [(0, True), (60, False)])
def test_a_second_interrupt_ends_at_once_but_for_a_launchers_copy(monkeypatch, pause, ends):
    monkeypatch.setattr(stopping, "SAME_KEY", pause)
    child = os.fork()
    if child == 0:
        with StopSignals():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (-signal.SIGINT if ends else 0)


# ---- ranks


def test_ranks_that_disagree_say_so_and_start_nothing(write_config, tmp_path):
    config = write_config(learning_rate=0.01)
    done = forked.attempt(faulty(config), ranks=2, RANK_OPTIONS="--learning_rate 0.02")
    assert done.returncode != 0
    assert "rank 1 was started with learning_rate 0.02 and rank 0 with 0.01" in done.stderr
    assert not (tmp_path / "run").exists()


def test_ranks_with_different_data_say_so(write_config, corpus, tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for split in ("train", "valid", "test"):
        (text / f"{split}.txt").write_text("other words than those .\n" * 200)
    other = tmp_path / "other"
    assert main(["prepare", "--dataset", str(text), "--tokenizer", "words", "--output", str(other)]) == 0
    config = write_config()
    done = forked.attempt(faulty(config), ranks=2, RANK_OPTIONS=f"--data {other}")
    assert done.returncode != 0
    assert "rank 1 was started with data" in done.stderr


def test_a_rank_that_hangs_ends_in_a_named_timeout(write_config):
    config = write_config(max_steps=100, ddp_timeout=8, per_device_train_batch_size=2, deepspeed=zero(1))
    with forked.Ranks(faulty(config), 2, FAULT_STEPS="3", FAULT_FACTOR="wait", FAULT_RANK="1") as ranks:
        ranks.wait_until(lambda: "waiting in step 3" in ranks.said())
        os.kill(ranks.processes[1].pid, signal.SIGSTOP)
        ranks.processes[0].join(120)
        assert ranks.processes[0].exitcode
    assert "hung for more than ddp_timeout = 8 s" in ranks.said()


# ---- the disk


def tmpfs(place: Path, *options: str) -> None:
    place.mkdir(exist_ok=True)
    if os.geteuid() != 0:
        pytest.skip("mounting a file system takes root")
    done = subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", str(place)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting a file system is not allowed here: {done.stderr.strip()}")


def test_a_full_disk_is_one_line_and_the_last_checkpoint_is_whole(write_config, tmp_path, straight):
    settings = {"max_steps": 20, "save_strategy": "steps", "save_steps": 5, "save_total_limit": 9}
    expected = straight(**settings)
    sizes = [path.stat().st_size for path in (expected / "checkpoint-5").iterdir()]
    one = sum(-(-size // 4096) * 4096 for size in sizes)  # in pages
    disk = tmp_path / "disk"
    tmpfs(disk, "-o", f"size={int(2.5 * one) + 40 * 1024}")  # and what the run writes beside its checkpoints
    try:
        config = write_config("full", **settings)
        place = ["--output_dir", str(disk / "run")]
        done = forked.attempt(["-m", "ssm_lm", "train", config, *place])
        assert done.returncode == 2, done.stdout + done.stderr
        said = done.stderr.splitlines()[-1]
        assert "o space left" in said
        failed, *_, last = (int(number) for number in re.findall(r"checkpoint-(\d+)", said))
        assert f"checkpoint-{last} is whole, and the same command goes on from it" in said
        assert failed == last + 5
        there = {path.name for path in (disk / "run").glob("checkpoint-*")}
        assert there == {f"checkpoint-{step}" for step in range(5, failed, 5)}
        subprocess.run(["mount", "-o", f"remount,size={20 * one}", str(disk)], check=True)
        assert "resuming" in forked.train(config, *place).stdout
        assert losses(disk / "run") == pytest.approx(losses(expected), rel=1e-6)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_log_that_cannot_be_written_is_one_line(monkeypatch, tmp_path):
    def train(self, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(OpenTrainer, "train", train)
    trainer = object.__new__(CheckpointedTrainer)
    trainer.args = SimpleNamespace(output_dir=str(tmp_path))
    with pytest.raises(UserError, match=r"the log could not be written to .*No space left.*; there is no checkpoint"):
        trainer.train()


def test_a_folder_that_cannot_be_written_is_one_line(write_config, tmp_path, capsys):
    disk = tmp_path / "disk"
    tmpfs(disk, "-o", "ro")
    try:
        assert main(["train", write_config(), "--output_dir", str(disk / "run")]) == 2
        assert "cannot be written to" in capsys.readouterr().err.splitlines()[-1]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# ---- thirty kills


def wait_for_a_moment(rng: random.Random, folder: Path, kill: int, running, seconds_to_start: float) -> None:
    """Soon after a new checkpoint, where the next one is being written; every fifth time during the start."""

    def newest() -> int:
        return max([int(path.name[11:]) for path in folder.glob("checkpoint-*")], default=0)

    seen = newest()
    if kill % 5 == 0:  # and no later than a checkpoint: a fast machine would be done before the last kill
        deadline = time.monotonic() + rng.uniform(0, seconds_to_start)
        while time.monotonic() < deadline and newest() == seen:
            time.sleep(0.002)
        return
    while newest() == seen and running():
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.15))


def check_whole(folder: Path) -> None:
    for path in folder.glob("checkpoint-*"):
        assert (path / "complete.json").is_file() or not path.exists()


@pytest.fixture
def saved_at_every_step(write_config, tmp_path):
    """A function of the number of steps: the config of two ranks that save after each, and the losses of a run that
    nothing disturbs, and that saves nothing.
    """

    def make(steps: int) -> tuple[str, list[float]]:
        settings = {"max_steps": steps, "per_device_train_batch_size": 2, "deepspeed": zero(2)}
        forked.train(write_config("straight", **settings), ranks=2)
        saving = write_config("killed", **settings, save_strategy="steps", save_steps=1)
        return saving, losses(tmp_path / "straight")

    return make


@pytest.mark.long
@pytest.mark.seconds(120)
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("sent", "times"), [(signal.SIGKILL, 12), (signal.SIGTERM, 6)])
def test_killed_at_random_again_and_again(saved_at_every_step, tmp_path, sent, times):
    """A random rank at a random moment, checkpoints being written among them; each time the same command goes on.
    Thirty and ten times when it was written.
    """
    config, expected = saved_at_every_step(10 * times)
    rng, folder = random.Random(0), tmp_path / "killed"
    for kill in range(times):
        ranks = forked.Ranks(["-m", "ssm_lm", "train", config], 2)
        wait_for_a_moment(rng, folder, kill, lambda ranks=ranks: all(p.is_alive() for p in ranks.processes), 2)
        assert all(p.is_alive() for p in ranks.processes), ranks.said()
        os.kill(rng.choice(ranks.processes).pid, sent)
        assert ranks.wait().returncode, ranks.said()
        ranks.kill()  # as torchrun does to a rank that waits for the dead one: alive, it would hold the folder's lock
        check_whole(folder)
    done = forked.train(config, ranks=2, seconds=900)  # most of the steps, a checkpoint at each, beside other tests
    assert "resuming" in done.stdout
    assert losses(folder) == pytest.approx(expected, rel=1e-6)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_torchrun_starts_killed_ranks_again(saved_at_every_step, tmp_path):
    """Without a new command: its restarts go on from what is there."""
    config, expected = saved_at_every_step(24)
    command = train_command(config, ranks=2)
    command.insert(command.index("--standalone") + 1, "--max-restarts=9")
    # as launch/torchrun.sh has it: restarted ranks would meet in a store that still holds the dead ones' addresses
    environment = process_environment(TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1)
    process = subprocess.Popen(command, cwd=REPO, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    rng, folder, ended = random.Random(0), tmp_path / "killed", set()
    for kill, sent in enumerate([signal.SIGKILL, signal.SIGTERM], start=1):
        ranks = []
        while len(ranks) < 2:
            assert process.poll() is None
            time.sleep(0.1)
            children = set(psutil.Process(process.pid).children())
            ranks = sorted(children - ended, key=lambda child: child.pid)
        ended |= set(ranks)
        wait_for_a_moment(rng, folder, kill, lambda: process.poll() is None, 0)
        rng.choice(ranks).send_signal(sent)
    assert process.wait(timeout=400) == 0
    check_whole(folder)
    assert losses(folder) == pytest.approx(expected, rel=1e-6)


# ---- memory


def test_zero_3_shares_parameters_and_optimizer(write_config, tmp_path):
    """Bytes of parameters, master weights and optimizer states that a rank of two holds: ZeRO 3 against ZeRO 0."""
    held = {}
    model = {"hidden_size": 256, "num_hidden_layers": 2, "state_size": 16, "ssm": "s4d", "chunk_size": 16}
    for stage in (0, 3):
        config = write_config(
            f"stage{stage}", max_steps=2, per_device_train_batch_size=1, deepspeed=zero(stage), bf16=True, model=model
        )
        worker = str(REPO / "tests" / "training" / "memory_worker.py")
        held[stage] = json.loads(forked.run([worker, "train", config], ranks=2).stdout.splitlines()[-1])["bytes"]
    print(held)
    assert held[3] <= 0.6 * held[0]
