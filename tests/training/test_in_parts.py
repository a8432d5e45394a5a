"""ZeRO 3: a model is made and loaded with a rank's part of it alone, and is the one that is made whole."""

import json

import forked
import pytest
from harness import REPO

WORKER = str(REPO / "tests" / "training" / "parts_worker.py")


@pytest.mark.slow
def test_a_model_is_made_and_loaded_in_parts(tmp_path):
    """The worker compares every number. At this size (82 MB) loading still takes more for itself than for the model."""
    done = forked.run([WORKER, str(tmp_path), "512", "12"], ranks=2)
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert found["built"] < 0.8


@pytest.mark.long
def test_no_rank_makes_all_of_a_model_of_300_million(tmp_path):
    found = json.loads(forked.run([WORKER, str(tmp_path), "1024", "44"], ranks=2).stdout.splitlines()[-1])
    print(found)
    assert found["bytes"] > 1.1e9
    assert found["built"] < 0.65
