"""lm-evaluation-harness: its stock adapter runs an export, and ours carries the state."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from ssm_lm import S4Config, S4ForCausalLM
from ssm_lm.cli import main
from ssm_lm.data.bpe import train_bpe
from ssm_lm.errors import UserError
from ssm_lm.evaluation import harness
from ssm_lm.evaluation.harness import RecurrentLM, parse_model_args
from ssm_lm.evaluation.perplexity import full_context_nll
from ssm_lm.hub.export import export
from ssm_lm.loading.model import load_model
from ssm_lm.loading.tokenizer import load_tokenizer

TEXT = "the cat sat on the mat, the dog saw the cat\n"
DOCUMENTS = [TEXT * 12, "a dog", "", "on the mat the cat saw\n" * 5]
TASKS = {
    "local_rolling": """
        task: local_rolling
        output_type: loglikelihood_rolling
        doc_to_text: ""
        doc_to_target: "{{text}}"
        metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
    """,
    "local_choice": """
        task: local_choice
        output_type: multiple_choice
        doc_to_text: "{{question}}"
        doc_to_choice: ["cat", "dog sat on the mat", "mat"]
        doc_to_target: "{{label}}"
        metric_list: [{metric: acc}]
    """,
    "local_generate": """
        task: local_generate
        output_type: generate_until
        doc_to_text: "{{question}}"
        doc_to_target: "the cat"
        generation_kwargs: {until: ["\\n"], max_gen_toks: 6, do_sample: false}
        metric_list: [{metric: exact_match}]
    """,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An export, and a folder of task files with their data."""
    root = tmp_path_factory.mktemp("harness")
    torch.manual_seed(0)
    tokenizer = train_bpe([TEXT * 5], 300)
    config = S4Config(
        vocab_size=300,
        hidden_size=32,
        num_hidden_layers=2,
        state_size=8,
        initializer_range=0.3,
        eos_token_id=tokenizer.eos_token_id,
    )
    S4ForCausalLM(config).save_pretrained(root / "run")
    tokenizer.save_pretrained(root / "run")
    export(root / "run", root / "model")
    (root / "tasks").mkdir()
    rows = [{"text": text, "question": f"the {'big ' * i}", "label": i % 3} for i, text in enumerate(DOCUMENTS) if text]
    (root / "tasks" / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(root / "tasks" / "data.jsonl")}}}
    for name, text in TASKS.items():
        lines = "\n".join(line.removeprefix("        ") for line in text.strip("\n").splitlines())
        lines += "\n" + "\n".join(f"{key}: {json.dumps(value)}" for key, value in data.items()) + "\ntest_split: test\n"
        (root / "tasks" / f"{name}.yaml").write_text(lines)
    return root


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder / "model")


@pytest.fixture
def tokenizer(folder):
    return load_tokenizer(folder / "model")


def ask(kind, *arguments):
    return [Instance(request_type=kind, doc={}, arguments=args, idx=i) for i, args in enumerate(arguments)]


def rolling(adapter, documents=DOCUMENTS):
    return adapter.loglikelihood_rolling(ask("loglikelihood_rolling", *((text,) for text in documents)))


def long_forward(model, tokenizer, text):
    """log p of the document from one forward over the whole of it."""
    ids = torch.tensor([tokenizer.eos_token_id, *tokenizer(text)["input_ids"]])
    if len(ids) == 1:
        return 0.0
    with torch.no_grad():
        logits = model(ids[None, :-1], use_cache=False).logits[0].double()
    return -F.cross_entropy(logits, ids[1:], reduction="sum").item()


@pytest.mark.parametrize("window", [1, 7, 4096])
def test_rolling_carries_the_state(model, tokenizer, window):
    found = rolling(RecurrentLM(model, tokenizer, window=window))
    for text, value in zip(DOCUMENTS, found, strict=True):
        assert value == pytest.approx(long_forward(model, tokenizer, text), rel=1e-4, abs=1e-4)
        tokens = np.array(tokenizer(text)["input_ids"], dtype=np.int64)
        assert value == pytest.approx(-full_context_nll(model, tokens, tokenizer.eos_token_id), rel=1e-5)


def test_the_stock_adapter_does_not(model, tokenizer):
    """What the subclass is for: windows of 16 know nothing of each other."""
    cut = HFLM(pretrained=model, tokenizer=tokenizer, max_length=16, batch_size=4)
    whole = HFLM(pretrained=model, tokenizer=tokenizer, max_length=100_000, batch_size=4)
    carried = rolling(RecurrentLM(model, tokenizer))
    assert abs(rolling(cut)[0] - carried[0]) > 5e-3 * abs(carried[0])
    assert rolling(whole, DOCUMENTS[:2]) == pytest.approx(carried[:2], rel=1e-4)


def test_a_batch_of_different_lengths(model, tokenizer):
    pairs = [("the cat", " sat"), (TEXT * 4, "the dog saw"), ("", "a mat"), ("dog", " saw the cat on the mat")]
    found = RecurrentLM(model, tokenizer, batch_size=4).loglikelihood(ask("loglikelihood", *pairs))
    alone = RecurrentLM(model, tokenizer, batch_size=1).loglikelihood(ask("loglikelihood", *pairs))
    for (context, continuation), (value, greedy), (value_alone, greedy_alone) in zip(pairs, found, alone, strict=True):
        assert value == pytest.approx(value_alone, rel=1e-4)
        assert greedy == greedy_alone
        whole = long_forward(model, tokenizer, context + continuation)
        if not context:  # the prefix token is the context
            assert value == pytest.approx(whole, rel=1e-4)


def test_a_context_is_not_cut_short(model, tokenizer):
    """The stock adapter keeps the last 2,048 tokens, for no config of ours names a longest input."""
    long = (TEXT * 400 + "the", " dog saw")
    ids = tokenizer("".join(long))["input_ids"]
    assert len(ids) > 3000
    count = len(ids) - len(tokenizer(long[0])["input_ids"])
    with torch.no_grad():
        logits = model(torch.tensor([ids[:-1]]), use_cache=False).logits[0, -count:].double()
    expected = -F.cross_entropy(logits, torch.tensor(ids[-count:]), reduction="sum").item()
    ((value, _),) = RecurrentLM(model, tokenizer).loglikelihood(ask("loglikelihood", long))
    assert value == pytest.approx(expected, rel=1e-4)
    ((cut, _),) = RecurrentLM(model, tokenizer, max_length=8).loglikelihood(ask("loglikelihood", long))
    assert cut != pytest.approx(expected, rel=1e-3)


def test_generation_of_a_padded_batch(model, tokenizer):
    options = {"until": ["\n\n"], "max_gen_toks": 8, "do_sample": False}
    requests = ask("generate_until", ("the cat", options), (TEXT, options), ("a", options))
    together = RecurrentLM(model, tokenizer, batch_size=3).generate_until(requests)
    assert together == RecurrentLM(model, tokenizer, batch_size=1).generate_until(requests)
    ids = tokenizer("the cat", return_tensors="pt")
    plain = model.generate(**ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, ids["input_ids"].shape[1] :]
    assert together[0] == tokenizer.decode(plain, skip_special_tokens=True).split("\n\n")[0]


def test_a_tokenizer_without_special_tokens(model, tokenizer, monkeypatch):
    expected = rolling(RecurrentLM(model, tokenizer), [TEXT])
    eos = tokenizer.eos_token_id
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.bos_token = tokenizer.eos_token = None
    assert model.config.eos_token_id == eos
    assert rolling(RecurrentLM(model, tokenizer), [TEXT]) == expected  # the config knows it
    monkeypatch.setattr(model.config, "eos_token_id", None)
    monkeypatch.setattr(model.config, "bos_token_id", None)
    with pytest.raises(UserError, match="prefix_token_id=N"):
        rolling(RecurrentLM(model, tokenizer), [TEXT])
    assert rolling(RecurrentLM(model, tokenizer, prefix_token_id=eos), [TEXT]) == expected


def test_model_args():
    assert parse_model_args("max_length=64,prefix_token_id=3") == {"max_length": 64, "prefix_token_id": 3}
    assert parse_model_args(None) == {}
    for text, expected in (("pretrained=x", "unknown key 'pretrained'"), ("max_length=0", "max_length must be")):
        with pytest.raises(UserError, match=expected):
            parse_model_args(text)


def evaluate(folder, *arguments, expect=0):
    return main(["eval", str(folder / "model"), "--device", "cpu", *arguments]) == expect


def test_the_verb(folder, model, tokenizer, monkeypatch, capsys):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "datasets"))
    file = folder / "results.json"
    arguments = ["--include-path", str(folder / "tasks"), "--batch-size", "2", "--json", str(file)]
    assert evaluate(folder, "--tasks", ",".join(TASKS), *arguments)
    results = json.loads(file.read_text())
    assert results["tasks"].keys() == TASKS.keys()
    assert results["model"] == str(folder / "model")
    assert "state carried" in results["protocol"]
    documents = [text for text in DOCUMENTS if text]
    nll = -sum(long_forward(model, tokenizer, text) for text in documents)
    bits = nll / np.log(2) / sum(len(text.encode()) for text in documents)
    assert results["tasks"]["local_rolling"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-4)
    assert 0 <= results["tasks"]["local_choice"]["acc,none"] <= 1
    printed = capsys.readouterr().out
    assert "bits_per_byte" in printed
    assert printed.startswith("|")
    # results of an earlier evaluation are overwritten
    assert evaluate(folder, "--tasks", "local_choice", "--limit", "1", "--model-args", "max_length=64", *arguments)
    assert json.loads(file.read_text())["samples"]["local_choice"]["effective"] == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--tasks", "local_choice", "--include-path", "nowhere"], "no such folder"),
        (["--tasks", "local_choice", "--context", "64"], "--context belongs to --data"),
        (["--tasks", "local_choice", "--limit", "0"], "--limit 0"),
        (["--data", "x", "--limit", "3"], "--limit belongs to --tasks"),
        (["--data", "x", "--tasks", "y"], "not allowed with"),
        ([], "one of the arguments"),
    ],
)
def test_bad_arguments(folder, capsys, arguments, expected):
    capsys.readouterr()
    assert evaluate(folder, *arguments, expect=2)
    text = capsys.readouterr().err
    assert expected in text.splitlines()[-1]


def test_a_task_that_nobody_has(folder, monkeypatch, capsys):
    """It is looked for among lm_eval's own as well; reading all of those takes ten seconds, and is left out here."""
    asked = []

    class Tasks(harness._Tasks):
        def __init__(self, include_path, include_defaults):
            asked.append(include_defaults)
            super().__init__(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(harness, "_Tasks", Tasks)
    assert evaluate(folder, "--tasks", "no_such_task", expect=2)
    assert "no such task" in capsys.readouterr().err.splitlines()[-1]
    assert asked == [False, True]


def test_a_task_that_cannot_be_loaded(folder, tmp_path, capsys):
    (tmp_path / "broken.yaml").write_text(
        "task: broken\ndataset_path: json\ndataset_kwargs: {data_files: {test: nope}}\n"
    )
    assert evaluate(folder, "--tasks", "broken", "--include-path", str(tmp_path), expect=2)
    assert "--tasks broken: cannot be loaded" in capsys.readouterr().err.splitlines()[-1]


def test_without_lm_eval(folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval.utils", None)
    assert evaluate(folder, "--tasks", "local_choice", expect=2)
    assert "pip install 'ssm_lm[eval]'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.seconds(30)
def test_the_stock_command_runs_an_export(folder, model, tokenizer, tmp_path):
    """`lm_eval --model hf` in a process of its own, offline, with the export's own code."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    arguments = f"pretrained={folder / 'model'},trust_remote_code=True,dtype=float32,max_length=4096"
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", arguments, "--device", "cpu"]
    command += ["--tasks", ",".join(TASKS), "--include_path", str(folder / "tasks"), "--batch_size", "2"]
    command += ["--output_path", str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = (tmp_path / "out").rglob("results*.json")
    results = json.loads(file.read_text())["results"]
    assert results.keys() == TASKS.keys()
    documents = [text for text in DOCUMENTS if text]
    nll = -sum(long_forward(model, tokenizer, text) for text in documents)
    bits = nll / np.log(2) / sum(len(text.encode()) for text in documents)
    assert results["local_rolling"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-4)  # nothing was cut
