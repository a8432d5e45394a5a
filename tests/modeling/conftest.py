"""What tests of this folder leave as it was."""

import pytest
import torch


@pytest.fixture
def any_threads():
    """A test may give PyTorch, and the libraries with it, any number of threads."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
