"""The norm and the dropout of a config."""

import torch
from torch import nn

from .configuration_s4 import S4Config


class RMSNorm(nn.RMSNorm):
    """In the dtype of its input: where autocast leaves the weight in float32, torch has no fused kernel, and warns."""

    def forward(self, x):
        return nn.functional.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def make_norm(config: S4Config) -> nn.Module:
    norm = {"layer": nn.LayerNorm, "rms": RMSNorm}[config.norm]
    return norm(config.hidden_size, eps=config.layer_norm_epsilon)


class TiedDropout(nn.Dropout):
    """Drops a channel of (B, L, H) at every position of a sequence or at none."""

    def forward(self, x):
        return x * nn.functional.dropout(torch.ones_like(x[:, :1]), self.p, self.training)


def make_dropout(config: S4Config) -> nn.Module:
    return (TiedDropout if config.tie_dropout else nn.Dropout)(config.dropout)
