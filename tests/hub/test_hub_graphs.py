"""Graphs with the states as inputs and outputs: torch.export for any batch and length, ONNX in onnxruntime."""

import json
import re
import sys
from pathlib import Path

import onnxruntime
import pytest
import torch

from ssm_lm.cli import main
from ssm_lm.data.bpe import train_bpe
from ssm_lm.hub.graphs import StatesInAndOut
from ssm_lm.hub.onnx import write_graphs

sys.path.append(str(Path(__file__).parents[1] / "modeling"))  # tiny.py
from tiny import ENDLESS, SSD, prompt, tiny_model

EVERY_BLOCK = {"ssm": "s4d", "arch": ["ssm", "h3", "gated", "swiglu"], "num_hidden_layers": 1}
# what a test of minutes adds
KINDS = {
    "s4": {"ssm": "s4", "arch": ["ssm"]},
    "s5": {"ssm": "s5", "arch": ["ssm"]},
    "ssd": {"ssm": "ssd", "arch": SSD, "head_dim": 8, "selective_dt": True},
    "adaptive": {"ssm": "s4d", "arch": ["ssm"], "adaptive_cutoffs": [20]},
}


def some_states(graph, batch):
    """Of a text that has begun."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(state.shape, generator=generator) / 4 for state in graph.first_states(batch)]


def check_any_batch_and_length(model):
    graph = StatesInAndOut(model)
    with torch.no_grad():
        program = torch.export.export(
            graph, (prompt(7, batch=2), graph.first_states(2)), dynamic_shapes=graph.dynamic_shapes(length=True)
        ).module()
        for batch, length in ((1, 1), (3, 100)):
            ids, states = prompt(length, batch=batch, seed=length), some_states(graph, batch)
            torch.testing.assert_close(program(ids, states), graph(ids, states), rtol=1e-4, atol=1e-4)


def check_onnx(model, folder):
    write_graphs(model, folder)
    graph = StatesInAndOut(model, last_only=True)
    for name, length, batch in (("step", 1, 3), ("prefill", model.config.chunk_size, 1)):
        session = onnxruntime.InferenceSession(folder / f"{name}.onnx")
        ids, states = prompt(length, batch=batch, seed=length), some_states(graph, batch)
        names = [value.name for value in session.get_inputs()]
        assert names == ["input_ids", *graph.state_names()]
        given = dict(zip(names, [ids.numpy(), *(state.numpy() for state in states)], strict=True))
        found = [torch.from_numpy(value) for value in session.run(None, given)]
        with torch.no_grad():
            logits, after = graph(ids, states)
        torch.testing.assert_close(found, [logits, *after], rtol=1e-4, atol=1e-4)


def test_torch_export_for_any_batch_and_length():
    check_any_batch_and_length(tiny_model(**EVERY_BLOCK))


def test_torch_export_without_a_cache():
    model = tiny_model(num_hidden_layers=1)
    dims = {"input_ids": {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}, "use_cache": None}
    example = {"input_ids": prompt(7, batch=2), "use_cache": False}
    with torch.no_grad():
        exported = torch.export.export(model, (), example, dynamic_shapes=dims)
        for batch, length in ((1, 2), (3, 90)):
            ids = prompt(length, batch=batch, seed=1)
            found = exported.module()(input_ids=ids, use_cache=False).logits
            torch.testing.assert_close(found, model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.long
def test_onnx_is_the_model(tmp_path):
    check_onnx(tiny_model(**EVERY_BLOCK), tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_the_other_layers(kind, tmp_path):
    model = tiny_model(num_hidden_layers=1, **KINDS[kind])
    check_any_batch_and_length(model)
    check_onnx(model, tmp_path)


def test_the_verb_writes_a_folder_whose_page_runs(tmp_path, capsys, monkeypatch):
    tokenizer = train_bpe(["The function returns a list of the numbers that it was given.\n" * 9], 300)
    model = tiny_model(num_hidden_layers=1, ssm="ssd", arch=["gated"], vocab_size=300, chunk_size=3, **ENDLESS)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    assert main(["export", str(tmp_path / "model"), "--format", "onnx", "--output", str(tmp_path / "graphs")]) == 0
    code = re.search(r"```python\n(.*?)```", (tmp_path / "graphs" / "README.md").read_text(), re.DOTALL)[1]
    monkeypatch.chdir(tmp_path / "graphs")
    capsys.readouterr()
    exec(code, {})
    ids = torch.tensor([tokenizer("The function returns")["input_ids"]])
    assert ids.shape[1] % 3  # chunks, and steps
    mask = torch.ones_like(ids)
    text = model.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False, pad_token_id=0)[0]
    assert capsys.readouterr().out == tokenizer.decode(text, skip_special_tokens=True) + "\n"
    assert not json.loads((tmp_path / "graphs" / "tokenizer_config.json").read_text()).get("auto_map")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--license", "mit"], "--license"),
        (["--dtype", "bfloat16"], "--format onnx"),
        (["--max-shard-size", "1MB"], "--max-shard-size"),
    ],
)
def test_mistakes_are_one_line(arguments, named, tmp_path, capsys):
    for part in (train_bpe(["a b c"], 300), tiny_model(num_hidden_layers=1, arch=["ssm"], vocab_size=300)):
        part.save_pretrained(tmp_path / "model")
    output = tmp_path / "graphs"
    capsys.readouterr()
    assert main(["export", str(tmp_path / "model"), "--format", "onnx", "--output", str(output), *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"ssm-lm: {named}")
    assert said.count("\n") == 1
    assert not output.exists()
