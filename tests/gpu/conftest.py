"""What a first day with a card asks. Each test runs twice: on a GPU at real sizes, where it is skipped without one, and
tiny on the CPU, where the twins run instead of the kernels, so that no test is read for the first time on that day.

    make gpu                      # these, self-checks, timings and a training: first_day.py
    make test TESTS=tests/gpu     # these alone
"""

from typing import NamedTuple

import pytest
import torch

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")]


class Place(NamedTuple):
    """Where a test runs, and how large: B sequences of L tokens, H channels, V words."""

    device: str
    B: int
    L: int
    H: int
    V: int

    @property
    def has_kernels(self) -> bool:
        return self.device == "cuda"


@pytest.fixture(
    params=[
        pytest.param(Place("cpu", 2, 70, 4, 50), id="tiny-on-the-cpu"),
        pytest.param(Place("cuda", 4, 4096, 512, 8192), id="gpu", marks=GPU),
    ]
)
def place(request) -> Place:
    torch.manual_seed(0)
    return request.param


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference over the largest expected value; NaN where either has one."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return ((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()


@pytest.fixture
def assert_close():
    def check(actual, expected, tolerance: float, name: str = "output") -> None:
        difference = relative(actual, expected)
        assert difference < tolerance, f"{name}: {difference:.1e}, tolerance {tolerance:.0e}"  # a NaN fails

    return check
