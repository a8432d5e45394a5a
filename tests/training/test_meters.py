"""What a run measures of itself, and the file that it goes to."""

import json
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest
import torch

from ssm_lm import S4Config
from ssm_lm.cli import main
from ssm_lm.costs.flops import total, training_flops
from ssm_lm.training.meters import COLLECTIVES, METRICS_FILE, Meters, covered, peak_flops, trim


def entries(folder) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / METRICS_FILE).read_text().splitlines()]


def test_a_resumed_run_logs_every_step_once(write_config, tmp_path):
    config = write_config(max_steps=6, save_strategy="steps", save_steps=4, peak_tflops=0.001)
    assert main(["train", config]) == 0
    first = [entry for entry in entries(tmp_path / "run") if "loss" in entry]
    assert [entry["step"] for entry in first] == [1, 2, 3, 4, 5, 6]
    for entry in first:
        assert entry["tokens_per_second"] > 0
        assert entry["memory_peak_gb"] > 0.05
        assert 0 <= entry["data_wait_share"] < 1
        # FLOPs a token are the formula's, and the peak was given
        per_token = entry["flops_per_second"] / entry["tokens_per_second"]
        assert per_token == pytest.approx(first[0]["flops_per_second"] / first[0]["tokens_per_second"])
        assert entry["mfu"] == pytest.approx(entry["flops_per_second"] / 1e9)
        assert "communication_share" not in entry  # one rank
    assert "checkpoint_seconds" in first[4]
    assert "checkpoint_seconds" not in first[3]
    # as a run that was stopped after step 6 of 8: the log goes back to the checkpoint of step 4
    (tmp_path / "run" / "run.json").write_text(
        (tmp_path / "run" / "run.json").read_text().replace("finished_step", "x")
    )
    for checkpoint in (tmp_path / "run").glob("checkpoint-6"):
        __import__("shutil").rmtree(checkpoint)
    with (tmp_path / "run" / METRICS_FILE).open("a") as file:
        file.write('{"step": 7, "lo')
    assert main(["train", config, "--max_steps", "8"]) == 0
    again = [entry for entry in entries(tmp_path / "run") if "loss" in entry]
    assert [entry["step"] for entry in again] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert again[:4] == first[:4]


def test_profile_writes_one_trace(write_config, tmp_path):
    config = write_config(max_steps=6)
    assert main(["train", config, "--profile", "2"]) == 0
    (trace,) = (tmp_path / "run" / "profile").glob("*.json")
    events = json.loads(trace.read_text())["traceEvents"]
    assert sum(event.get("name", "").startswith("ProfilerStep") for event in events) >= 2
    assert any(event.get("name") == "aten::bmm" for event in events)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--profile", "-1"], "profile must not be negative"),
        (["--profile", "often"], "profile must be bool or int"),
        (["--peak_tflops", "-3"], "peak_tflops must not be negative"),
    ],
)
def test_bad_keys(write_config, capsys, overrides, message):
    assert main(["train", write_config(), *overrides]) == 2
    assert message in capsys.readouterr().err


def test_flops_are_those_of_the_batches_seen():
    config = S4Config(vocab_size=50, hidden_size=16, num_hidden_layers=1, state_size=8, use_cache=False)
    args = SimpleNamespace(peak_tflops=2.0, world_size=4, carry_state=False, device=torch.device("cpu"))
    meters = Meters(args, config, is_language_model=True)
    batch = {"input_ids": SimpleNamespace(shape=(3, 40))}
    meters.saw(batch)
    meters.saw(batch)
    expected = 4 * 2 * total(training_flops(config, 3, 40)) / 0.5
    found = meters.entries(seconds=0.5)
    assert found["flops_per_second"] == pytest.approx(expected)
    assert found["mfu"] == pytest.approx(expected / (4 * 2e12))
    assert meters.entries(seconds=1.0)["flops_per_second"] == 0


@pytest.mark.parametrize(("tf32", "peak"), [(True, 495e12), (False, 67e12)])
def test_peak_of_a_gpu(tf32, peak, monkeypatch):
    """With TF32 as transformers sets it, after which torch refuses to read its older switch."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.backends, "fp32_precision", "tf32" if tf32 else "ieee")
    args = SimpleNamespace(peak_tflops=None, use_cpu=False, device="cuda:0", bf16=False, fp16=False, deepspeed=None)
    assert peak_flops(args) == pytest.approx(peak, rel=0.01)
    assert peak_flops(SimpleNamespace(**vars(args) | {"bf16": True})) == pytest.approx(990e12, rel=0.01)


def test_union_of_intervals():
    assert covered([]) == 0
    assert covered([(5, 9), (1, 3), (2, 4), (6, 7)]) == 7
    assert COLLECTIVES.match("gloo:all_reduce")
    assert COLLECTIVES.match("ncclDevKernel_AllReduce_Sum_f32_RING_LL")
    assert not COLLECTIVES.match("aten::bmm")


def test_trim_without_a_file(tmp_path):
    trim(tmp_path / METRICS_FILE, 3)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_two_ranks_know_their_share_of_communication(write_config, tmp_path):
    config = write_config(max_steps=8, per_device_train_batch_size=2, communication_sample_steps=100)
    forked.train(config, ranks=2)
    shares = [entry.get("communication_share") for entry in entries(tmp_path / "run") if "loss" in entry]
    assert shares[:5] == [None] * 5  # step 6, the one after five, is the sample
    assert all(0 < share < 1 for share in shares[5:])
