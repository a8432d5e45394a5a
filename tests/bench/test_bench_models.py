"""`ssm-lm bench generate|prefill|train`: what it writes and what it says; not how fast anything is."""

import json

import pytest
import torch

from ssm_lm.bench import speed
from ssm_lm.bench.limits import bytes_of_a_token
from ssm_lm.bench.peers import OURS, SIZES, build
from ssm_lm.bench.timing import host_seconds
from ssm_lm.cli import main

TINY = ["--size", "tiny", "--turns", "2", "--lengths", "8,12"]


@pytest.mark.parametrize(
    ("task", "models"),
    [("generate", "s4d,ssd,gpt2,gpt2-without-cache,mamba2"), ("prefill", "h3,llama"), ("train", "s5,gated")],
)
def test_rows(task, models, tmp_path, capsys):
    file = tmp_path / "rows.json"
    plot = ["--plot", str(tmp_path / "speed.svg")] if task == "generate" else []
    assert main(["bench", task, "--models", models, *TINY, "--json", str(file), *plot]) == 0
    rows = json.loads(file.read_text())
    assert [(row["model"], row["length"]) for row in rows] == [(m, n) for n in (8, 12) for m in models.split(",")]
    for row in rows:
        assert row["task"] == task
        assert row["dtype"] == "float32"
        assert row["seconds"] > 0
        assert row["parameters"] > 10_000
        assert row["tokens_per_second"] == pytest.approx(1e3 * row["batch"] / row["milliseconds_per_token"])
        assert {"processor", "threads", "torch", "transformers", "commit", "peak_mib", "spread"} <= row.keys()
        limited = task == "train" or (task == "generate" and row["model"] != "gpt2-without-cache")
        assert ("share_of_limit" in row) == limited
        assert not limited or row["share_of_limit"] > 0
    assert rows[0]["ratio_to_ours"] == 1  # the first of ours is the measure
    assert not plot or "gpt2-without-cache" in (tmp_path / "speed.svg").read_text()
    assert "tokens/s" in capsys.readouterr().out


def test_the_bytes_of_a_token_are_weights_without_tables_and_the_cache():
    for name, cache in (("s4d", 2 * 2 * 64 * 8), ("gpt2", 2 * 2 * 8 * 64)):  # states of two sublayers; keys and values
        model = build(name, SIZES["tiny"], 16, torch.float32)
        output = model(torch.ones(2, 8, dtype=int), use_cache=True)
        read = model.num_parameters() - (16 * 64 if name == "gpt2" else 0)  # positions; the head reads the other table
        assert bytes_of_a_token(model, output.past_key_values) == 4 * (read + cache)


def test_contenders_are_of_one_size():
    counts = {}
    for name in (*OURS, "gpt2", "llama", "mamba", "mamba2"):
        model = build(name, SIZES["25M"]._replace(layers=1, vocabulary=16), 64, torch.float32)
        counts[name] = model.num_parameters()
    assert max(counts.values()) < 1.25 * min(counts.values()), counts


def test_a_peer_that_fails_is_said(tmp_path, monkeypatch, capsys):
    def broken(name, *sizes):
        if name == "llama":
            raise RuntimeError("changed")
        return build(name, *sizes)

    monkeypatch.setattr(speed, "build", broken)
    file = tmp_path / "rows.json"
    assert main(["bench", "prefill", "--models", "s4d,llama", *TINY, "--json", str(file)]) == 0
    failed = [row for row in json.loads(file.read_text()) if "error" in row]
    assert [row["error"] for row in failed] == ["RuntimeError: changed"] * 2
    assert "llama did not run" in capsys.readouterr().out


def test_on_a_gpu_a_call_ends_when_its_work_is_done(monkeypatch):
    """And a step of training has the share of the maker's peak beside that of a product that was measured."""
    done, card = [], torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: done.append("wait"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert host_seconds(lambda: done.append("call"), card) >= 0
    assert done == ["wait", "call", "wait"]
    turn = speed.Turn("s4", 1, 1, 1, done.clear, work=98.94e12)
    found = speed._limit("train", turn, 1.0, 300e12, torch.bfloat16, card)
    assert found == pytest.approx({"flops_per_second": 98.94e12, "share_of_limit": 0.3298, "mfu": 0.1})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generate", "--models", "s4,gpt3"], "--models gpt3: give some of s4, s4d"),
        (["generate", "--lengths", "1,x"], "--lengths 1,x: give numbers of at least 2"),
        (["train", "--turns", "0"], "--turns 0: give a number of at least 1"),
        (["prefill", "--plot", "x.txt"], "--plot x.txt: give a name that ends in .png or .svg"),
        (["train", "--device", "cuda"], "--device cuda: torch sees no GPU on this machine"),
        (["prefill", "--target", "sm_90"], "--target is not for bench prefill"),
        (["kernels", "--compile-only", "--size", "25M"], "--size is not for bench kernels"),
    ],
)
def test_mistakes_are_one_line(arguments, said, capsys):
    assert main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert said in error
