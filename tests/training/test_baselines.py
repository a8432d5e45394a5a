"""Models of transformers through the same commands: train, eval, generate, export, estimate."""

import json
import math

import pytest
import torch
import transformers
from harness import losses

from ssm_lm.baselines import BASELINES
from ssm_lm.cli import main
from ssm_lm.config.model import model_config, new_language_model
from ssm_lm.data.stream import TokenStream
from ssm_lm.hub.contents import publishable
from ssm_lm.training.param_groups import parameter_groups

GENERAL = {"hidden_size": 16, "num_hidden_layers": 1}
MODELS = {
    "gpt2": {"hidden_size": 16, "n_layer": 1, "n_head": 2, "n_positions": 40},
    "llama": GENERAL | {"intermediate_size": 24, "num_attention_heads": 2},
    "mamba": GENERAL | {"state_size": 4},
    "mamba2": GENERAL | {"state_size": 4, "num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
}


def model(kind: str, **keys) -> dict:
    return {"type": kind} | MODELS[kind] | keys


def test_there_is_a_case_for_every_type():
    assert MODELS.keys() == BASELINES.keys()


@pytest.mark.parametrize("kind", MODELS)
def test_train_eval_generate_export(kind, write_config, corpus, tmp_path, capsys):
    config = write_config(model=model(kind), max_steps=30)
    assert main(["train", config]) == 0
    run, exported, results = tmp_path / "run", tmp_path / "exported", tmp_path / "results.json"
    found = losses(run)
    assert len(found) == 30
    assert sum(found[-5:]) < 0.9 * sum(found[:5])
    command = ["eval", str(run), "--data", str(corpus), "--split", "validation", "--context", "40", "--recall", "1000"]
    assert main([*command, "--json", str(results)]) == 0
    results = json.loads(results.read_text())
    assert results["recall"]["recalled"]["tokens"] + results["recall"]["other"]["tokens"] == results["tokens"]
    capsys.readouterr()
    assert main(["generate", str(run), "--prompt", "the cat", "--max-new-tokens", "5", "--greedy", "--ignore-eos"]) == 0
    assert capsys.readouterr().out.startswith("the cat")
    assert main(["export", str(run), "--output", str(exported)]) == 0
    assert not list(exported.glob("*.py"))
    assert "model.safetensors" in {file.name for file in publishable(exported)[0]}
    # by transformers alone, and the windows by hand
    plain = transformers.AutoModelForCausalLM.from_pretrained(exported)
    assert type(plain).__name__ == BASELINES[kind][1]
    assert by_hand(plain, TokenStream.open(corpus, "validation"), 40) == pytest.approx(results["nll"], rel=1e-5)


@torch.no_grad()
def by_hand(model, stream: TokenStream, context: int) -> float:
    """The NLL of a stream in windows of `context` tokens."""
    ids, total = torch.tensor([stream.eos_token_id, *stream.tokens.tolist()]), 0.0
    for start in range(0, len(ids) - 1, context):
        window = ids[start : start + context + 1]
        total += float(
            torch.nn.functional.cross_entropy(model(window[None, :-1]).logits[0], window[1:], reduction="sum")
        )
    return total


@pytest.mark.parametrize("kind", MODELS)
def test_groups(kind):
    """No decay on biases, norms and what a state space is made of; decay on all that multiplies."""
    made = new_language_model(model_config(model(kind, vocab_size=30), "config"))
    names = {id(p): name for name, p in made.named_parameters()}
    groups = {
        group["name"]: {names[id(p)] for p in group["params"]} for group in parameter_groups(made, 1e-3, 1e-4, 0.1)
    }
    vectors = {name for name, p in made.named_parameters() if p.ndim < 2}
    state_space = {name for name in names.values() if name.rsplit(".", 1)[-1] in ("A_log", "D", "dt_bias")}
    assert bool(state_space) == kind.startswith("mamba")
    assert groups.get("ssm", set()) == state_space
    assert groups["no_decay"] == vectors - state_space
    assert groups["decay"] == set(names.values()) - vectors - state_space


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": {"type": "lama"}}, "type 'lama' is unknown"),
        ({"model": model("llama", hidden_siz=8)}, "did you mean 'hidden_size'"),
        ({"model": model("gpt2", state_size=8)}, "unknown key 'state_size'"),
        ({"model": model("gpt2", n_head=3)}, "divisible"),
        ({"model": model("llama", num_hidden_layers="two")}, "num_hidden_layers"),
        ({"model": model("gpt2"), "sequence_length": 41}, "n_positions 40"),
        ({"model": model("llama"), "carry_state": True}, "carry_state"),
        ({"model": model("llama"), "task": "digits", "data": None}, "model.type"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value.replace(" ", "-"),
)
def test_mistakes_are_one_line(changes, words, write_config, tmp_path, capsys):
    assert main(["train", write_config(**changes)]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_estimate_counts_parameters_and_flops(write_config, tmp_path, capsys):
    config = write_config(model=model("llama", vocab_size=64))
    assert main(["estimate", config, "--gpus", "1", "--json", str(tmp_path / "report.json")]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    inner, table = 4 * 16 * 16 + 3 * 16 * 24 + 3 * 16, 64 * 16  # attention, feed-forward, norms; embedding or head
    assert report["model"] == {"type": "llama", "parameters": inner + 2 * table, "without_embeddings": inner}
    assert report["flops_per_token"]["model"] == 6 * (inner + table) + 3 * 4 * 40 * 16
    assert "of transformers" in capsys.readouterr().out
    assert main(["estimate", config, "--scaling"]) == 2


def test_what_it_offers_and_what_belongs_to_our_models(write_config, corpus, tmp_path, capsys):
    """It can be trained on; the state, and the strategies that our models bring, are refused in one line."""
    assert main(["train", write_config(model=model("gpt2"), max_steps=10)]) == 0
    run = str(tmp_path / "run")
    assert main(["train", write_config("next", init_from=run, model=None, max_steps=2)]) == 0
    assert losses(tmp_path / "next")[0] < losses(tmp_path / "run")[0] - 0.2
    for command, words in (
        (["eval", run, "--data", str(corpus)], "--context full"),
        (["eval", run, "--data", str(corpus), "--context", "41"], "at most 40"),
        (["generate", run, "--prompt", "the", "--strategy", "contrastive"], "--strategy contrastive"),
    ):
        capsys.readouterr()
        assert main(command) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1


def test_resuming_a_baseline_ends_with_the_same_losses(straight, write_config, tmp_path):
    """Stopped half way by max_steps of a copy: the checkpoint goes on, an infinity in the model's config or not."""
    import forked

    overrides = {"model": model("mamba2"), "save_strategy": "steps", "save_steps": 5, "max_steps": 10}
    expected = losses(straight(**overrides))
    config = write_config(**overrides)
    with forked.Ranks(["-m", "ssm_lm", "train", config]) as started:
        started.wait_until(lambda: (tmp_path / "run" / "checkpoint-5").is_dir())
        started.kill()
    forked.train(config)
    found = losses(tmp_path / "run")
    assert len(found) == 10
    assert all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(found, expected, strict=True))
