"""ZeRO 3: a model is made and loaded with a rank's part of it alone, and is the one that is made whole."""

import json

import forked
import pytest
from harness import REPO

WORKER = str(REPO / "tests" / "training" / "parts_worker.py")


def share(verb, folder, width, layers, at_least=0):
    """The most memory that a rank of two takes, of the model's size. The worker compares every number."""
    done = forked.run([WORKER, verb, str(folder), str(width), str(layers)], ranks=2)
    found = json.loads(done.stdout.splitlines()[-1])
    print(verb, found)
    assert found["bytes"] > at_least
    return found["share"]


@pytest.mark.slow
def test_a_model_is_made_and_loaded_in_parts(tmp_path):
    assert share("make", tmp_path, 512, 12) < 0.8
    assert share("load", tmp_path, 512, 12) < 0.8


@pytest.mark.long
@pytest.mark.seconds(80)
def test_no_rank_holds_all_of_a_model_of_300_million(tmp_path):
    assert share("make", tmp_path, 1024, 44, at_least=1.1e9) < 0.65
    assert share("load", tmp_path, 1024, 44) < 0.65
