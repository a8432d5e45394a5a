"""An RMS norm, gated or not, in plain PyTorch: the twin of triton_rms_norm.py.

    y = w x' / sqrt(mean(x'^2) + eps),   x' = x or x silu(gate)          the mean over the C channels of a token

Source: Zhang and Sennrich, 1910.07467; with a gate it is what stands before the output of Mamba-2 (2405.21060).
"""

import torch
import torch.nn.functional as F


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    gate: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    with_input: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """x and gate (..., C), weight (C,) -> y of x's shape, in `dtype`; None: in that of x. with_input, without a gate:
    y, and x for what goes past.
    """
    gated = x if gate is None else x * F.silu(gate)
    y = F.rms_norm(gated, weight.shape, weight.to(x.dtype), eps)
    y = y if dtype is None else y.to(dtype)
    return (y, x) if with_input else y
