"""`ssm-lm bench kernels`: what it writes and what it says. That the kernels are good is tested in tests/kernels."""

import importlib.util
import json
import sys

import pytest
import torch

from ssm_lm.bench.timing import measure, rows
from ssm_lm.cli import main

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@needs_triton
def test_compile_only(tmp_path, capsys):
    file = tmp_path / "rows.json"
    command = ["bench", "kernels", "--compile-only", "--target", "sm_90,gfx942", "--kernel", "cauchy_backward rank 1"]
    assert main([*command, "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert [row["target"] for row in found] == ["sm_90", "gfx942"]
    assert all(row["task"] == "kernels" and row["registers"] > 0 and row["spills"] == 0 for row in found)
    assert all(row["bytes_per_token"] > 0 and row["h100_memory_us"] > 0 for row in found)
    printed = capsys.readouterr().out
    assert "registers" in printed
    assert "FFT convolution" in printed


@needs_triton
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--compile-only", "--target", "sm_9x"], ["--target sm_9x", "sm_80"]),
        (["--compile-only", "--target", "sm_90,sm_70"], ["--target sm_70", "sm_80", "gfx942"]),
        (["--compile-only", "--target", "gfx906"], ["--target gfx906", "sm_80", "gfx942"]),
        (["--compile-only", "--target", ","], ["--target ,", "sm_80"]),
        (["--compile-only", "--kernel", "nonsense"], ["--kernel nonsense", "cauchy_forward"]),
        (["--compile-only", "--json", "nowhere/rows.json"], ["--json", "does not exist"]),
        (["--kernel", "cauchy"], ["--kernel", "--compile-only"]),
    ],
)
def test_mistakes_are_one_line(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "kernels", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(word in error for word in words)


def test_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "kernels"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--compile-only" in error


def test_without_triton(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert main(["bench", "kernels", "--compile-only"]) == 2
    assert "pip install" in capsys.readouterr().err


def test_times():
    """The rows of the timing, on the CPU and of tiny layers."""
    found = rows(torch.device("cpu"), batch=1, length=32, hidden=8, state=4, dtype=torch.float32, repeats=1)
    fields = "task model parameters dtype batch length seconds tokens_per_second peak_mib ratio_to_ours"
    assert all(list(row) == fields.split() for row in found)
    models = [row["model"] for row in found]
    assert models[:4] == [
        "s4 kernels, forward",
        "s4 kernels, forward and backward",
        "s4 torch.fft, forward",
        "s4 torch.fft, forward and backward",
    ]
    assert {"s5 kernels, forward", "s4 taps, PyTorch, forward", "s5 step, kernels, forward"} <= set(models)
    assert "s5 step, kernels, forward and backward" not in models
    ours = {row["model"]: row["ratio_to_ours"] for row in found}
    assert (
        ours["s4 kernels, forward"]
        == ours["s4 kernels, forward and backward"]
        == ours["s4d taps, kernels, forward"]
        == 1
    )
    for row in found:
        assert row["seconds"] > 0
        assert row["tokens_per_second"] == row["length"] / row["seconds"]  # one row of a batch


def test_the_median_of_calls_after_warming_up():
    calls = []
    seconds, peak = measure(lambda: calls.append(None), torch.device("cpu"), repeats=5)
    assert len(calls) == 8
    assert seconds >= 0
    assert peak is None
