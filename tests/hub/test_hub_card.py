"""The card tells how a model was made, from what its run has written, and nothing of the machine."""

import json

import torch

from ssm_lm import S4Config, S4ForCausalLM
from ssm_lm.hub.card import PICTURE, write_card
from ssm_lm.hub.making import curve_of, curves_of, draw, making

IDENTITY = {
    "global_batch_size": 16, "sequence_length": 256, "learning_rate": 4e-3, "ssm_learning_rate": 2e-3, "bf16": True,
    "lr_scheduler_type": "cosine", "warmup_steps": 50, "weight_decay": 0.1, "seed": 7,
}  # fmt: skip


def write_run(folder) -> None:
    (folder / "config.json").write_text("{}")
    (folder / "run.json").write_text(json.dumps({"identity": IDENTITY}))
    start = {
        "host": "secret-host",
        "command": "ssm-lm train /home/me/x.yaml",
        "ranks": 2,
        "versions": {"torch": "2.13.0"},
    }
    (folder / "starts.jsonl").write_text(json.dumps(start) + "\n")
    entries = [{"step": n, "tokens": n * 4096, "tokens_per_second": 4096} for n in (100, 500)]
    entries += [{"step": n, "eval_perplexity": 1000 / n} for n in range(50, 501, 50)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def test_a_run_says_how_its_model_was_made(tmp_path):
    write_run(tmp_path)
    made = making(tmp_path)
    assert made["tokens seen"] == "2,048,000"
    assert made["learning rate of the state spaces"] == "0.002"
    assert made["precision"] == "bf16"
    assert made["hours in steps"] == "0.14"  # 500 s
    assert (made["processes"], made["software"]) == ("2", "torch 2.13.0")
    assert "secret-host" not in str(made)
    assert "/home" not in str(made)
    curve = curve_of(tmp_path)
    assert len(curve) <= 8
    assert curve[-1] == (500, 2.0)
    checkpoint = tmp_path / "checkpoint-100"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text("{}")
    assert making(checkpoint)["tokens seen"] == "409,600"
    assert making(checkpoint)["hours in steps"] == "0.03"
    assert curve_of(checkpoint)[-1] == (100, 10.0)


def test_the_card_has_it(tmp_path):
    write_run(tmp_path)
    torch.manual_seed(0)
    model = S4ForCausalLM(S4Config(vocab_size=30, hidden_size=8, num_hidden_layers=1, state_size=4))
    text = write_card(model, "small", [], made=making(tmp_path), curve=curve_of(tmp_path), picture=True)
    for line in (
        f"]({PICTURE})",
        "| tokens seen | 2,048,000 |",
        "| learning rate | 0.004 |",
        "## Use and limits",
        "target_modules=",
    ):
        assert line in text
    assert "| validation perplexity | " in text
    assert "How it was made" not in write_card(model, "small", [])


def test_the_picture_is_of_the_run_up_to_the_checkpoint(tmp_path):
    write_run(tmp_path)
    checkpoint = tmp_path / "checkpoint-200"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text("{}")
    curves = curves_of(checkpoint)
    assert curves == {"validation perplexity": ([50, 100, 150, 200], [20.0, 10.0, 1000 / 150, 5.0])}
    draw(curves, tmp_path / PICTURE)
    assert (tmp_path / PICTURE).read_bytes().startswith(b"\x89PNG")


def test_a_model_without_a_run_has_no_story(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert making(tmp_path) == {}
    assert curve_of(tmp_path) == []
    assert curves_of(tmp_path) == {}
    (tmp_path / "run.json").write_text("[1]")
    assert making(tmp_path) == {}
