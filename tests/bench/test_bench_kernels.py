"""`ssm-lm bench kernels`: what it writes and what it says. That the kernels are good is tested in tests/kernels."""

import importlib.util
import json
import sys
from types import SimpleNamespace

import pytest
import torch

from ssm_lm.bench import timing
from ssm_lm.bench.timing import measure, rows
from ssm_lm.cli import main
from ssm_lm.modeling import ops

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
    fields = "task model parameters dtype batch length seconds tokens_per_second peak_mib ratio_to_ours device"
    assert all(list(row) == fields.split() for row in found)
    models = [row["model"] for row in found]
    assert models[:4] == [
        "s4 kernels, forward",
        "s4 kernels, forward and backward",
        "s4 torch.fft, forward",
        "s4 torch.fft, forward and backward",
    ]
    assert {"s5 kernels, forward", "s4 taps, PyTorch, forward", "s5 step, kernels, forward"} <= set(models)
    assert {f"ssd {by}, forward and backward" for by in ("kernels", "PyTorch")} <= set(models)
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


def test_kernels_that_do_not_run_are_not_timed(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(ops, "kernel_status", lambda: {"step": "PyTorch: its self-check failed"})
    assert main(["bench", "kernels"]) == 2
    assert "step does not run in its kernel" in capsys.readouterr().err
    monkeypatch.setenv("SSM_LM_KERNELS", "torch")
    assert main(["bench", "kernels"]) == 2
    assert "SSM_LM_KERNELS is set" in capsys.readouterr().err


def test_what_others_cannot_do_is_left_out(monkeypatch):
    def broken(u, state):
        yield timing.Contender("sequence", "mamba-ssm ssd", 1, 32, lambda: 1 / 0, [])

    monkeypatch.setattr(timing, "mamba_ssd", broken)
    with pytest.warns(UserWarning, match="mamba-ssm ssd, forward, is left out: division by zero"):
        found = rows(torch.device("cpu"), batch=1, length=8, hidden=4, state=4, dtype=torch.float32, repeats=1)
    assert found
    assert not any("mamba" in row["model"] for row in found)


def test_a_call_on_a_gpu_is_timed_from_a_cold_cache_behind_a_queue(monkeypatch):
    """In this order, and nothing of the host's between the two events but the call."""
    done = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            done.append("event")

        def synchronize(self):
            done.append("wait")

        def elapsed_time(self, end):
            return 2.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: done.append("sleep"))
    flush = SimpleNamespace(zero_=lambda: done.append("flush"))
    assert timing._gpu_seconds(lambda: done.append("call"), flush) == 2e-3
    assert done == ["flush", "sleep", "event", "call", "event", "wait"]


def test_the_median_of_calls_after_warming_up():
    calls = []
    seconds, peak = measure(lambda: calls.append(None), torch.device("cpu"), repeats=5)
    assert len(calls) == 8
    assert seconds >= 0
    assert peak is None
