"""Runs the tests of interpreted/ in a process of their own, for Triton decides at import whether to interpret."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).with_name("interpreted")
FILES = sorted(file.name for file in FOLDER.glob("test_*.py"))
# the others are of kernels alone, and so proofs: proof.py
MODELS = "test_models_in_kernels.py"
KERNELS = [name for name in FILES if name != MODELS]
SLOW_FILES = [name for name in KERNELS if "mark.slow" in (FOLDER / name).read_text()]

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def run(files: list[Path], marker: str) -> None:
    """The inner failures are the outer one's message."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "--tb=short", "--color=no", "-p", "no:cacheprovider"]
    result = subprocess.run(
        [*command, "-m", marker, *map(str, files)], env=environment, capture_output=True, text=True, check=False
    )
    if result.returncode:
        pytest.fail(f"{' '.join(f.name for f in files)}, interpreted:\n{result.stdout}{result.stderr}", pytrace=False)
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) >= len(files)  # none was lost on the way


SHARES = 5  # of about a minute each on an idle core, so that a busy one has them done within a test's time


@pytest.mark.proof
@pytest.mark.seconds(60)
@pytest.mark.parametrize("share", range(SHARES))
def test_interpreted(share):
    run([FOLDER / name for name in KERNELS[share::SHARES]], "not slow")


@pytest.mark.proof
@pytest.mark.long
@pytest.mark.seconds(70)
@pytest.mark.parametrize("name", SLOW_FILES)
def test_interpreted_slow(name):
    run([FOLDER / name], "slow")


@pytest.mark.seconds(30)
def test_models_interpreted():
    run([FOLDER / MODELS], "not slow")


@pytest.mark.long
@pytest.mark.seconds(70)
def test_models_interpreted_slow():
    run([FOLDER / MODELS], "slow")
