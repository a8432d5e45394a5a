"""One sequence over several ranks: the loss, every gradient, what is sent and what is held, against one rank."""

import json
import re
import sys

import forked
import pytest
import yaml
from harness import REPO, losses, run, zero

from ssm_lm.config.reading import read_train_config
from ssm_lm.errors import UserError
from ssm_lm.training.checks import check_values

pytestmark = pytest.mark.slow

WORKER = str(REPO / "tests" / "training" / "sequence_parallel_worker.py")
PRECISION = {"float32": 1e-5, "float64": 1e-10}


def work(ranks: int, *words: str) -> dict:
    """What rank 0 of the worker prints in its last line."""
    return json.loads(forked.run([WORKER, *words], ranks).stdout.splitlines()[-1])


@pytest.mark.parametrize("ranks", [2, 4])
def test_loss_and_every_gradient_equal_those_of_one_rank(ranks):
    """S4, S4D, S5, SSD and blocks with a convolution, both precisions, with and without activation checkpointing."""
    results = work(ranks, "agreement")
    assert len(results) == 11
    for case, errors in results.items():
        limit = PRECISION[case.split()[1]]
        assert errors["loss"] < limit, (case, errors)
        assert errors["gradient"] < limit, (case, errors)
        assert errors["gradients"] > 10


def test_what_is_sent_does_not_depend_on_the_length():
    sent = work(2, "volume")
    layers, ranks, batch, states, width = 2, 2, 2, 16 * 8, 4
    gathered = layers * ranks * batch * states * width
    assert sent == {"256": {"forward": gathered, "backward": gathered}, "4096": sent["256"]}


def test_training_on_two_ranks_a_sequence_gives_the_losses_of_one(write_config, tmp_path, straight):
    settings = {"max_steps": 8, "gradient_accumulation_steps": 2}
    shared = write_config("shared", **settings, sequence_parallel_size=2, deepspeed=zero(2))
    assert "2 ranks a sequence" in forked.train(shared, ranks=2).stdout
    assert losses(tmp_path / "shared") == pytest.approx(losses(straight(**settings)), rel=1e-5)


def test_it_composes_with_data_parallelism(write_config, tmp_path, straight):
    """Four ranks, two sequences at a time under ZeRO 3, against two ranks of data parallelism."""
    settings = {"max_steps": 6, "per_device_train_batch_size": 2}
    shared = {"sequence_parallel_size": 2, "activation_checkpointing": True, "deepspeed": zero(3)}
    forked.train(write_config("both", **settings, **shared), ranks=4)
    assert losses(tmp_path / "both") == pytest.approx(losses(straight(ranks=2, **settings)), rel=1e-5)


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
    def peak(ranks: int) -> float:
        """In processes of their own from the start, for the size of one that was forked is not its own."""
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        said = run([sys.executable, *launcher, WORKER, "memory", "262144"]).stdout
        return json.loads(said.splitlines()[-1])["peak_mib"]

    alone, shared = peak(1), peak(2)
    print(f"peak of one rank {alone:.0f} MiB, of each of two {shared:.0f} MiB")
    assert shared <= 0.6 * alone
