import sys
from pathlib import Path

import pytest
from hosts import TwoHosts, why_no_two_hosts

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))  # harness.py


@pytest.fixture(scope="module")
def two_hosts():
    """Two hosts of this module's own; everything that runs there ends with it."""
    if reason := why_no_two_hosts():
        pytest.skip(reason)
    with TwoHosts() as hosts:
        yield hosts


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder written by the real `ssm-lm prepare`."""
    from harness import made_up_text

    from ssm_lm.cli import main

    folder = tmp_path_factory.mktemp("corpus")
    for split, words, seed in (("train", 3000, 0), ("valid", 300, 1), ("test", 300, 2)):
        (folder / f"{split}.txt").write_text(made_up_text(words, seed))
    assert main(["prepare", "--dataset", str(folder), "--tokenizer", "words", "--output", str(folder / "data")]) == 0
    return folder / "data"
