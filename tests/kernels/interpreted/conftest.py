"""Tests that run kernels in Triton's interpreter, on the CPU. Triton decides at import, so they have a process of their
own, with TRITON_INTERPRET=1: test_kernels_interpreted.py starts it, and so does, by hand,

    TRITON_INTERPRET=1 python -m pytest tests/kernels/interpreted
"""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    import interpreter  # noqa: F401  repairs Triton's interpreter
else:
    collect_ignore_glob = ["*"]


@pytest.fixture(autouse=True)
def poisoned():
    """Every torch.empty holds NaN: an element that a kernel reads unwritten, or leaves unwritten, is seen."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills uninitialised memory
    yield
    torch.use_deterministic_algorithms(False)
