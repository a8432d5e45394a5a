import errno
import json
import os
import signal
import subprocess
import sys

import datasets
import numpy as np
import pytest
from transformers import AutoTokenizer

from ssm_lm import cli
from ssm_lm.data.corpora import load_corpus
from ssm_lm.data.prepare import prepare
from ssm_lm.data.stream import TokenStream
from ssm_lm.errors import UserError


def contents(folder):
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(folder.rglob("*")) if path.is_file()}


def test_counts_are_those_of_a_naive_recount(folder, tmp_path):
    manifest = prepare(folder, "bpe:300", tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")
    for split, name in (("train", "train.txt"), ("validation", "valid.txt"), ("test", "test.txt")):
        text = (folder / name).read_bytes()
        expected = []
        for document in load_corpus(folder)[split]:
            expected += [*tokenizer.encode(document, add_special_tokens=False), tokenizer.eos_token_id]
        stream = TokenStream.open(tmp_path / "out", split)
        assert stream.tokens.tolist() == expected
        stream.verify()
        stream.check_vocabulary(len(tokenizer))
        info = manifest.splits[split]
        assert info.tokens == len(expected)
        assert info.documents == expected.count(tokenizer.eos_token_id)
        assert info.words == len(text.decode().split())
        assert info.lines == text.count(b"\n")
        assert info.bytes == len(text)
        assert tokenizer.decode(stream.tokens, skip_special_tokens=True) == text.decode()
    assert stream.manifest == manifest
    assert manifest.vocab_size == len(tokenizer)
    assert str(tmp_path) not in (tmp_path / "out" / "manifest.json").read_text()


def test_words(folder, tmp_path):
    prepare(folder, "words", tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")
    text = (folder / "valid.txt").read_text()
    words = [word for line in text.split("\n")[:-1] for word in [*line.split(), "<eos>"]]
    tokens = TokenStream.open(tmp_path / "out", "validation").tokens
    assert tokenizer.convert_ids_to_tokens(tokens.tolist()) == words


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [
        ("words", ("4810174d6c0f6a87", "e5a455d16f5c2538", "a41c25a1238c5b9c")),
        ("bpe:300", ("2669389f5a236385", "bc7947f9a993cacc", "420353cb4faaae50")),
    ],
)
def test_the_bytes_stay_the_same_in_later_versions(folder, tmp_path, tokenizer, expected):
    manifest = prepare(folder, tokenizer, tmp_path / "out")
    assert tuple(split.sha256[:16] for split in manifest.splits.values()) == expected


def test_large_vocabularies_take_four_bytes(tmp_path):
    lines = [" ".join(f"w{number}" for number in range(i, i + 1000)) + "\n" for i in range(0, 66_000, 1000)]
    (tmp_path / "train.txt").write_text("".join(lines))
    manifest = prepare(tmp_path / "train.txt", "words", tmp_path / "out")
    stream = TokenStream.open(tmp_path / "out", "train")
    assert (manifest.dtype, stream.tokens.dtype) == ("uint32", np.dtype("<u4"))
    assert manifest.vocab_size == 66_002
    assert int(stream.tokens.max()) == 66_000


def test_a_word_longer_than_a_piece_is_one_word(tmp_path):
    (tmp_path / "train.txt").write_text("a" * 2_500_000 + " b\n")
    manifest = prepare(tmp_path / "train.txt", "words", tmp_path / "out")
    assert (manifest.splits["train"].words, manifest.splits["train"].documents) == (2, 1)


def test_max_bytes_keeps_whole_documents(folder, tmp_path):
    documents = list(load_corpus(folder)["train"])
    limit = len("".join(documents[:4])) + 1
    manifest = prepare(folder, "bpe:300", tmp_path / "out", max_bytes=limit)
    assert manifest.splits["train"].documents == 4
    assert manifest.splits["train"].bytes == limit - 1
    assert manifest.splits["validation"].documents == 1


def test_wikitext_through_the_command_line(monkeypatch, tmp_path, capsys, articles):
    rows = [line if line.strip() else "" for line in "".join(articles).splitlines(keepends=True)]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_dict({"text": rows}))
    output = tmp_path / "out"
    argv = ["prepare", "--dataset", "wikitext-2", "--level", "word", "--tokenizer", "words", "--output", str(output)]
    assert cli.main(argv) == 0
    printed = capsys.readouterr()
    assert "tokens per" in printed.out
    assert printed.err == ""
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["splits"]["test"]["bytes"] == len("".join(articles))
    assert manifest["request"]["source"] == {"hub": "Salesforce/wikitext", "config": "wikitext-2-v1"}


def test_a_second_call_changes_nothing(folder, tmp_path, capsys, refused):
    output = tmp_path / "out"
    argv = ["prepare", "--dataset", folder, "--tokenizer", "bpe:300", "--output", output]
    assert cli.main([str(word) for word in argv]) == 0
    assert "done already" not in capsys.readouterr().out
    before = contents(output)
    assert cli.main([str(word) for word in argv]) == 0
    assert "done already" in capsys.readouterr().out
    assert "tokenizer bpe:300, not bpe:301" in refused(*argv, "--tokenizer", "bpe:301")
    assert "documents auto, not line" in refused(*argv, "--documents", "line")
    assert "max bytes None, not 9" in refused(*argv, "--max-bytes", "9")
    (folder / "valid.txt").write_text("other text\n")
    assert "another text under the same name" in refused(*argv)
    assert contents(output) == before


def test_the_tokenizer_of_one_corpus_for_another(folder, tmp_path, refused):
    first = prepare(folder, "bpe:300", tmp_path / "one")
    second = prepare(folder / "test.txt", tmp_path / "one" / "tokenizer", tmp_path / "two")
    assert second.tokenizer_sha256 == first.tokenizer_sha256
    assert second.tokenizer == "tokenizer"
    assert second.splits == {"test": first.splits["test"]}
    assert prepare(folder / "test.txt", tmp_path / "one" / "tokenizer", tmp_path / "two") == second


def test_what_prepare_did_not_make_stays(folder, tmp_path, refused):
    output = tmp_path / "out"
    output.mkdir()
    (output / "thesis.txt").write_text("mine")
    argv = ("prepare", "--dataset", folder, "--tokenizer", "bpe:300", "--output")
    assert "was not made by prepare" in refused(*argv, output)
    assert "is a file" in refused(*argv, output / "thesis.txt")
    assert (output / "thesis.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "out"]


def test_an_incomplete_folder_is_not_done(folder, tmp_path, refused):
    output = tmp_path / "out"
    prepare(folder, "bpe:300", output)
    with open(output / "train.bin", "r+b") as file:
        file.truncate(10)
    assert "train.bin: 10 bytes, where the manifest's" in refused(
        "prepare", "--dataset", folder, "--tokenizer", "bpe:300", "--output", output
    )


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_a_failed_prepare_leaves_nothing(folder, tmp_path, monkeypatch, error, capsys):
    def fail(*_):
        assert len(list(tmp_path.glob("out.partial/parts/000/000000.train.partial-*"))) == 1
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    argv = ["prepare", "--dataset", str(folder), "--tokenizer", "bpe:300", "--output", str(tmp_path / "out")]
    assert cli.main(argv) == (2 if isinstance(error, OSError) else 1)
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert ("No space left" if isinstance(error, OSError) else "interrupted") in message
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_a_killed_prepare_leaves_nothing_that_looks_finished(folder, tmp_path):
    program = (
        "import os, sys; from ssm_lm.data.prepare import prepare; from ssm_lm.data.work_folder import WorkFolder\n"
        "WorkFolder.publish = lambda *_: os.kill(os.getpid(), 9)\n"
        "prepare(sys.argv[1], 'bpe:300', sys.argv[2])"
    )
    output = tmp_path / "out"
    command = [sys.executable, "-c", program, str(folder), str(output)]
    assert subprocess.run(command, env=dict(os.environ), capture_output=True).returncode == -signal.SIGKILL
    assert not output.exists()
    with pytest.raises(UserError, match="no such folder"):
        TokenStream.open(output, "train")
    assert prepare(folder, "bpe:300", output).splits["train"].documents == 15


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--dataset", "wikitext2"], "did you mean wikitext-2?"),
        (["--dataset", "./missing.txt"], "./missing.txt: no such file"),
        (["--dataset", "{folder}", "--level", "word"], "--level word"),
        (["--dataset", "{folder}", "--level", "words"], "--level"),
        (["--dataset", "{folder}", "--documents", "page"], "--documents"),
        (["--dataset", "{folder}", "--max-bytes", "0"], "--max-bytes 0"),
        (["--dataset", "{folder}", "--max-bytes", "few"], "--max-bytes"),
        (["--dataset", "{folder}/picture.png"], "unknown kind of file"),
        (["--dataset", "{folder}/void"], "no file of a known kind"),
        (["--dataset", "{folder}/empty.txt"], "empty.txt: holds no text"),
        (["--dataset", "{folder}/short.txt"], "too short to be cut"),
        (["--dataset", "{folder}/latin.txt"], "latin.txt: not UTF-8 at byte 3"),
        (["--dataset", "{folder}/twice"], "wiki.test.raw and wiki.test.tokens are both the test split"),
        (["--dataset", "{folder}/empty_train.txt"], "holds no text"),
        (["--dataset", "{folder}/blank.txt", "--tokenizer", "bpe:300"], "the train split holds no text"),
        (["--dataset", "{folder}/rows.jsonl", "--text-field", "body"], "no field 'body', only text"),
        (["--dataset", "{folder}/valid.txt"], "no split 'train'; there are validation"),
        (["--tokenizer", "bpe:12"], "12: too small"),
        (["--tokenizer", "bpe:many"], "bpe:many: the size is not a number"),
        (["--tokenizer", "words:1"], "1: too small"),
        (["--tokenizer", "./missing"], "./missing: no such folder"),
        (["--tokenizer", "{folder}/void"], "no tokenizer.json"),
        (["--tokenizer", "{folder}/broken"], "cannot be loaded"),
        (["--tokenizer", "{folder}/train.txt"], "is a file"),
        (["--output", "{folder}/train.txt/x"], "cannot be written"),
    ],
)
def test_bad_input_is_refused_in_one_line(folder, tmp_path, refused, argv, message):
    for name in ("void", "twice", "broken"):
        (folder / name).mkdir()
    (folder / "picture.png").write_bytes(b"\x89PNG")
    (folder / "empty.txt").write_bytes(b"")
    (folder / "empty_train.txt").write_bytes(b"")
    (folder / "blank.txt").write_text("\n\n\n")
    (folder / "short.txt").write_text("a line\n")
    (folder / "latin.txt").write_bytes(b"abc\xe9\n" * 9)
    (folder / "rows.jsonl").write_text('{"text": "a"}\n' * 9)
    (folder / "broken" / "tokenizer.json").write_text("{")
    for suffix in ("raw", "tokens"):
        (folder / "twice" / f"wiki.test.{suffix}").write_text("a\n")
    defaults = {"--dataset": "{folder}/train.txt", "--tokenizer": "bpe:300", "--output": "{folder}/../out"}
    options = {**defaults, **dict(zip(argv[::2], argv[1::2], strict=True))}
    words = [word.format(folder=folder) for pair in options.items() for word in pair]
    assert message in refused("prepare", *words)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]
    assert not list(folder.rglob("*partial*"))


def test_no_network_is_one_line(monkeypatch, tmp_path, refused):
    def load_dataset(*_, **__):
        raise ConnectionError("Couldn't reach the Hub\nlong story")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    line = refused("prepare", "--dataset", "wikitext-103", "--tokenizer", "bpe:300", "--output", tmp_path / "out")
    assert "Salesforce/wikitext" in line
    assert "--dataset PATH" in line
    assert list(tmp_path.iterdir()) == []
