"""A layer norm before a residual connection, in plain PyTorch: the twin of triton_layer_norm.py.

    y = (x - mean(x)) / sqrt(var(x) + eps) w + b              over the C channels of a token

Source: Ba, Kiros, Hinton, 1607.06450.
"""

import torch
import torch.nn.functional as F


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """x (..., C), weight and bias (C,) -> y of x's shape, in `dtype`; None: in that of x. And x, for what goes past."""
    y = F.layer_norm(x, weight.shape, weight.to(x.dtype), bias.to(x.dtype), eps)
    return y if dtype is None else y.to(dtype), x
