"""The tasks of recall are what they say: an answer is in the sequence, once, and nowhere else to be had."""

import numpy as np
import pytest

from ssm_lm.data.recall import IGNORED, RECALL_TASKS, Draws, recall


def examples(name: str, count: int = 200, split: str = "train"):
    made = RECALL_TASKS[name].splits[split]
    for index in range(count):
        example = made[index]
        yield example["input_ids"].numpy(), example["labels"].numpy()


@pytest.mark.parametrize("name", RECALL_TASKS)
def test_tokens_are_in_the_vocabulary_and_labels_are_asked_for(name):
    task = RECALL_TASKS[name]
    for tokens, labels in examples(name):
        assert len(tokens) == len(labels) == task.length
        assert tokens.min() >= 0
        assert tokens.max() < task.vocab_size
        asked = labels[labels != IGNORED]
        assert len(asked) == {"induction": 1, "mqar-64": 4, "mqar-256": 16, "selective-copying": 16}[name]
        assert labels[0] == IGNORED  # nothing comes before it


def test_induction_asks_for_what_came_after_the_special_token():
    places = []
    for tokens, labels in examples("induction"):
        first, last = np.flatnonzero(tokens == 20)
        assert last == 29
        assert labels[30] == tokens[first + 1]
        places.append(first)
    assert min(places) == 0
    assert max(places) == 27


@pytest.mark.parametrize(("name", "pairs"), [("mqar-64", 4), ("mqar-256", 16)])
def test_mqar_asks_for_the_value_of_each_key_once(name, pairs):
    for tokens, labels in examples(name):
        values = dict(zip(tokens[: 2 * pairs : 2].tolist(), tokens[1 : 2 * pairs : 2].tolist(), strict=True))
        assert len(values) == pairs
        assert max(values) < 512 <= min(values.values())
        places = np.flatnonzero(labels != IGNORED)
        assert places.min() > 2 * pairs
        assert {int(tokens[place - 1]): int(labels[place]) for place in places} == values


def test_queries_of_mqar_come_by_the_power_law():
    """The first of the gaps is drawn with the weight of Zoology's law; here that of each key's query."""
    found = [int(np.flatnonzero(recall(Draws(7, i), 64, 1)[1] != IGNORED)[0]) for i in range(4000)]
    gaps = (np.array(found) - 3) // 2
    weights = np.arange(1, 32) ** (0.01 - 1.0)
    counts = np.bincount(gaps, minlength=31) / len(gaps)
    assert np.abs(counts - weights / weights.sum()).max() < 0.03


def test_selective_copying_asks_for_the_content_in_its_order():
    for tokens, labels in examples("selective-copying"):
        content = tokens[tokens < 16]
        assert len(content) == 16
        assert (tokens[-17:] == 17).all()
        assert (labels[-16:] == content).all()
        assert (tokens[:-17][tokens[:-17] >= 16] == 16).all()


def test_an_example_is_a_function_of_split_and_number():
    tokens, _ = next(examples("mqar-64"))
    assert tokens[:10].tolist() == FIRST
    for split in ("validation", "test"):
        assert not np.array_equal(next(examples("mqar-64", split=split))[0], tokens)
    first, second = (tokens for tokens, _ in examples("mqar-64", 2))
    assert not np.array_equal(first, second)


FIRST = [27, 775, 309, 938, 78, 846, 172, 639, 27, 444]
