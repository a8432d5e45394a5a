"""Cutting a sequence in two and handing the state over changes nothing, wherever the cut is."""

import pytest
import torch

from ssm_lm.modeling.ssm import S4, S4D


def worst_split(layer, length, mode, every=1):
    """Largest relative difference, over every `every`-th cut, of outputs and final state from those of the whole."""
    u = torch.randn(2, length, layer.hidden_size, dtype=torch.float64)
    start = torch.randn(2, layer.hidden_size, layer.state_size, dtype=torch.float64)
    worst = 0.0
    with torch.no_grad():
        whole, final = layer(u, mode=mode, initial_state=start)
        for cut in range(0, length + 1, every):
            first, state = layer(u[:, :cut], mode=mode, initial_state=start)
            second, last = layer(u[:, cut:], mode=mode, initial_state=state)
            y = torch.cat([first, second], 1)
            error = torch.maximum((y - whole).abs().max() / whole.abs().max(), (last - final).abs().max())
            worst = max(worst, error.item())
    return worst


@pytest.mark.parametrize("length", [1, 7, 64, 100])
@pytest.mark.parametrize("mode", ["chunk", "fft", "recurrent"])
@pytest.mark.parametrize("cls", [S4, S4D])
def test_every_split(cls, mode, length):
    torch.manual_seed(0)
    assert worst_split(cls(2, 16).double(), length, mode) < 1e-9


@pytest.mark.long
@pytest.mark.parametrize(("mode", "every"), [("chunk", 1), ("fft", 19), ("recurrent", 97)])
@pytest.mark.parametrize("cls", [S4, S4D])
def test_splits_of_a_thousand(cls, mode, every):
    torch.manual_seed(0)
    assert worst_split(cls(1, 8).double(), 1000, mode, every) < 1e-9
