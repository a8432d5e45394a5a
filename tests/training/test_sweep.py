"""`ssm-lm sweep`: a comparison without a file."""

import json

import pytest
import yaml
from harness import base_config
from test_compare import begun, stand_in  # noqa: F401  (a fixture)

from ssm_lm.cli import main
from ssm_lm.comparison.sweep import read_sweep


@pytest.fixture
def config(tmp_path, corpus):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(base_config(corpus, tmp_path)))
    return str(path)


def sweep(config, folder, *words):
    return main(["sweep", config, "--output", str(folder), *words])


def test_every_combination_runs_once(config, stand_in, tmp_path, capsys):  # noqa: F811
    folder = tmp_path / "swept"
    words = ["--key", "learning_rate=0.01,0.02", "--key", "model.ssm=s4,s4d", "--key", "seed=7,8"]
    assert sweep(config, folder, *words) == 0
    kinds, firsts = ("model.ssm-s4", "model.ssm-s4d"), (0.01, 0.02)
    wanted = {f"{kind}-lr{rate}-seed7" for kind in kinds for rate in firsts} | {f"{k}-lr0.02-seed8" for k in kinds}
    assert begun(folder) == dict.fromkeys(wanted, 1)
    rows = json.loads((folder / "comparison.json").read_text())["contenders"]
    assert {row["contender"]: row["learning_rate"] for row in rows} == dict.fromkeys(kinds, 0.02)
    capsys.readouterr()
    assert sweep(config, folder, "--key", "learning_rate=0.01,0.02,0.03", *words[2:]) == 0  # one rate more
    assert begun(folder) == dict.fromkeys(wanted | {f"{kind}-lr0.03-seed7" for kind in kinds}, 1)
    assert "0.02" in capsys.readouterr().out
    assert sweep(config, folder, *words, "--no-run") == 0


def test_a_combination_is_its_own_config(config, tmp_path):
    words = ["model.arch=[ssm],[ssm,swiglu]", "weight_decay=0,0.1"]
    contest = read_sweep(config, words, {"max_steps": 3}, tmp_path)
    assert len(contest.contenders) == 4
    run = contest.first_runs("model.arch-ssm-swiglu_weight_decay-0.1")[0]
    assert run.values["model"]["arch"] == ["ssm", "swiglu"]
    assert (run.values["weight_decay"], run.values["max_steps"]) == (0.1, 3)
    assert run.rate == yaml.safe_load(open(config))["learning_rate"]


def test_a_job_of_an_array_is_one_run(config, tmp_path, capsys):
    folder, words = tmp_path / "swept", ["--key", "learning_rate=0.01,0.02", "--set", "max_steps=2"]
    words += ["--set", "eval_strategy=no"]
    assert sweep(config, folder, *words, "--list") == 0
    assert capsys.readouterr().out.splitlines() == ["0\tconfig-lr0.01-seed1", "1\tconfig-lr0.02-seed1"]
    assert sweep(config, folder, *words, "--only", "1") == 0
    assert [path.stem for path in (folder / "results").glob("*.json")] == ["config-lr0.02-seed1"]
    capsys.readouterr()
    assert sweep(config, folder, *words, "--only", "1") == 0  # is done already
    assert capsys.readouterr().out == "done      config-lr0.02-seed1\n"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "--key: is needed"),
        (["--key", "learning_rate"], "--key learning_rate"),
        (["--key", "learning_rate=1,,2"], "--key learning_rate=1,,2"),
        (["--key", "learning_rate=1e-3,-2"], "--key learning_rate"),
        (["--key", "learning_rate=1e-3,1e-3"], "--key learning_rate"),
        (["--key", "max_steps=1", "--key", "max_steps=2"], "--key max_steps: is given twice"),
        (["--key", "max_stps=1,2"], "did you mean 'max_steps'?"),
        (["--key", "max_steps=1,2", "--set", "max_steps=3"], "--set max_steps"),
        (["--key", "output_dir=a,b"], "output_dir"),
        (["--key", "max_steps=1,2", "--only", "2"], "--only 2"),
        (["--key", "max_steps=1,2", "--only", "2", "--list"], "--no-run, --list, --only"),
    ],
)
def test_mistakes_are_one_line(config, tmp_path, capsys, words, named):
    assert sweep(config, tmp_path / "swept", *words) == 2
    said = capsys.readouterr().err
    assert named in said
    assert said.count("\n") == 1
    assert not (tmp_path / "swept").exists()
