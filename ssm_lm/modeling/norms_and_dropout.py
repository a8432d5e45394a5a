"""The norm and the dropout of a config."""

import torch
from torch import nn

from .configuration_s4 import S4Config
from .kernel_limits import limit_of_rms_norm
from .ops import RMS_NORM, rms_norm


class RMSNorm(nn.RMSNorm):
    """Of x, or of x silu(gate), (..., C) each, in the dtype of x: where autocast leaves the weight in float32, torch
    has no fused kernel, and warns. Ours runs in training: it saves passes over many tokens and takes longer to launch,
    which is what a token of decoding waits for.
    """

    kernels = "auto"  # as in S4Config.kernels: whether the Triton kernel runs
    before_product = False  # whether a matrix product follows: the kernel then writes what autocast makes of y for it

    def forward(self, x, gate=None):
        dtypes, out = (x.dtype, self.weight.dtype), x.dtype
        if self.before_product and out == torch.float32 and torch.is_autocast_enabled(x.device.type):
            out = torch.get_autocast_dtype(x.device.type)
        trains = torch.is_grad_enabled() or self.training
        run_kernel = trains and RMS_NORM.runs_kernel(
            x,
            self.weight,
            unsupported=limit_of_rms_norm(*dtypes, x.shape[-1]),
            setting=self.kernels,
            problem=(*dtypes, out, x.shape[-1], gate is not None),
        )
        return rms_norm(x, self.weight, self.eps, gate, out if run_kernel else None, run_kernel)


def make_rms_norm(config: S4Config, channels: int, before_product: bool) -> RMSNorm:
    """before_product: see `RMSNorm`."""
    norm = RMSNorm(channels, eps=config.layer_norm_epsilon)
    norm.kernels, norm.before_product = config.kernels, before_product
    return norm


def make_norm(config: S4Config, before_product: bool = False) -> nn.Module:
    if config.norm == "rms":
        return make_rms_norm(config, config.hidden_size, before_product)
    return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)


class TiedDropout(nn.Dropout):
    """Drops a channel of (B, L, H) at every position of a sequence or at none."""

    def forward(self, x):
        return x * nn.functional.dropout(torch.ones_like(x[:, :1]), self.p, self.training)


def make_dropout(config: S4Config) -> nn.Module:
    return (TiedDropout if config.tie_dropout else nn.Dropout)(config.dropout)
