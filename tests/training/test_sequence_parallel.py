"""One sequence over several ranks: the loss, every gradient, what is sent and what is held, against one rank."""

import json
import re
import sys

import pytest
import yaml
from harness import REPO, losses, run, train_command

from ssm_lm.config.reading import read_train_config
from ssm_lm.errors import UserError
from ssm_lm.training.train import check_values

pytestmark = pytest.mark.slow

WORKER = "sequence_parallel_worker.py"
PRECISION = {"float32": 1e-5, "float64": 1e-10}


def launch(ranks: int, *words: str) -> dict:
    """What rank 0 of the worker prints in its last line."""
    worker = REPO / "tests" / "training" / WORKER
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    return json.loads(run([*command, str(worker), *words]).stdout.splitlines()[-1])


@pytest.mark.parametrize("ranks", [2, 4])
def test_loss_and_every_gradient_equal_those_of_one_rank(ranks):
    """S4, S4D and S5, float32 and float64, with and without activation checkpointing."""
    results = launch(ranks, "agreement")
    assert len(results) == 7
    for case, errors in results.items():
        limit = PRECISION[case.split()[1]]
        assert errors["loss"] < limit, (case, errors)
        assert errors["gradient"] < limit, (case, errors)
        assert errors["gradients"] > 10


def test_what_is_sent_does_not_depend_on_the_length():
    sent = launch(2, "volume")
    layers, ranks, batch, states, width = 2, 2, 2, 16 * 8, 4
    gathered = layers * ranks * batch * states * width
    assert sent == {"256": {"forward": gathered, "backward": gathered}, "4096": sent["256"]}


def test_training_on_two_ranks_a_sequence_gives_the_losses_of_one(write_config, tmp_path):
    settings = {"max_steps": 8, "gradient_accumulation_steps": 2}
    run(train_command(write_config("alone", **settings)))
    zero2 = str(REPO / "configs/deepspeed/zero2.json")
    shared = write_config("shared", **settings, sequence_parallel_size=2, deepspeed=zero2)
    assert "2 ranks a sequence" in run(train_command(shared, ranks=2)).stdout
    assert losses(tmp_path / "shared") == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)


def test_it_composes_with_data_parallelism(write_config, tmp_path):
    """Four ranks, two sequences at a time under ZeRO 3, against two ranks of data parallelism."""
    settings = {"max_steps": 6, "per_device_train_batch_size": 2}
    plain = write_config("plain", **settings)
    run(train_command(plain, ranks=2))
    both = write_config(
        "both",
        **settings,
        sequence_parallel_size=2,
        activation_checkpointing=True,
        deepspeed=str(REPO / "configs/deepspeed/zero3.json"),
    )
    run(train_command(both, ranks=4))
    assert losses(tmp_path / "both") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("sequence_parallel_size", "3", "must divide the number of ranks"),
        ("sequence_length", "41", "must divide sequence_length (41)"),
        ("carry_state", "true", "sequence_parallel_size and carry_state exclude each other"),
        ("sequence_parallel_size", "0", "must be at least 1"),
    ],
)
def test_what_does_not_go_together_is_one_line(write_config, monkeypatch, key, value, expected):
    monkeypatch.setenv("WORLD_SIZE", "2")
    values = read_train_config(write_config(sequence_parallel_size=2), {})
    with pytest.raises(UserError, match=re.escape(expected)):
        check_values(values | {key: yaml.safe_load(value)}, "config")


@pytest.mark.long
def test_memory_of_a_rank_at_a_quarter_of_a_million_tokens():
    alone, shared = (launch(ranks, "memory", "262144")["peak_mib"] for ranks in (1, 2))
    print(f"peak of one rank {alone:.0f} MiB, of each of two {shared:.0f} MiB")
    assert shared <= 0.6 * alone
