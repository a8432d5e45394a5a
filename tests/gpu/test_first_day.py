"""`make gpu`: what is written down of each part; and all of it on the CPU, tiny, so that it is not run for the first
time on the day on which there is a card.
"""

import json
import signal
import sys
import time

import psutil
import pytest

from tests.gpu import first_day
from tests.gpu.first_day import Part, run_all, run_part


def part(code: str, limit: float = 30, **fields) -> Part:
    return Part("it", [sys.executable, "-c", code], limit, **fields)


def test_a_part_that_fails_is_written_down_and_the_others_run(tmp_path):
    parts = [part("print(1); raise SystemExit('no memory')"), part("pass", read=lambda: {"rows": 3})]
    assert not run_all(parts, tmp_path, {"device": "a card"})["passed"]
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["device"] == "a card"
    failed, passed = report["parts"]
    assert (failed["status"], failed["exit_code"], failed["output"]) == ("failed", 1, ["1", "no memory"])
    assert (passed["status"], passed["result"]) == ("passed", {"rows": 3})


def test_what_a_part_has_shown_may_fail_it(tmp_path):
    def read():
        raise RuntimeError("the loss has not fallen")

    entry = run_part(part("print('done')", read=read), tmp_path)
    assert (entry["status"], entry["why"], entry["output"]) == ("failed", "the loss has not fallen", ["done"])
    assert run_part(part("pass", read=lambda: {}["x"]), tmp_path)["why"] == "KeyError: 'x'"


@pytest.mark.parametrize(("answer", "status"), [("sys.exit(75)", "passed"), ("pass", "timed out")])
def test_at_its_limit_a_part_is_asked_to_stop_then_killed(tmp_path, answer, status):
    code = f"""if True:
        import signal, subprocess, sys, time
        def stop(*_):
            {answer}
        signal.signal(signal.SIGTERM, stop)
        print(subprocess.Popen(["sleep", "60"]).pid, flush=True)
        time.sleep(20); time.sleep(20)"""
    entry = run_part(part(code, 2, stop=signal.SIGTERM), tmp_path)
    assert entry["status"] == status
    assert 2 <= entry["seconds"] < 20
    started = (tmp_path / "output" / "it.txt").read_text()
    assert status == "passed" or entry["output"] == [started.strip()]
    time.sleep(0.1)
    # nor is what it has started left behind
    assert not psutil.pid_exists(int(started)) or psutil.Process(int(started)).status() == psutil.STATUS_ZOMBIE


def test_what_is_not_installed_is_said_and_fails_nothing(tmp_path):
    parts = [part("raise SystemExit(1)", needs=("json", "no_such_package")), part("x", why_not="there is no GPU")]
    assert run_all(parts, tmp_path, {})["passed"]
    missing, impossible = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert (missing["status"], missing["why"]) == ("passed over", "no_such_package: not installed")
    assert (impossible["status"], impossible["why"]) == ("passed over", "there is no GPU")


def test_all_parts_end_in_their_time(tmp_path):
    report = run_all([part("import time; time.sleep(30)"), part("pass")], tmp_path, {}, total=1)
    assert not report["passed"]
    first, second = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert (first["status"], first["limit"]) == ("timed out", 1)
    assert (second["status"], second["why"]) == ("timed out", "the time of all parts was over before it began")


def test_the_parts_of_a_card_fit_into_eight_minutes(tmp_path):
    parts = first_day.parts("cuda", "NVIDIA H100 80GB HBM3", tmp_path)
    assert first_day.TOTAL + max(2, max(part.limit for part in parts) / 5) < 8 * 60 + 20
    commands = {part.name: part.command for part in parts}
    assert commands["estimate"][-3:-1] == ["h100", "--json"]
    assert commands["tests of kernels"].count("gpu") == 1
    assert all("cuda" in commands[f"bench {task}"] for task in ("train", "generate"))
    assert next(part for part in parts if part.name == "training").stop == signal.SIGTERM


def test_the_share_of_the_roofline():
    """On paper half a second of 2,000 tokens at a whole roofline, measured at 1,000 tokens a second."""
    run = {"device": "h100", "tokens_per_step": 2000, "gradient_accumulation_steps": 2}
    limits = {"ssm": {"arithmetic": 0.01, "memory": 0.2}, "ffn": {"arithmetic": 0.04, "memory": 0.02}}
    report = {"run": run, "roofline": limits, "time": {"optimizer": 0.05}, "assumptions": {"efficiency": 0.4}}
    entries = [{"tokens_per_second": speed} for speed in (10, 1000, 990, 1010)]
    found = first_day.share_of_roofline(report, entries)
    assert found == {"device": "h100", "share": pytest.approx(0.25), "on_paper": pytest.approx(0.5), "measured": 2}


def test_a_kernel_that_does_not_run_on_the_card_is_a_failure(tmp_path):
    (tmp_path / "output").mkdir()
    said = 'a warning\n{\n "kernels": {"step": "Triton on cuda", "cauchy": "PyTorch: wrong"}\n}\nand more'
    (tmp_path / "output" / "self-checks.txt").write_text(said)
    assert set(first_day.machine_of(tmp_path, on_gpu=False)) == {"kernels"}
    with pytest.raises(RuntimeError, match="not in its Triton kernel: cauchy: PyTorch: wrong"):
        first_day.machine_of(tmp_path, on_gpu=True)


def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys):
    assert first_day.main(["--device", "cpu", "--parts", "text,tea", "--output", str(tmp_path / "a")]) == 2
    assert "--parts tea: there are self-checks, tests" in capsys.readouterr().err
    monkeypatch.setattr(first_day, "GPU_NAME", "print('')")
    assert first_day.main(["--output", str(tmp_path / "a")]) == 2
    assert "sees no GPU" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


@pytest.mark.long
@pytest.mark.seconds(60)
@pytest.mark.timeout(1200)
def test_the_rehearsal(tmp_path):
    """Every part that a CPU can run, tests of this folder among them, and nothing else is passed over; of the two
    timings of whole models one, as a process takes seconds to start.
    """
    parts = [part.name for part in first_day.parts("cpu", None, tmp_path) if part.name != "bench generate"]
    assert first_day.main(["--device", "cpu", "--parts", ",".join(parts), "--output", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "gpu.json").read_text())
    found = {entry["part"]: entry for entry in report["parts"]}
    over = [name for name, entry in found.items() if entry["status"] == "passed over"]
    assert over == ["bench kernels", "estimate"]
    assert found["self-checks"]["result"]["packages"]["torch"]["version"]
    tests = found["tests"]["result"]
    assert tests["passed"] == 7  # steps of five layers, the cache's size, and the two runs of training
    assert tests["failed"] == []
    losses = found["training"]["result"]["losses"]
    assert [step for step, _ in losses] == [1, 2, 3, 4, 5, 6]
    assert losses[-1][1] < losses[0][1]
    assert {row["model"] for row in found["bench train"]["result"]["rows"]} == {"s4", "gpt2"}
    assert all((tmp_path / name).stat().st_size for name in ("train.png", "training.png"))
