"""ListOps: the grammar, the lengths, and answers that an evaluator of its own confirms."""

import itertools
import math
import statistics

import numpy as np
import pytest
import torch

from ssm_lm.data import listops
from ssm_lm.errors import UserError


@pytest.fixture(scope="module")
def sample():
    return list(itertools.islice(listops.examples(0), 120))


def evaluate(source: str) -> int:
    """From the text alone, with a stack and the statistics module; fails where the grammar is broken."""
    stack: list[list] = [[]]
    for word in source.split():
        if word.startswith("["):
            stack.append([word])
        elif word == "]":
            operator, *values = stack.pop()
            assert 2 <= len(values) <= 10
            assert stack
            stack[-1].append(
                {
                    "[MIN": lambda v: sorted(v)[0],
                    "[MAX": lambda v: sorted(v)[-1],
                    "[MED": lambda v: math.trunc(statistics.median(v)),
                    "[SM": lambda v: int(str(sum(v))[-1]),
                }[operator](values)
            )
            assert len(stack) <= 10  # an operator's depth is below 10
        else:
            assert word in list("0123456789")
            stack[-1].append(int(word))
    assert len(stack) == 1
    assert len(stack[0]) == 1
    return stack[0][0]


def test_every_answer_is_that_of_an_independent_evaluator(sample):
    assert [evaluate(source) for source, _ in sample] == [value for _, value in sample]


def test_lengths_and_spread(sample):
    lengths = [len(source.split()) for source, _ in sample]
    assert all(500 < length < 2000 for length in lengths)
    assert max(lengths) - min(lengths) > 800
    assert {value for _, value in sample} == set(range(10))
    words = " ".join(source for source, _ in sample).split()
    operators = [word for word in words if word.startswith("[")]
    assert operators.count("[MED") / len(operators) == pytest.approx(0.25, abs=0.03)
    assert words.count("7") / sum(word.isdecimal() for word in words) == pytest.approx(0.1, abs=0.01)
    depths = [max(itertools.accumulate(w.startswith("[") - (w == "]") for w in s.split())) for s, _ in sample]
    assert max(depths) == 9


@pytest.mark.parametrize(
    ("operator", "values", "expected"),
    [
        ("[MIN", [4, 2, 9], 2),
        ("[MAX", [4, 2, 9], 9),
        ("[SM", [7, 8, 9], 4),
        ("[MED", [9, 1, 4], 4),
        ("[MED", [9, 4, 1, 5], 4),  # 4.5, truncated
        ("[MED", [0, 9], 4),
    ],
)
def test_operators(operator, values, expected):
    assert listops.apply(operator, values) == expected


def test_a_seed_is_its_sequences(sample):
    assert list(itertools.islice(listops.examples(0), 3)) == sample[:3]
    assert next(listops.examples(1)) != sample[0]


def test_files(tmp_path):
    counts = {"train": 30, "validation": 5, "test": 4}
    folder = listops.write_listops(tmp_path / "listops", counts=counts)
    again = listops.write_listops(tmp_path / "again", counts=counts)
    other = listops.write_listops(tmp_path / "other", seed=1, counts=counts)
    seen = set()
    for split, (name, _) in listops.SPLITS.items():
        assert (folder / name).read_bytes() == (again / name).read_bytes()
        assert (folder / name).read_bytes() != (other / name).read_bytes()
        sequences, labels = listops.read_split(folder / name)
        assert len(sequences) == len(labels) == counts[split]
        for sequence, label in zip(sequences, labels, strict=True):
            text = " ".join(listops.TOKENS[token - 1] for token in sequence)
            assert evaluate(text) == label
            seen.add(text)
    assert len(seen) == 39  # no sequence is in two splits
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["again", "listops", "other"]
    with pytest.raises(UserError, match="not an empty folder"):
        listops.write_listops(folder)


def test_the_published_form_has_parentheses(tmp_path):
    path = tmp_path / "basic_val.tsv"
    path.write_text("Source\tTarget\n( ( ( [MAX 2 ) ( ( ( [MIN 4 ) 7 ) ] ) ) ] )\t4\n")
    sequences, labels = listops.read_split(path)
    words = [listops.TOKENS[token - 1] for token in sequences[0]]
    assert words == "[MAX 2 [MIN 4 7 ] ]".split()
    assert sequences[0].dtype == np.uint8
    assert labels.tolist() == [4]
    assert 0 < sequences[0].min() <= sequences[0].max() < listops.VOCAB_SIZE


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no ListOps file"),
        ("text\tlabel\n", "no ListOps file"),
        ("Source\tTarget\n[MAX 1 2 ]\n", "line 2"),
        ("Source\tTarget\n[MAX 1 2 ]\t2\n[AVG 1 2 ]\t1\n", "line 3"),
        ("Source\tTarget\n[MAX 1 2 ]\tx\n", "line 2"),
        ("Source\tTarget\n[MAX 1 2 ]\t12\n", "line 2"),
    ],
)
def test_other_files(tmp_path, text, message):
    path = tmp_path / "basic_train.tsv"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        listops.read_split(path)
    with pytest.raises(UserError, match="cannot be read"):
        listops.read_split(tmp_path / "nowhere.tsv")


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(listops, "SPLITS", {split: (name, 2) for split, (name, _) in listops.SPLITS.items()})
    assert listops.main(["--output", str(tmp_path / "out")]) == 0
    assert "2 train, 2 validation, 2 test" in capsys.readouterr().out
    assert listops.main(["--output", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_as_a_task(tmp_path):
    from ssm_lm.data.sequences import load_task

    folder = listops.write_listops(tmp_path / "listops", counts={"train": 4, "validation": 3, "test": 3})
    task = load_task(f"listops:{folder}")
    assert {split: len(examples) for split, examples in task.splits.items()} == {"train": 4, "validation": 3, "test": 3}
    assert task.model_keys() == {"num_labels": 10, "vocab_size": 16, "pad_token_id": 0}
    batch = task.collate([task.splits["train"][i] for i in range(4)])
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert torch.equal(batch["input_ids"] != 0, batch["attention_mask"].bool())
    text = " ".join(listops.TOKENS[i - 1] for i in batch["input_ids"][1].tolist() if i)
    assert evaluate(text) == batch["labels"][1]
