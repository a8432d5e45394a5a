"""The activations that a kernel can apply to what it computes, on its way out, and their derivatives."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import GELUActivation, LinearActivation, SiLUActivation


class Activation(NamedTuple):
    function: Callable  # y -> f(y)
    backward: Callable  # gradient of f(y), y -> gradient of y


def _identity(y: torch.Tensor) -> torch.Tensor:
    return y


# by the names that triton_step.activate knows
ACTIVATIONS = {
    "identity": Activation(_identity, lambda gradient, y: gradient),
    "gelu": Activation(F.gelu, torch.ops.aten.gelu_backward),
    "silu": Activation(F.silu, torch.ops.aten.silu_backward),
}

# the modules that compute them
FUSED_ACTIVATIONS = {
    type(None): "identity",
    nn.Identity: "identity",
    LinearActivation: "identity",
    GELUActivation: "gelu",
    nn.SiLU: "silu",
    SiLUActivation: "silu",
}
