"""`ssm-lm runs`: what it says of folders as training leaves them. tests/training holds real runs against it."""

import json
import subprocess
import sys

import pytest

from ssm_lm.cli import main
from ssm_lm.runs.listing import find_runs, read_run


def entry(step, **values):
    return json.dumps({"step": step, "time": 0.0} | values) + "\n"


@pytest.fixture
def make_run(tmp_path):
    """make_run(name, run file, *lines of the log) -> a folder as a run leaves it."""

    def make(name, recorded, *lines, model=False):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(recorded if isinstance(recorded, str) else json.dumps(recorded))
        (folder / "metrics.jsonl").write_text("".join(lines))
        if model:
            (folder / "model.safetensors").write_bytes(b"")
        return folder

    return make


def make_checkpoint(folder, step, whole=True):
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir()
    if whole:
        (checkpoint / "complete.json").write_text(json.dumps({"step": step, "world_size": 1, "files": {}}))


@pytest.mark.parametrize(
    ("recorded", "model", "checkpoints", "state"),
    [
        ({"identity": {}}, False, {}, "stopped"),
        ({"identity": {}}, False, {5: True}, "stopped"),
        ({"identity": {}}, False, {5: True, 10: False}, "stopped"),
        ({"identity": {}}, False, {5: False}, "broken"),
        ({"identity": {}, "finished_step": 10}, True, {10: True}, "finished"),
        ({"identity": {}, "finished_step": 10}, False, {10: True}, "broken"),
        ('{"identity": {', False, {5: True}, "broken"),
        ("[]", False, {}, "broken"),
    ],
)
def test_states(make_run, recorded, model, checkpoints, state):
    folder = make_run("run", recorded, model=model)
    for step, whole in checkpoints.items():
        make_checkpoint(folder, step, whole)
    assert read_run(folder).state == state


def test_how_far_a_run_came(make_run):
    cut_short = '{"step": 40, "loss": 1.'
    evaluations = (entry(20, eval_loss=1.2, eval_perplexity=3.3), entry(30, eval_loss=1.5, eval_perplexity=4.5))
    folder = make_run("run", {}, entry(10, loss=2.0), entry(20, loss=1.5), *evaluations, entry(30, loss=1.0), cut_short)
    make_checkpoint(folder, 20)
    (folder / "config.yaml").write_text("max_steps: 100\n")
    found = read_run(folder)
    assert (found.step, found.last_step, found.loss) == (30, 100, 1.0)
    assert found.best == ("perplexity", 3.3, 20)
    assert found.checkpoint.name == "checkpoint-20"


def test_an_evaluation_that_is_no_number_is_not_the_best(make_run):
    folder = make_run("run", {}, entry(1, eval_accuracy=0.5), entry(2, eval_accuracy=0.7), entry(3, eval_accuracy=0.6))
    assert read_run(folder).best == ("accuracy", 0.7, 2)
    lines = (entry(1, eval_perplexity=float("nan")), entry(2, eval_perplexity=9.0))
    assert read_run(make_run("other", {}, *lines)).best == ("perplexity", 9.0, 2)
    assert read_run(make_run("none", {})).best is None


def test_the_table_and_the_list(make_run, tmp_path, capsys):
    make_run("a/one", {"finished_step": 7}, entry(7, loss=0.25), model=True)
    make_run("b/deep/two", {})
    make_run("b/deep/er/too-deep", {})
    assert [str(run.relative_to(tmp_path)) for run in find_runs(tmp_path)] == ["a/one", "b/deep/two"]
    assert main(["runs", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:4] == ["a/one", "finished", "7", "0.2500"]
    assert lines[2].split()[:3] == ["b/deep/two", "stopped", "0"]
    assert main(["runs", str(tmp_path / "a/one"), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["state"], found["step"], found["best"]) == ("finished", 7, None)


def test_folders_without_runs(tmp_path, capsys):
    assert main(["runs", str(tmp_path)]) == 0
    assert "holds no run" in capsys.readouterr().out
    assert main(["runs", str(tmp_path / "nowhere")]) == 2
    assert "nowhere: no such folder" in capsys.readouterr().err


def test_it_answers_without_torch(make_run, tmp_path):
    folder = make_run("run", {})
    make_checkpoint(folder, 5)
    code = (
        "import sys; from ssm_lm.cli import main; code = main(['runs', sys.argv[1]]); "
        "sys.exit(9 if {'torch', 'transformers', 'numpy'} & set(sys.modules) else code)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
