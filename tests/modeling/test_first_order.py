"""A second derivative through an operation that has none is refused, and not left out."""

import pytest
import torch

from ssm_lm.modeling import native_operators
from ssm_lm.modeling.losses import linear_cross_entropy
from ssm_lm.modeling.ssm import S4, S4D, S5, SSD


def penalty(layer, **options):
    """The gradient in the input of how much the output changes with it."""
    torch.manual_seed(0)
    u = torch.randn(1, 12, getattr(layer, "input_size", 4), dtype=torch.float64, requires_grad=True)
    u = u.to(layer.log_dt.dtype)
    y, _ = layer(u, **options)
    (slope,) = torch.autograd.grad(y.square().sum(), u, create_graph=True)
    return torch.autograd.grad(slope.square().sum(), u)[0]


@pytest.mark.parametrize("kind", [S4, S4D, S5, SSD])
def test_layers(kind, monkeypatch):
    layer = kind(4, 8, chunk_size=4).double()
    expected = penalty(layer, mode="recurrent")
    if kind is SSD:  # plain PyTorch
        torch.testing.assert_close(penalty(layer, mode="chunk"), expected)
    else:
        with pytest.raises(RuntimeError, match="ChunkScan of ssm_lm has a first derivative alone"):
            penalty(layer, mode="chunk")
    monkeypatch.setattr(native_operators, "SMALLEST", 0)
    if layer.float().scans_in_c(torch.float32):
        with pytest.raises(RuntimeError, match="first derivative alone"):
            penalty(layer, mode="chunk")


def test_the_loss():
    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(16, 8, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.arange(4), chunk_size=2)
    torch.autograd.grad(loss, hidden, retain_graph=True)
    with pytest.raises(RuntimeError, match="ChunkedLinearCrossEntropy of ssm_lm has a first derivative alone"):
        torch.autograd.grad(loss, hidden, create_graph=True)
