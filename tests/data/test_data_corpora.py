import hashlib
import os
import subprocess
import sys

import datasets
import pytest

from ssm_lm.data import builtin
from ssm_lm.data.corpora import SPLITS, load_corpus
from ssm_lm.errors import UserError


def test_folder_with_named_splits(folder, articles):
    corpus = load_corpus(folder)
    assert {split: len(list(corpus[split])) for split in corpus.splits} == {"train": 15, "validation": 1, "test": 1}
    assert "".join(corpus["train"]) == (folder / "train.txt").read_text()
    assert list(corpus["train"]) == list(corpus["train"])
    assert corpus.name == "corpus"
    digest = hashlib.sha256((folder / "valid.txt").read_bytes()).hexdigest()
    assert corpus.identity()["valid.txt"] == {"bytes": len(articles[1]), "sha256": digest}
    with pytest.raises(UserError, match="no split 'dev'; there are train, validation, test"):
        corpus["dev"]


def test_names_of_splits(tmp_path):
    names = ["wiki.valid.tokens", "dev/a.tokens", "train-00001-of-2.txt", "train-00002-of-2.txt", "testimony.md"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{name}\n")
    corpus = load_corpus(tmp_path)
    assert list(corpus.splits) == ["train", "validation"]
    assert list(corpus["train"]) == [f"{name}\n" for name in names[2:4]]
    assert corpus.left_out == ("testimony.md",)
    (tmp_path / "train_and_test.txt").write_text("x")
    with pytest.raises(UserError, match="test and train"):
        load_corpus(tmp_path)


@pytest.mark.parametrize(("count", "held_out"), [(3, 1), (20, 1), (100, 5)])
def test_text_without_splits_is_cut_between_documents(tmp_path, count, held_out):
    lines = [f"line {number}\n" for number in range(count)]
    path = tmp_path / "notes.txt"
    path.write_text("".join(lines))
    corpus = load_corpus(path, documents="line")
    assert list(corpus["validation"]) == lines[-held_out:]
    assert list(corpus["test"]) == lines[-2 * held_out : -held_out]
    assert list(corpus["train"]) == lines[: -2 * held_out]


def test_one_document_is_cut_between_lines(tmp_path):
    lines = [f"line {number}\n" for number in range(40)]
    path = tmp_path / "notes.txt"
    path.write_text("".join(lines))
    corpus = load_corpus(path)
    parts = [list(corpus[split]) for split in ("train", "test", "validation")]
    assert parts == [["".join(lines[:36])], ["".join(lines[36:38])], ["".join(lines[38:])]]


@pytest.mark.parametrize("level", [None, "raw", "word"])
@pytest.mark.parametrize("name", ["wikitext-2", "wikitext-103"])
def test_wikitext_rows_become_articles(monkeypatch, articles, name, level):
    asked = []

    def load_dataset(hub_id, config, split):
        asked.append((hub_id, config, split))
        lines = "".join(articles).splitlines(keepends=True)
        return datasets.Dataset.from_dict({"text": [line if line.strip() else "" for line in lines]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    corpus = load_corpus(name, level=level)
    assert asked == []
    found = list(corpus["validation"])
    assert "".join(found) == "".join(articles)
    assert [article.split()[:3] for article in found] == [["=", name, "="] for name in ("Ada", "Bo", "Cy")]
    assert asked == [("Salesforce/wikitext", f"{name}-v1" if level == "word" else f"{name}-raw-v1", "validation")]


@pytest.mark.slow
def test_builtin_is_the_same_in_every_process(monkeypatch):
    """Of two small packages, for the whole takes 12 seconds; another hash seed would show an unordered set."""
    program = (
        "import hashlib; from ssm_lm.data import builtin; builtin.DISTRIBUTIONS = ('rich', 'packaging')\n"
        "for group in builtin._splits().values():\n"
        "    print(hashlib.sha256('\\0'.join(group).encode()).hexdigest())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    there = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    monkeypatch.setattr(builtin, "DISTRIBUTIONS", ("rich", "packaging"))
    here = [hashlib.sha256("\0".join(group).encode()).hexdigest() for group in builtin._splits.__wrapped__().values()]
    assert there.stdout.split() == here
    assert len(set(here)) == 3


@pytest.mark.long
def test_builtin_is_large_distinct_prose():
    groups = {split: list(load_corpus("builtin")[split]) for split in SPLITS}
    everything = [document for group in groups.values() for document in group]
    size = sum(len(document.encode()) for document in everything)
    assert 4e6 < size < 20e6
    assert len(everything) == len(set(everything))
    assert min(map(len, everything)) >= builtin.MINIMUM_CHARACTERS
    assert 0.88 < len(groups["train"]) / len(everything) < 0.96
    assert any(
        "Assert statements are a convenient way to insert debugging assertions" in document for document in everything
    )
    assert any("Return evenly spaced numbers over a specified interval" in document for document in everything)
    assert not any("\0" in document for document in everything)
    assert builtin.identity()["numpy"]


def test_builtin_ignores_what_else_is_installed():
    assert "scipy" not in builtin.identity()
    assert "pytest" not in builtin.identity()


def test_docstrings_are_read_from_source_without_running_it(tmp_path):
    prose = "A sentence that says what it does, again and again. " * 10 + "The end."
    source = tmp_path / "module.py"
    source.write_text(
        f'"""{prose}"""\nraise SystemExit\nclass A:\n    def f(self):\n        """{prose}2"""\n    x = "{prose}"\n'
    )
    assert list(builtin._docstrings(source)) == [prose, prose + "2"]
    source.write_text("not python at all")
    assert list(builtin._docstrings(source)) == []
