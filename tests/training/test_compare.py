"""`ssm-lm compare`: what a comparison runs, what it survives, and its table."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import yaml
from harness import base_config, losses, process_environment

from ssm_lm.cli import main
from ssm_lm.comparison import schedule
from ssm_lm.comparison.contest import read_contest
from ssm_lm.comparison.pictures import families
from ssm_lm.comparison.worker import train_and_measure

LLAMA = {"type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
# in the place of a run: the perplexity follows from the rate, a rate of 0.5 is a mistake, and `sleep` steps take long
STAND_IN = """
    import json, os, signal, sys, time, pathlib, yaml
    config, result, parent = sys.argv[1:]
    values = yaml.safe_load(open(config))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    folder = pathlib.Path(values["output_dir"])
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "begun", "a") as file:
        file.write("x")
    if values["learning_rate"] == 0.5:
        print("ssm-lm: it diverged")
        sys.exit(2)
    time.sleep(values.get("logging_steps", 0))
    numbers = dict.fromkeys(("parameters", "without_embeddings", "steps", "tokens", "seconds", "tokens_per_second"), 1)
    numbers["without_embeddings"] = width = values["model"].get("hidden_size", 1)
    value = 100 + 1e4 * abs(values["learning_rate"] - 0.02) + values["seed"]
    found = {"config": values, "measure": "perplexity", "value": value, "standard_error": 1.5, "protocol": "p"}
    found |= {"flops": 6.0 * width}
    pathlib.Path(result).write_text(json.dumps(found | numbers | {"split": "validation"}))
"""


@pytest.fixture
def contest(tmp_path, corpus):
    """contest(**changes) -> the path of a comparison of ours and a llama."""

    def write(**changes):
        common = base_config(corpus, tmp_path) | {"eval_strategy": "steps", "eval_steps": 10}
        model = common.pop("model")
        for key in ("learning_rate", "seed", "output_dir"):
            del common[key]
        values = {
            "output_dir": str(tmp_path / "compared"),
            "train": common | changes.pop("train", {}),
            "learning_rates": [0.01],
            "contenders": [{"name": "ours", "model": model}, {"name": "llama", "model": LLAMA}],
        }
        path = tmp_path / "contest.yaml"
        path.write_text(yaml.safe_dump(values | changes))
        return str(path)

    return write


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    path = tmp_path / "stand_in.py"
    path.write_text(textwrap.dedent(STAND_IN))
    monkeypatch.setattr(schedule, "WORKER", (sys.executable, "-S", str(path)))
    # -S leaves the packages out of the path, and their start-up too
    monkeypatch.setenv("PYTHONPATH", os.path.dirname(os.path.dirname(yaml.__file__)))


def begun(folder) -> dict[str, int]:
    """How often each run was begun."""
    return {path.parent.name: len(path.read_text()) for path in (folder / "runs").glob("*/begun")}


def test_all_rates_with_the_first_seed_and_the_best_with_the_others(contest, stand_in, tmp_path, capsys):
    own = {"name": "llama", "model": LLAMA, "learning_rates": [0.02, 0.04], "overrides": {"weight_decay": 0.0}}
    path = contest(learning_rates=[0.01, 0.02, 0.04], seeds=[1, 2], contenders=[{"name": "a", "model": {}}, own])
    assert main(["compare", path, "--jobs", "3", "--set", "model.hidden_size=16"]) == 0
    folder = tmp_path / "compared"
    expected = {f"a-lr{rate}-seed1" for rate in ("0.01", "0.02", "0.04")} | {"a-lr0.02-seed2"}
    expected |= {"llama-lr0.02-seed1", "llama-lr0.04-seed1", "llama-lr0.02-seed2"}
    assert begun(folder) == dict.fromkeys(expected, 1)
    started = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("started")]
    assert started[:3] == ["a-lr0.01-seed1:", "llama-lr0.02-seed1:", "a-lr0.02-seed1:"]  # in turns
    assert main(["compare", path, "--no-run", "--set", "model.hidden_size=16"]) == 0
    config = yaml.safe_load((folder / "configs" / "llama-lr0.02-seed2.yaml").read_text())
    assert (config["weight_decay"], config["learning_rate"], config["seed"]) == (0.0, 0.02, 2)
    assert config["model"]["hidden_size"] == 16
    found = json.loads((folder / "comparison.json").read_text())
    rows = {row["contender"]: row for row in found["contenders"]}
    assert {name: row["at_edge"] for name, row in rows.items()} == {"a": False, "llama": True}
    assert rows["a"]["seeds"] == [101, 102]
    assert rows["a"]["value"] == 101.5
    table = capsys.readouterr().out
    assert "0.02 (edge)" in table
    assert (folder / "table.md").read_text() in table
    # given again, nothing is left to do; a new rate is
    assert main(["compare", path, "--set", "model.hidden_size=16"]) == 0
    assert begun(folder) == dict.fromkeys(expected, 1)


def test_the_sizes_of_a_family_are_a_picture_of_their_own(contest, stand_in, tmp_path, capsys):
    contenders = [
        {"name": f"{family}-{size}", "family": family, "model": {"hidden_size": size}, "learning_rates": [rate]}
        for family, size, rate in (("a", 32, 0.01), ("b", 16, 0.04), ("a", 16, 0.03), ("b", 32, 0.02), ("c", 16, 0.02))
    ]
    assert main(["compare", contest(contenders=contenders)]) == 0
    folder = tmp_path / "compared"
    rows = {row["contender"]: row for row in json.loads((folder / "comparison.json").read_text())["contenders"]}
    assert (rows["a-32"]["family"], rows["a-32"]["flops"]) == ("a", 192.0)
    lines = {name: [row["contender"] for row in sizes] for name, sizes in families(list(rows.values())).items()}
    assert lines == {"a": ["a-16", "a-32"], "b": ["b-16", "b-32"]}  # c has one size, which is no line
    assert "sizes.png, sizes.svg" in capsys.readouterr().out
    picture = (folder / "sizes.svg").read_text()
    assert "parameters without embeddings" in picture
    assert "FLOPs of training" in picture


def test_a_run_that_fails_leaves_the_others_their_table(contest, stand_in, tmp_path, capsys):
    path = contest(learning_rates=[0.5, 0.02])
    with pytest.raises(SystemExit) as ended:
        main(["compare", path])
    assert ended.value.code == 1
    output = capsys.readouterr().out
    assert "failed    ours-lr0.5-seed1111 (exit code 2): ssm-lm: it diverged" in output
    assert "2 runs failed" in output
    assert "| ours | 1 | 16 | 0.02 (edge) |" in output
    with pytest.raises(SystemExit):  # it is tried again, and what is done is not
        main(["compare", path])
    assert begun(tmp_path / "compared") == {
        "ours-lr0.5-seed1111": 2,
        "llama-lr0.5-seed1111": 2,
        "ours-lr0.02-seed1111": 1,
        "llama-lr0.02-seed1111": 1,
    }


def test_a_result_of_another_config_is_refused(contest, stand_in, capsys):
    path = contest()
    assert main(["compare", path]) == 0
    capsys.readouterr()
    assert main(["compare", path, "--set", "max_steps=21"]) == 2
    assert "max_steps 20, not 21" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"contender": []}, "did you mean 'contenders'"),
        ({"contenders": []}, "'contenders' is needed"),
        ({"contenders": [{"name": "a/b", "model": {}}]}, "not 'a/b'"),
        ({"contenders": [{"name": "a", "model": LLAMA | {"hidden": 3}}]}, "a, model: unknown key 'hidden'"),
        ({"contenders": [{"name": "a", "model": LLAMA | {"num_attention_heads": 3}}]}, "a: model: "),
        ({"contenders": [{"name": "a", "model": {}, "overrides": {"seed": 3}}]}, "seed comes from"),
        ({"contenders": [{"name": "a", "family": 3, "model": {}}]}, "a: family must be"),
        ({"learning_rates": [0.1, -1]}, "learning_rates must be"),
        ({"train": {"max_step": 3}}, "ours: unknown key 'max_step'"),
        ({"train": {"data": "nowhere"}}, "nowhere: no such folder"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value.replace(" ", "-").replace("/", "-"),
)
def test_mistakes_are_one_line_before_the_first_run(changes, words, contest, tmp_path, capsys):
    assert main(["compare", contest(**changes)]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "compared").exists()


def test_a_run_is_trained_and_measured(contest, tmp_path, monkeypatch, capsys):
    """By its worker, within this process: the table's numbers are those of the run and of `eval`."""
    path = contest()
    compared = read_contest(path, {})
    for name in compared.contenders:
        (run,) = compared.first_runs(name)
        config = tmp_path / f"{name}.yaml"
        config.write_text(yaml.safe_dump(run.values))
        result = schedule.result_file(compared, run)
        result.parent.mkdir(parents=True, exist_ok=True)
        result.write_text(json.dumps(train_and_measure(str(config))))
    monkeypatch.chdir(tmp_path)
    assert main(["compare", path]) == 0
    folder = tmp_path / "compared"
    for name in ("table.md", "curves.png", "curves.svg"):
        assert (folder / name).stat().st_size > 100
    rows = {row["contender"]: row for row in json.loads((folder / "comparison.json").read_text())["contenders"]}
    assert rows["llama"]["without_embeddings"] == 4 * 16 * 16 + 3 * 16 * 24 + 3 * 16
    assert rows["llama"]["parameters"] == rows["llama"]["without_embeddings"] + 2 * 26 * 16
    assert rows["ours"]["tokens"] == rows["llama"]["tokens"] == 20 * 4 * 40
    assert rows["llama"]["flops"] == 3200 * 6 * (rows["llama"]["without_embeddings"] + 26 * 16) + 12 * 3200 * 40 * 16
    assert rows["ours"]["tokens_per_second"] == pytest.approx(3200 / rows["ours"]["seconds"])
    data, llama = compared.contenders["llama"]["data"], str(folder / "runs" / "llama-lr0.01-seed1111")
    evaluation = ["eval", llama, "--data", data, "--split", "validation", "--context", "40", "--json", "eval.json"]
    assert main(evaluation) == 0
    evaluated = json.loads((tmp_path / "eval.json").read_text())
    assert rows["llama"]["value"] == pytest.approx(evaluated["token_perplexity"])
    assert rows["llama"]["standard_error"] == pytest.approx(evaluated["token_perplexity_standard_error"])
    # the other form, of folders
    capsys.readouterr()
    ours = str(folder / "runs" / "ours-lr0.01-seed1111")
    assert main(["compare", ours, llama, "--output", "two"]) == 0
    two = json.loads((tmp_path / "two" / "comparison.json").read_text())
    assert "model.model_type" in two["keys_that_differ"]
    assert "learning_rate" not in two["keys_that_differ"]
    assert [row["tokens"] for row in two["runs"]] == [3200, 3200]
    assert (tmp_path / "two" / "curves.svg").is_file()
    assert "model.model_type" in capsys.readouterr().out
    assert main(["compare", ours, "nowhere"]) == 2


def checkpoints(run) -> set[str]:
    return {path.name for path in run.glob("checkpoint-*")}


def wait_until(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.long
@pytest.mark.seconds(75)
def test_a_killed_comparison_goes_on_and_ends_as_an_undisturbed_one(contest, straight, tmp_path):
    """SIGKILL to the command alone, in the middle of a run: its run ends too; SIGTERM is 75; then it is finished."""
    train = {"save_strategy": "steps", "save_steps": 10, "max_steps": 60}
    path = contest(train=train, contenders=[{"name": "llama", "model": LLAMA}])
    folder = tmp_path / "compared"
    run = folder / "runs" / "llama-lr0.01-seed1111"
    for number, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 75), (None, 0)):
        command = [sys.executable, "-m", "ssm_lm", "compare", path]
        with open(tmp_path / "said", "w") as said:
            process = subprocess.Popen(command, env=process_environment(), stdout=said)
        try:
            if number is not None:
                # of this call: once it has begun its run, the one that a kill left has written its last checkpoint
                wait_until(lambda: "started" in (tmp_path / "said").read_text(), process)
                before = checkpoints(run)
                wait_until(lambda before=before: not checkpoints(run) <= before, process)
                process.send_signal(number)
            process.wait(120)
        finally:
            process.kill()
        assert process.returncode == code
    expected = losses(straight(model=LLAMA, seed=1111, eval_strategy="steps", eval_steps=10, **train))
    assert losses(run) == pytest.approx(expected, rel=1e-6)
    assert json.loads((folder / "comparison.json").read_text())["contenders"][0]["steps"] == 60
