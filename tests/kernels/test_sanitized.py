"""Every kernel under a sanitizer that needs no GPU: no address out of bounds, no two programs that race.

What that shows, and what it does not: see sanitize.py.
"""

import importlib.util
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from ssm_lm.bench.compile import kernel_names


def beyond_tilelens() -> bool:
    """Triton 3.9 has another interface to its interpreter, which TileLens 3.1 does not know."""
    return tuple(map(int, version("triton").split(".")[:2])) >= (3, 9) and version("tilelens").startswith("3.1")


if any(importlib.util.find_spec(name) is None for name in ("triton", "tilelens")):
    pytest.skip("TileLens is missing", allow_module_level=True)
pytestmark = [
    pytest.mark.long,
    pytest.mark.proof,
    pytest.mark.skipif(beyond_tilelens(), reason="TileLens 3.1 does not know Triton 3.9"),
]


def sanitize(name: str) -> dict:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("sanitize.py")), name]
    result = subprocess.run(
        command, env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.seconds(40)
@pytest.mark.parametrize("name", kernel_names())
def test_no_kernel_leaves_its_tensors_or_races(name):
    report = sanitize(name)
    assert report["programs"]
    # more than one program of every kernel, or there is nothing to race with
    assert all(count > 1 for count in report["programs"].values()), report["programs"]
    assert not any(report["bounds"].values()), report["bounds"]
    assert not any(report["races"].values()), report["races"]


def test_what_is_wrong_is_found():
    report = sanitize("broken")
    assert "tl.load(x + i)" in str(report["bounds"].pop("unmasked_load_kernel"))
    assert "tl.store(y + i, 0.0)" in str(report["bounds"].pop("unmasked_last_program_kernel"))
    assert not any(report["bounds"].values())
    for kernel, message in {
        "overlapping_store_kernel": "two programs store",
        "neighbour_kernel": "reads what another one stores",
        "read_back_kernel": "reads back",
    }.items():
        assert message in str(report["races"][kernel])
