"""The norm and the dropout of a config, each with what one launch of a kernel can do beside it."""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from .activations import FUSED_ACTIVATIONS
from .configuration_s4 import S4Config
from .execution import as_autocast_dtype
from .kernel_limits import limit_of_dropout, limit_of_rms_norm, turns_rows
from .ops import (
    DROPOUT,
    LAYER_NORM,
    RMS_NORM,
    drop_activated,
    drop_added,
    drop_gated,
    drop_swiglu,
    layer_norm,
    rms_norm,
)


class RMSNorm(nn.RMSNorm):
    """Of x, or of x silu(gate), (..., C) each, in the dtype of x: where autocast leaves the weight in float32, torch
    has no fused kernel, and warns. Ours runs in training: it saves passes over many tokens and takes longer to launch,
    which is what a token of decoding waits for.
    """

    kernels = "auto"  # as in S4Config.kernels: whether the Triton kernel runs
    before_product = False  # whether a matrix product follows: the kernel then writes what autocast makes of y for it

    def forward(self, x, gate=None, with_input=False):
        """y; with_input: y, and x to go past the sublayer, of this x and not of the first: both gradients then meet in
        the norm's backward.
        """
        dtypes, out = (x.dtype, self.weight.dtype), x.dtype
        if self.before_product and out == torch.float32 and torch.is_autocast_enabled(x.device.type):
            out = torch.get_autocast_dtype(x.device.type)
        trains = torch.is_grad_enabled() or self.training
        run_kernel = trains and RMS_NORM.runs_kernel(
            x,
            self.weight,
            unsupported=limit_of_rms_norm(*dtypes, x.shape[-1]),
            setting=self.kernels,
            problem=(*dtypes, out, x.shape[-1], gate is not None, with_input),
        )
        return rms_norm(x, self.weight, self.eps, gate, out if run_kernel else None, run_kernel, with_input)


def make_rms_norm(config: S4Config, channels: int, before_product: bool) -> RMSNorm:
    """before_product: see `RMSNorm`."""
    norm = RMSNorm(channels, eps=config.layer_norm_epsilon)
    norm.kernels, norm.before_product = config.kernels, before_product
    return norm


class LayerNorm(nn.LayerNorm):
    """PyTorch's, and in training, before a sublayer that its input goes past, our kernel."""

    kernels = "auto"  # as in S4Config.kernels: whether the Triton kernel runs

    def forward(self, x, with_input=False, turned=False):
        """y; with_input: y, by the kernel in bfloat16 where autocast makes that of float32, and x, to go past the
        sublayer: of this x and not of the first, so that both gradients meet in the norm's backward. turned: y may be a
        view of rows (C, B, L), as a kernel of what follows reads it.
        """
        if not with_input:
            return super().forward(x)
        dtypes, out, C = (x.dtype, self.weight.dtype), as_autocast_dtype(x), x.shape[-1]
        turned = turned and turns_rows(x.shape[:-1].numel(), C)
        if (torch.is_grad_enabled() or self.training) and LAYER_NORM.runs_kernel(
            x,
            unsupported=limit_of_rms_norm(*dtypes, C),
            setting=self.kernels,
            problem=(*dtypes, out, C, turned),
        ):
            return layer_norm(x, self.weight, self.bias, self.eps, out, turned)
        return super().forward(x), x


def norm_before(norm: nn.Module, x: torch.Tensor, turned: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """norm(x), and x for what goes past, see `RMSNorm` and `LayerNorm`; of other modules, and where a hook waits for
    what a norm returns, x as it is. turned: what follows reads rows (C, B, L), as a layer norm can write them.
    """
    if type(norm) not in (RMSNorm, LayerNorm) or norm._forward_hooks:
        return norm(x), x
    return norm(x, with_input=True, **({"turned": turned} if type(norm) is LayerNorm else {}))


def make_norm(config: S4Config, before_product: bool = False) -> nn.Module:
    if config.norm == "rms":
        return make_rms_norm(config, config.hidden_size, before_product)
    norm = LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
    norm.kernels = config.kernels
    return norm


class TiedDropout(nn.Dropout):
    """Drops a channel of (B, L, H) at every position of a sequence or at none."""

    def forward(self, x):
        return x * nn.functional.dropout(torch.ones_like(x[:, :1]), self.p, self.training)


def make_dropout(config: S4Config) -> nn.Module:
    return (TiedDropout if config.tie_dropout else nn.Dropout)(config.dropout)


def _drops(dropout: nn.Module, x: torch.Tensor) -> bool:
    """Whether our kernel may drop some of x. Not while a CUDA graph is captured, which would keep the seed."""
    if type(dropout) is not nn.Dropout or not dropout.training or not 0 < dropout.p < 1:
        return False
    return not x.is_cuda or torch.compiler.is_compiling() or not torch.cuda.is_current_stream_capturing()


def after_activation(
    x: torch.Tensor, dtype: torch.dtype, activation: nn.Module, dropout: nn.Module, kernels: str
) -> Callable | None:
    """y -> dropout(activation(y)) in one launch, for y in `dtype` on the device of x; None where no kernel runs."""
    name = FUSED_ACTIVATIONS.get(type(activation), "identity")
    if name == "identity" or not _drops(dropout, x):
        return None
    runs = DROPOUT.runs_kernel(
        x, unsupported=limit_of_dropout(dtype), setting=kernels, problem=("activated", dtype, name)
    )
    return partial(drop_activated, activation=name, p=dropout.p) if runs else None


def at_gated_end(residual: torch.Tensor, dropout: nn.Module, kernels: str) -> Callable | None:
    """(x, bias) -> residual + dropout(glu(x + bias)) in one launch, for x, a matrix product; None where no kernel runs,
    as outside of training.
    """
    if not dropout.training or not (_drops(dropout, residual) or dropout.p == 0):
        return None
    device, C = residual.device.type, residual.shape[-1]
    product = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else residual.dtype
    runs = DROPOUT.runs_kernel(
        residual,
        unsupported=limit_of_dropout(residual.dtype, product, C=C),
        setting=kernels,
        problem=("gated", residual.dtype, product, C, dropout.p > 0),
    )
    if not runs:
        return None
    return lambda x, bias: drop_gated(residual, x, bias.to(residual.dtype), dropout.p)


def add_dropped(residual: torch.Tensor, x: torch.Tensor, dropout: nn.Module, kernels: str) -> torch.Tensor:
    """residual + dropout(x), of one shape, in one launch where a kernel runs."""
    if _drops(dropout, x) and torch.promote_types(residual.dtype, x.dtype) == residual.dtype:
        dtypes = residual.dtype, x.dtype
        problem = "added", *dtypes
        if DROPOUT.runs_kernel(residual, x, unsupported=limit_of_dropout(*dtypes), setting=kernels, problem=problem):
            return drop_added(residual, x, dropout.p)
    return residual + dropout(x)


def gated_by_silu(gate: torch.Tensor, up: torch.Tensor, dropout: nn.Module, kernels: str) -> torch.Tensor:
    """dropout(silu(gate) up), in one launch where a kernel runs, as it does in training."""
    drops = _drops(dropout, gate)
    if dropout.training and (drops or dropout.p == 0) and gate.dtype == up.dtype:
        problem = "swiglu", gate.dtype, drops
        if DROPOUT.runs_kernel(gate, up, unsupported=limit_of_dropout(gate.dtype), setting=kernels, problem=problem):
            return drop_swiglu(gate, up, dropout.p)
    return dropout(nn.functional.silu(gate) * up)
