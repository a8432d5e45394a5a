"""Runs over several prepared folders: the same windows whatever happens, shares, other weights from a step on."""

import json

import forked
import numpy as np
import pytest
from harness import REPO, losses, made_up_text

from ssm_lm.cli import main
from ssm_lm.comparison.worker import train_and_measure
from ssm_lm.data.stream import TokenStream
from ssm_lm.evaluation.evaluate import evaluate
from ssm_lm.loading.model import load_model

WORKER = str(REPO / "tests" / "training" / "faulty_worker.py")
WORDS = {"large": (3000, 5), "middle": (900, 6), "small": (150, 7)}  # in the train split; seed
SAVED = {"max_steps": 16, "save_strategy": "steps", "save_steps": 4}


@pytest.fixture(scope="session")
def folders(once, corpus):
    """Three folders of one tokenizer, by name; the smallest has no validation split."""

    def make(folder):
        for name, (words, seed) in WORDS.items():
            text = folder / "text" / name
            text.mkdir(parents=True)
            (text / "train.txt").write_text(made_up_text(words, seed))
            if name != "small":
                (text / "valid.txt").write_text(made_up_text(200, seed + 10))
            command = ["prepare", "--dataset", str(text), "--tokenizer", str(corpus / "tokenizer")]
            assert main([*command, "--output", str(folder / name)]) == 0

    made = once("sources", make)
    return {name: str(made / name) for name in WORDS}


@pytest.fixture
def mixed(write_config, folders):
    """mixed(name, **overrides): the path of a config of a run over them, 4 windows of 40 a step."""

    def write(name="run", weights=(5, 2, 1), **overrides):
        data = [{folder: weight} for folder, weight in zip(folders.values(), weights, strict=True)]
        return write_config(name, data=data, **(SAVED | overrides))

    return write


def entries(folder) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


@pytest.fixture(scope="session")
def undisturbed(once, folders, corpus):
    """The folder of a run with other weights from step 8 on, on one rank, that nothing disturbed."""
    import yaml
    from harness import base_config

    def make(folder):
        data = [{path: weight} for path, weight in zip(folders.values(), (5, 2, 1), strict=True)]
        values = base_config(corpus, folder / "run", data=data, data_schedule={8: [1, 1, 2]}, **SAVED)
        (folder / "run.yaml").write_text(yaml.safe_dump(values))
        assert main(["train", str(folder / "run.yaml")]) == 0

    return once("mixture", make) / "run"


def test_shares_are_exact_and_logged(undisturbed):
    said = entries(undisturbed)
    assert [entry["step"] for entry in said] == list(range(1, 17))
    for entry in said:
        first, then = min(entry["step"], 8) * 4, max(entry["step"] - 8, 0) * 4
        for number, name in enumerate(WORDS):
            share = first * (5, 2, 1)[number] / 8 + then * (1, 1, 2)[number] / 4
            assert abs(entry[f"tokens/{name}"] / 40 - share) < (1 if not then else 2)
        assert sum(entry[f"tokens/{name}"] for name in WORDS) == entry["tokens"] == entry["step"] * 160
    assert [said[-1][f"tokens/{name}"] // 40 for name in WORDS] == [28, 16, 20]
    assert said[-1]["epochs/small"] > 5  # of its three or four windows
    assert said[-1]["epochs/large"] < 1


def test_a_killed_run_ends_as_an_undisturbed_one(mixed, tmp_path, killed_after, undisturbed):
    config = mixed("killed", data_schedule={8: [1, 1, 2]})
    killed_after(10, config)  # two steps after the change, two after the checkpoint
    assert main(["train", config]) == 0
    assert losses(tmp_path / "killed") == losses(undisturbed)
    told = [{key: entry[key] for key in entry if "/" in key} for entry in entries(tmp_path / "killed")]
    assert told == [{key: entry[key] for key in entry if "/" in key} for entry in entries(undisturbed)]


@pytest.mark.slow
def test_two_ranks_that_are_killed_and_one_that_goes_on_see_the_same_windows(mixed, tmp_path, undisturbed):
    """Two cross the change of weights and are killed in step 15; one goes on from the checkpoint of step 12."""
    keys = {"train_batch_size_total": 4, "per_device_train_batch_size": 2}
    config = mixed("ranks", data_schedule={8: [1, 1, 2]}, **keys)
    with forked.Ranks([WORKER, "train", config], 2, FAULT_STEPS="14", FAULT_FACTOR="wait") as ranks:
        ranks.wait_until(lambda: ranks.said().count("waiting in step 14") == 2)
        ranks.kill()
    assert "checkpoint-12" in forked.train(config).stdout
    assert losses(tmp_path / "ranks") == pytest.approx(losses(undisturbed), rel=1e-5)
    for ours, theirs in zip(entries(tmp_path / "ranks"), entries(undisturbed), strict=True):
        assert {key: ours[key] for key in ours if "/" in key} == {key: theirs[key] for key in theirs if "/" in key}


def test_weights_that_change_between_two_starts(mixed, tmp_path, killed_after, undisturbed, capsys):
    """For steps that are to come they are the config's to say; for steps that were taken they need a word."""
    killed_after(6, mixed())
    assert main(["train", mixed(data_schedule={8: [1, 1, 2]})]) == 0
    assert "changed   data_schedule [[0, [5, 2, 1]]] -> [[0, [5, 2, 1]], [8, [1, 1, 2]]]" in capsys.readouterr().out
    assert losses(tmp_path / "run") == losses(undisturbed)

    killed_after(10, mixed("other"))
    assert main(["train", mixed("other", weights=(1, 1, 2))]) == 2
    assert "`--allow_changes data_schedule` goes on with the new ones from step 8" in capsys.readouterr().err
    assert main(["train", mixed("other", weights=(1, 1, 2)), "--allow_changes", "data_schedule"]) == 0
    assert losses(tmp_path / "other") == losses(undisturbed)
    record = json.loads((tmp_path / "other" / "run.json").read_text())
    assert record["identity"]["data_schedule"] == [[0, [5, 2, 1]], [8, [1, 1, 2]]]
    assert main(["train", mixed("other", weights=(1, 1, 2))]) == 0  # and the word is not asked for again
    assert "this run is finished" in capsys.readouterr().out


def test_the_plan_names_shares_and_epochs(mixed, capsys):
    assert main(["train", mixed(data_schedule={8: [1, 1, 2]}, max_steps=1600), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "small: " in out
    assert "12.50%, 50.00% from step 8 on of the windows, " in out
    assert "data_schedule: {8: [1, 1, 2]}" in out


def test_evaluation_and_comparison_are_over_the_validation_splits_of_all(mixed, folders, tmp_path):
    config = mixed(max_steps=2, save_strategy="no", eval_strategy="steps", eval_steps=2)
    measured = train_and_measure(config)
    model = load_model(tmp_path / "run")
    found = [evaluate(model, folders[name], "validation", 40) for name in ("large", "middle")]
    nll, tokens = (sum(one[key] for one in found) for key in ("nll", "tokens"))
    assert measured["value"] == pytest.approx(np.exp(nll / tokens))
    assert measured["documents"] == sum(one["documents"] for one in found)
    assert 0 < measured["standard_error"] < sum(one["token_perplexity_standard_error"] for one in found)
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert any("eval_loss" in entry for entry in history)


def test_another_tokenizer_is_one_line(mixed, folders, tmp_path, write_config, capsys):
    other = tmp_path / "other"
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "train.txt").write_text("other words than those\n" * 40)
    assert main(["prepare", "--dataset", str(tmp_path / "text"), "--tokenizer", "words", "--output", str(other)]) == 0
    capsys.readouterr()
    config = write_config(data=[folders["large"], str(other)])
    assert main(["train", config]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"{other}: was prepared with another tokenizer" in line
    assert main(["train", mixed(carry_state=True)]) == 2
    assert "carry_state goes through one text" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_estimate_counts_the_windows_of_all(mixed, folders, capsys):
    from ssm_lm.config.reading import read_train_config
    from ssm_lm.estimate.subject import read_subject

    config = mixed()
    subject = read_subject(read_train_config(config, {}), 1, 1, config)
    assert subject.samples == sum(len(TokenStream.open(folder, "train")) // 40 for folder in folders.values())
