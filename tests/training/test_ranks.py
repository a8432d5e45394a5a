"""Several processes: ZeRO stages, launchers, a kill and what comes after it."""

import json
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import torch
from harness import REPO, losses, process_environment, run, train_command, zero
from safetensors.torch import load_file

from ssm_lm import cli

pytestmark = pytest.mark.slow

STEPS = 20
WORKER = str(REPO / "tests" / "training" / "faulty_worker.py")


@pytest.fixture
def two_ranks_plain(straight):
    """The losses of two ranks without DeepSpeed, and the folder of the run."""
    folder = straight(ranks=2, max_steps=STEPS, per_device_train_batch_size=2)
    return losses(folder), folder


def test_torchrun(write_config, tmp_path, two_ranks_plain):
    """The command of the README. What its ranks do is what the forks of the other tests do."""
    run(train_command(write_config(max_steps=STEPS, per_device_train_batch_size=2), ranks=2))
    assert losses(tmp_path / "run") == two_ranks_plain[0]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_zero_stage_gives_the_same_losses(write_config, tmp_path, two_ranks_plain, stage):
    expected, plain = two_ranks_plain
    config = write_config(max_steps=STEPS, per_device_train_batch_size=2, deepspeed=zero(stage))
    forked.train(config, ranks=2)
    ours = losses(tmp_path / "run")
    assert len(ours) == STEPS
    assert ours == pytest.approx(expected, rel=1e-5)
    weights, reference = (load_file(f / "model.safetensors") for f in (tmp_path / "run", plain))
    assert set(weights) >= set(reference)
    for key in reference:
        torch.testing.assert_close(weights[key], reference[key], rtol=1e-3, atol=1e-4)


def test_one_rank_with_the_same_global_batch(write_config, tmp_path, two_ranks_plain):
    """The order of the data does not depend on the number of ranks. Also: DeepSpeed without a launcher."""
    config = write_config(max_steps=STEPS, per_device_train_batch_size=4, deepspeed=zero(2))
    run(train_command(config))
    assert losses(tmp_path / "run") == pytest.approx(two_ranks_plain[0], rel=1e-5)


@pytest.mark.parametrize("stage", [1, 3])
def test_an_adaptive_model_of_other_blocks_under_zero(write_config, tmp_path, straight, stage):
    """Shared clusters and a loss in the head, where ZeRO 3 has gathered its parameters; and a convolution,
    whose parameters no module of torch uses.
    """
    keys = {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 8, "adaptive_cutoffs": [8, 20]}
    keys |= {"ssm": "s4d", "arch": ["h3", "gated", "swiglu"]}
    settings = {"model": keys, "max_steps": 8}
    one = straight(**settings, per_device_train_batch_size=4)
    forked.train(write_config("two", **settings, per_device_train_batch_size=2, deepspeed=zero(stage)), ranks=2)
    assert losses(tmp_path / "two") == pytest.approx(losses(one), rel=1e-5)
    weights, reference = (load_file(folder / "model.safetensors") for folder in (tmp_path / "two", one))
    for key in reference:
        torch.testing.assert_close(weights[key], reference[key], rtol=1e-3, atol=1e-4)


def test_the_deepspeed_launcher(write_config, tmp_path, two_ranks_plain):
    config = write_config(max_steps=STEPS, per_device_train_batch_size=2, deepspeed=zero(1))
    launcher = Path(sys.executable).parent / "deepspeed"
    run([str(launcher), "--num_accelerators", "2", "--module", "ssm_lm", "train", config], DS_ACCELERATOR="cpu")
    assert losses(tmp_path / "run") == pytest.approx(two_ranks_plain[0], rel=1e-5)


@pytest.mark.parametrize("carry_state", [False, True], ids=["", "carried"])
def test_killed_and_resumed(write_config, tmp_path, straight, carry_state):
    """SIGKILL of every process after step 12; the resumed run writes the losses of one that was left alone."""
    settings = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "deepspeed": zero(2),
        "save_strategy": "steps",
        "save_steps": 5,
        "carry_state": carry_state,
        # dropout, so that the losses also depend on the random state of each rank
        "model": {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 8, "chunk_size": 16, "dropout": 0.1},
    }
    config, killed = write_config("killed", **settings), tmp_path / "killed"
    with forked.Ranks([WORKER, "train", config], 2, FAULT_STEPS="12", FAULT_FACTOR="wait") as ranks:
        ranks.wait_until(lambda: ranks.said().count("waiting in step 12") == 2)
        ranks.kill()
    assert (killed / "checkpoint-10" / "complete.json").exists()
    assert not (killed / "model.safetensors").exists()

    assert "resuming" in forked.train(config, ranks=2).stdout
    expected = straight(ranks=2, **settings)
    assert losses(killed) == pytest.approx(losses(expected), rel=1e-6)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (killed, expected))
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key])


@pytest.mark.parametrize(
    ("precision", "stage", "reduced"), [("bf16", 2, "float32"), ("bf16", 3, "bfloat16"), ("fp16", 0, "float32")]
)
def test_16_bits_keep_the_state_space_in_float32(write_config, tmp_path, two_ranks_plain, precision, stage, reduced):
    """Parameters always; what the ranks sum unless `reduce_dtype` says bfloat16, and then in linear layers alone."""
    settings = {"max_steps": STEPS, "per_device_train_batch_size": 4, "deepspeed": zero(stage)}
    settings |= {precision: True} | ({"reduce_dtype": reduced} if reduced == "bfloat16" else {})
    done = forked.run([str(REPO / "tests/training/reduction_worker.py"), "train", write_config(**settings)])
    assert set(json.loads(done.stdout.splitlines()[-1])) == {"torch.float32", f"torch.{reduced}"}
    assert f"{'bfloat16' if precision == 'bf16' else 'float16'} (autocast)" in done.stdout
    assert "skipped" not in done.stdout
    weights = load_file(tmp_path / "run" / "model.safetensors")
    state_space = {key: value for key, value in weights.items() if ".ssm." in key}
    assert state_space
    for key, value in state_space.items():
        assert value.dtype == torch.float32
        # not a float32 copy of rounded values either
        assert not torch.equal(value, value.bfloat16().float()), key
    ours = losses(tmp_path / "run")
    assert ours == pytest.approx(two_ranks_plain[0], rel=2e-2)
    assert ours != pytest.approx(two_ranks_plain[0], rel=1e-6)


def test_a_bad_config_ends_every_rank_with_code_2(write_config):
    done = subprocess.run(
        train_command(write_config(learning_rte=1), ranks=2),
        cwd=REPO,
        env=process_environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    assert done.stderr.count("did you mean 'learning_rate'") == 1
    assert "exitcode  : 2" in done.stderr


@pytest.mark.parametrize("rank", [0, 1])
def test_a_mistake_of_any_rank_is_said(write_config, monkeypatch, capsys, rank):
    """The first rank at once; another one after a wait in which the first has not ended the job with its own line."""
    waited = []
    monkeypatch.setattr(cli.time, "sleep", waited.append)
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    assert cli.main(["train", write_config(learning_rte=1)]) == 2
    assert capsys.readouterr().err.count("did you mean 'learning_rate'") == 1
    assert waited == [cli.PATIENCE] * rank
