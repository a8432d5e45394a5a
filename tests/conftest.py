"""One thread a test process: the models are tiny, and the suite runs several processes on few cores."""

import gc
import itertools
import os

import pytest

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
gc.set_threshold(50_000)  # for cycles Python looks a seventieth as often; a tenth of the time


SLOW = 7  # seconds that a slow test takes where no mark says more: seconds(number)


def seconds_of(item) -> int:
    """About how long a test takes; 0 for a fast one."""
    said = item.get_closest_marker("seconds")
    return said.args[0] if said else SLOW * any(item.iter_markers("slow"))


@pytest.hookimpl(trylast=True)  # of the tests that are left
def pytest_collection_modifyitems(items):
    """The slow tests first, dealt out to the workers by files, the longest first: then the workers end together.

    `--dist worksteal` gives each worker one stretch of the list, and who is done takes from the end of another's.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    files = {}
    for item in items:
        if seconds_of(item):
            files.setdefault(item.path, []).append(item)
    stretches, busy = [[] for _ in range(workers)], [0] * workers
    for file in sorted(files.values(), key=lambda file: -sum(map(seconds_of, file))):
        worker = busy.index(min(busy))
        busy[worker] += sum(map(seconds_of, file))
        stretches[worker] += file
    left, fast = len(items), (item for item in list(items) if not seconds_of(item))
    for number, stretch in enumerate(stretches):
        size = left // (workers - number)
        left -= size
        stretch += itertools.islice(fast, max(0, size - len(stretch)))
    items[:] = [*itertools.chain(*stretches), *fast]


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
