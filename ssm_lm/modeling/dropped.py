"""Dropout with what stands beside it in a sublayer, in plain PyTorch: the twins of triton_dropout.py.

    y = m act(x)                      after a state space
    y = r + m glu(x + b)              at the end of its sublayer, r what went past it
    y = r + m x                       at the end of another
    y = m silu(a) b                   within swiglu

m is 0 with probability p, else 1 / (1 - p). Source: Srivastava et al., 2014; glu: Dauphin et al., 1612.08083; swiglu:
Shazeer, 2002.05202.
"""

import torch
import torch.nn.functional as F

from .activations import ACTIVATIONS


def drop_activated(x: torch.Tensor, activation: str, factors: torch.Tensor | None = None) -> torch.Tensor:
    """m act(x) of x's shape; activation: one of ACTIVATIONS; factors: m, None for ones."""
    y = ACTIVATIONS[activation].function(x)
    return y if factors is None else y * factors


def drop_gated(
    residual: torch.Tensor, x: torch.Tensor, bias: torch.Tensor, factors: torch.Tensor | None = None
) -> torch.Tensor:
    """residual + m glu(x + bias): residual (..., C), x (..., 2 C), bias (2 C,); factors: m, None for ones."""
    y = F.glu(x + bias, -1)
    return residual + (y if factors is None else y * factors)


def drop_added(residual: torch.Tensor, x: torch.Tensor, factors: torch.Tensor | None = None) -> torch.Tensor:
    """residual + m x, of one shape; factors: m, None for ones."""
    return residual + (x if factors is None else x * factors)


def drop_swiglu(gate: torch.Tensor, up: torch.Tensor, factors: torch.Tensor | None = None) -> torch.Tensor:
    """m silu(gate) up, of one shape; factors: m, None for ones."""
    y = F.silu(gate) * up
    return y if factors is None else y * factors
