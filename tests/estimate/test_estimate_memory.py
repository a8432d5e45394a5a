"""Estimated memory against the allocator's own record of a real training step: within 15%."""

import json

import peak_of_training
import pytest
import torch
from peak_of_training import measure

from ssm_lm import S4Config, S4ForCausalLM
from ssm_lm.estimate.memory import count_pieces, parameter_counts, rank_memory
from ssm_lm.estimate.trace import StorageCounter

TOLERANCE = 0.15
SMALL = {"vocab_size": 500, "hidden_size": 96, "num_hidden_layers": 2, "state_size": 16, "chunk_size": 32}
LARGE_VOCABULARY = {"vocab_size": 4000, "hidden_size": 64}


def estimated(keys, batch_size, length, bf16=False, **options):
    autocast = torch.bfloat16 if bf16 else None
    pieces = count_pieces(S4Config(**keys), batch_size, length, autocast=autocast)
    return rank_memory(pieces, **options).total


@pytest.mark.parametrize(
    ("keys", "checkpointing", "bf16"),
    [
        ({"ssm": "s4"}, False, False),
        ({"ssm": "s4"}, True, True),
        ({"ssm": "s4", "mode": "fft"}, False, False),
        ({"ssm": "s4", **LARGE_VOCABULARY}, False, True),
        ({"ssm": "s4d"}, False, False),
        ({"ssm": "s4d", "arch": "s4-ffn", "num_hidden_layers": 3}, True, False),
        ({"ssm": "s5", **LARGE_VOCABULARY}, False, False),
        ({"ssm": "s5", "arch": "s4-ffn", "num_hidden_layers": 3}, True, True),
        ({"ssm": "s4d", "arch": "h3"}, True, True),
        ({"ssm": "s4d", "arch": ["gated", "swiglu"]}, False, False),
        ({"ssm": "s4", "hidden_size": 128, "vocab_size": 2000, "adaptive_cutoffs": [500, 1000]}, False, False),
    ],
    ids=str,
)
def test_one_process(keys, checkpointing, bf16):
    keys = SMALL | keys
    found = measure(keys, 4, 200, checkpointing, bf16)
    assert estimated(keys, 4, 200, bf16, checkpointing=checkpointing) == pytest.approx(found, rel=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "ranks"), [(0, 1), (2, 1), (2, 2), (3, 2)])
def test_zero_stages(tmp_path, stage, ranks):
    """A wide model and short windows, so that parameters and the optimizer are what the memory is."""
    import forked

    keys = SMALL | {"ssm": "s4d", "hidden_size": 256}
    arguments = {"keys": keys, "batch_size": 1, "length": 32, "stage": stage, "bucket": 200_000}
    expected = estimated(keys, 1, 32, stage=stage, ranks=ranks, reduce_bucket=200_000)
    forked.run([peak_of_training.__file__, json.dumps(arguments), str(tmp_path / "peak.json")], ranks)
    peak = json.loads((tmp_path / "peak.json").read_text())
    # of stage 3 a thread of DeepSpeed lets go of what it has gathered sooner or later: 37 to 44 MB were seen as the
    # peak of one training, and the estimate is of the highest
    least = 0.8 if stage == 3 else 1 - TOLERANCE
    assert least * expected <= peak <= (1 + TOLERANCE) * expected


def test_counting_allocates_nothing():
    """A layer whose operators alone are gigabytes, counted on any machine."""
    config = S4Config(vocab_size=1000, hidden_size=4096, num_hidden_layers=2, state_size=64, use_cache=False)
    pieces = count_pieces(config, 64, 256)
    assert pieces.block[0].backward_peak > 2e9
    assert pieces.embedding.kept == 64 * 256 * 4096 * 4


def test_parameters_are_exact():
    config = S4Config(**SMALL)
    assert parameter_counts(config)[0] == sum(p.numel() for p in S4ForCausalLM(config).parameters())


def test_storages_are_counted_once_and_until_they_are_gone():
    weight = torch.zeros(64, 64)
    with StorageCounter() as counter:
        counter.add(weight)
        before = counter.live
        x = torch.zeros(16, 64)
        view = x.t()
        assert counter.live - before == 16 * 64 * 4
        y = x @ weight.t()
        assert counter.live - before == 2 * 16 * 64 * 4
        del x, view
        assert counter.live - before == 16 * 64 * 4
        del y
    assert counter.live == before
    assert counter.peak == before + 2 * 16 * 64 * 4


def test_stages_and_policies():
    pieces = count_pieces(S4Config(**SMALL), 4, 200)
    totals = {
        (stage, on): rank_memory(pieces, stage=stage, ranks=8, checkpointing=on, reduce_bucket=10_000)
        for stage in (0, 1, 2, 3)
        for on in (False, True)
    }
    P = 4 * pieces.parameters
    assert totals[0, False].parameters == P
    assert totals[0, False].optimizer == 2 * P
    assert totals[1, False].optimizer == 3 * P // 8
    assert totals[3, False].parameters == P // 8
    for stage in (0, 1, 2, 3):
        assert totals[stage, True].activations < totals[stage, False].activations
    # ZeRO 3 on two ranks holds at most 0.6 of ZeRO 0's parameters and optimizer states, at more than two ranks less
    assert totals[3, False].parameters + totals[3, False].optimizer <= 0.2 * 3 * P
    accumulating = rank_memory(pieces, stage=0, accumulates=True)
    assert accumulating.gradients == P
