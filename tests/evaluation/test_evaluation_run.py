"""`ssm-lm eval` from the command line down: the numbers of the JSON file, their units, and what it refuses."""

import json
import math
import re

import pytest
import torch

from ssm_lm import S4Config, S4ForCausalLM
from ssm_lm.cli import main
from ssm_lm.data.prepare import prepare
from ssm_lm.data.stream import TokenStream
from ssm_lm.data.tokenizer import load_tokenizer
from ssm_lm.evaluation.evaluate import perplexity

TEXTS = {
    "train": "a cat sat on a mat\nthe dog saw the cat\n" * 40,
    "valid": "the cat saw a mat\n" * 10,
    "test": "a dog sat\n\non the mat, the mât\n" * 25,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A prepared folder, its text, and a model folder with the same tokenizer."""
    root = tmp_path_factory.mktemp("eval")
    (root / "text").mkdir()
    for split, text in TEXTS.items():
        (root / "text" / f"{split}.txt").write_text(text, encoding="utf-8")
    prepare(root / "text", "bpe:300", root / "data")
    tokenizer = load_tokenizer(str(root / "data" / "tokenizer"))
    torch.manual_seed(0)
    config = S4Config(
        vocab_size=300, hidden_size=16, num_hidden_layers=1, state_size=4, eos_token_id=tokenizer.eos_token_id
    )
    S4ForCausalLM(config).save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    return root


def evaluate(folders, *arguments, model="model", data="data", expect=0):
    file = folders / "results.json"
    file.unlink(missing_ok=True)
    command = [
        "eval",
        "--device",
        "cpu",
        str(folders / model),
        "--data",
        str(folders / data),
        "--json",
        str(file),
        *arguments,
    ]
    assert main(command) == expect
    return json.loads(file.read_text()) if file.exists() else None


def test_numbers_and_units(folders, capsys):
    results = evaluate(folders)
    text = TEXTS["test"]
    assert results["words"] == len(text.split())
    assert results["lines"] == text.count("\n")
    assert results["bytes"] == len(text.encode())
    assert results["tokens"] == len(TokenStream.open(folders / "data", "test").tokens)
    nll = results["nll"]
    assert results["token_perplexity"] == pytest.approx(math.exp(nll / results["tokens"]))
    assert results["word_perplexity"] == pytest.approx(math.exp(nll / results["words"]))
    both = results["words"] + results["lines"]
    assert results["word_perplexity_with_line_ends"] == pytest.approx(math.exp(nll / both))
    assert results["bits_per_byte"] == pytest.approx(nll / math.log(2) / results["bytes"])
    assert results["protocol"] == "full context, state carried"
    assert results["dataset"] == "text"
    assert (results["split"], results["model"]) == ("test", str(folders / "model"))
    # near 300 for an untrained model; the words of the train split are known to the unigram model
    assert 200 < results["token_perplexity"] < 400
    assert 1 < results["unigram_perplexity"] < 100
    printed = capsys.readouterr().out
    assert f"{results['word_perplexity']:,.4f}" in printed
    assert f"{results['unigram_perplexity']:,.4f}" in printed
    assert f"{results['words']:,} words" in printed


def test_recalled_tokens_and_the_others_are_all(folders, capsys):
    """With a number, without one, and what is printed of it; a context of one token has seen no bigram."""
    for arguments, at_most in ((("--recall", "1000000"), 1_000_000), (("--recall",), 10)):
        results = evaluate(folders, "--context", "16", *arguments)
        recalled, other = results["recall"]["recalled"], results["recall"]["other"]
        assert results["recall"]["at_most"] == at_most
        assert recalled["tokens"] + other["tokens"] == results["tokens"]
        assert recalled["nll"] + other["nll"] == pytest.approx(results["nll"])
        assert f"{other['tokens']:,} tokens" in capsys.readouterr().out
    assert evaluate(folders, "--context", "1", "--recall", "1000000")["recall"]["recalled"]["tokens"] == 0
    assert "--recall" in refused(capsys, folders, "--recall", "-1")


def test_windows(folders):
    results = evaluate(folders, "--context", "16", "--batch-size", "3")
    assert results["protocol"] == "non-overlapping windows of 16"
    assert results["nll"] == pytest.approx(evaluate(folders, "--context", "16")["nll"], rel=1e-6)
    carried = evaluate(folders)["nll"]
    assert carried == pytest.approx(evaluate(folders, "--window", "50")["nll"], rel=1e-6)
    assert abs(carried - results["nll"]) > 1e-6 * carried


def test_several_contexts_in_one_call(folders, capsys):
    """Each is what a call of its own gives; the longest stands in full."""
    several, full = evaluate(folders, "--context", "full,16,8"), evaluate(folders)
    assert [row["context"] for row in several["contexts"]] == [8, 16, None]
    assert several["contexts"][1]["nll"] == evaluate(folders, "--context", "16")["nll"]
    assert several["contexts"][2]["nll"] == several["nll"] == full["nll"]
    assert [row["context"] for row in full["contexts"]] == [None]
    assert "full, carried" in capsys.readouterr().out


def test_text_is_read_with_the_models_tokenizer(folders):
    results, expected = evaluate(folders, data="text"), evaluate(folders)
    for key in ("tokens", "words", "lines", "bytes", "nll", "unigram_perplexity"):
        assert results[key] == pytest.approx(expected[key], rel=1e-9), key


def test_splits(folders, capsys):
    assert evaluate(folders, "--split", "validation")["lines"] == 10
    (folders / "only").mkdir()
    (folders / "only" / "test.txt").write_text("a cat\n" * 9)
    results = evaluate(folders, data="only")
    assert results["lines"] == 9
    assert results["unigram_perplexity"] is None
    capsys.readouterr()
    evaluate(folders, "--split", "train", data="only", expect=2)
    assert "no split 'train'" in capsys.readouterr().err


def refused(capsys, folders, *arguments, **kwargs):
    capsys.readouterr()
    assert evaluate(folders, *arguments, expect=2, **kwargs) is None
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_another_tokenizer(folders, capsys):
    prepare(folders / "text", "bpe:265", folders / "other")
    assert "another tokenizer" in refused(capsys, folders, data="other")
    prepare(folders / "text", "words", folders / "words")
    assert "another tokenizer" in refused(capsys, folders, data="words")


def test_a_model_without_a_tokenizer(folders, capsys):
    S4ForCausalLM(S4Config(vocab_size=300, hidden_size=16, num_hidden_layers=1)).save_pretrained(folders / "bare")
    assert evaluate(folders, model="bare")["tokens"] > 0
    assert "no tokenizer" in refused(capsys, folders, model="bare", data="text")
    S4ForCausalLM(S4Config(vocab_size=200, hidden_size=16, num_hidden_layers=1)).save_pretrained(folders / "small")
    assert "only 200" in refused(capsys, folders, model="small")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--context", "half"),
        ("--context", "0"),
        ("--context", "8,half"),
        ("--window", "0"),
        ("--batch-size", "-1"),
        ("--device", "abacus"),
    ],
)
def test_bad_arguments(folders, capsys, arguments):
    assert arguments[0] in refused(capsys, folders, *arguments)


def test_bad_data(folders, capsys):
    assert "no such file or folder" in refused(capsys, folders, data="nowhere/at-all")


def test_json_that_cannot_be_written_is_refused_before_the_model_is_read(folders, capsys, monkeypatch):
    monkeypatch.setattr("ssm_lm.evaluation.evaluate.load_model", lambda *args: pytest.fail("the model was loaded"))
    mine = folders / "mine.json"
    mine.write_text('{"precious": 1}')
    for file, expected in ((folders / "none" / "x.json", "does not exist"), (folders, "is a folder"), (mine, "exists")):
        assert main(["eval", str(folders / "model"), "--data", str(folders / "data"), "--json", str(file)]) == 2
        assert expected in capsys.readouterr().err
    assert mine.read_text() == '{"precious": 1}'


def test_results_of_an_earlier_evaluation_are_replaced(folders):
    file = folders / "again.json"
    for split in ("test", "validation"):
        command = ["eval", "--device", "cpu", str(folders / "model"), "--data", str(folders / "data"), "--split", split]
        assert main([*command, "--json", str(file)]) == 0
    assert json.loads(file.read_text())["split"] == "validation"
    assert not list(folders.glob("*.partial-*"))


def test_a_model_that_diverged(folders, capsys):
    model = S4ForCausalLM(S4Config(vocab_size=300, hidden_size=16, num_hidden_layers=1))
    model.model.norm.weight.data.fill_(float("nan"))
    model.save_pretrained(folders / "nan")
    assert "is nan" in refused(capsys, folders, model="nan")


def test_perplexity_without_a_count_is_none():
    assert perplexity(10.0, 0) is None
    assert perplexity(1e6, 1) is None
    assert perplexity(2.0, 2) == pytest.approx(math.e)


def test_the_picture_shows_the_perplexity_by_context(folders, capsys):
    file = folders / "contexts.svg"
    results = evaluate(folders, "--context", "4,16,full", "--plot", str(file))
    assert len(results["contexts"]) == 3
    drawn = file.read_text()
    assert "perplexity by context" in drawn
    assert {"4", "16"} <= set(re.findall(r">(\d+)</text>", drawn))
    assert str(file) in capsys.readouterr().out
    command = ["eval", str(folders / "model"), "--data", str(folders / "data"), "--plot"]
    for wrong, said in (("x.jpg", "ends in .png"), (str(folders / "none" / "x.png"), "does not exist")):
        assert main([*command, wrong]) == 2
        assert said in capsys.readouterr().err
