"""One thread a test process: the models are tiny, and the suite runs several processes on few cores."""

import os

import pytest

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_collection_modifyitems(items):
    """The slow tests first: two workers then end together, on short ones."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
AT_START = {name: os.environ.get(name) for name in LAUNCHER}


@pytest.fixture(autouse=True)
def no_group_of_ranks_is_left_behind():
    """`ssm-lm train` with DeepSpeed makes its process a group of one, by these variables. Called in the process of the
    tests, it would leave them to every process that a later test starts, which then meets at a port that is taken.
    """
    yield
    for name, value in AT_START.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
