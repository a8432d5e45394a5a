"""What PyTorch runs as one kernel on a GPU, and as many operators on the CPU, where `estimate` counts."""

import torch
from torch.overrides import TorchFunctionMode

from .trace import kernel_launches


class FusedOperators(TorchFunctionMode):
    """Within, an RMS norm and dropout are what they are on CUDA and HIP:

    an RMS norm, from torch 2.9 on (aten::_fused_rms_norm), a launch that keeps its input and a number a row, and two
    back, for the input and for the weight; on the CPU it is six operators, and keeps another tensor of the input's size
    dropout (aten::native_dropout) a launch that keeps a byte an element, and one back; on the CPU it is three
    operators, and keeps factors in the input's dtype
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        fused = {torch.nn.functional.rms_norm: _rms_norm, torch.nn.functional.dropout: _dropout}.get(func, func)
        return fused(*args, **(kwargs or {}))


def _rms_norm(x, normalized_shape, weight=None, eps=None):
    return _RMSNorm.apply(x, x.new_ones(normalized_shape) if weight is None else weight)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        with kernel_launches(1, ours=False):
            ctx.save_for_backward(x, weight, x.new_zeros(*x.shape[:-1], 1, dtype=torch.float32))
            return x * weight

    @staticmethod
    def backward(ctx, gradient):
        x, weight, of_rows = ctx.saved_tensors
        with kernel_launches(2, ours=False):
            of_x = torch.addcmul(gradient, x, weight)
            for read in (gradient, x, of_rows):
                read.sum()
            return of_x, torch.zeros_like(weight)


def _dropout(x, p=0.5, training=True, inplace=False):
    return _Dropout.apply(x) if training and p else x


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        with kernel_launches(1, ours=False):
            mask = x.new_zeros(x.shape, dtype=torch.bool)
            ctx.save_for_backward(mask)
            return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        (mask,) = ctx.saved_tensors
        with kernel_launches(1, ours=False):
            return gradient * mask
