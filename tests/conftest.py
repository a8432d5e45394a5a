"""One thread a test process: the models are tiny, and the suite runs several processes on few cores."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_collection_modifyitems(items):
    """The slow tests first: two workers then end together, on short ones."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
