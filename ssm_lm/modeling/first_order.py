"""Operations with a first derivative alone say so where a second is asked for.

PyTorch's own `once_differentiable` says it too late: of `torch.autograd.grad(..., create_graph=True)`, differentiated
once more in chosen inputs, it leaves out the part that goes through such an operation, without a word.
"""

import functools

import torch


def first_order(backward):
    """A backward of a torch.autograd.Function that is no part of a graph. RuntimeError under create_graph=True."""

    @functools.wraps(backward)
    def once(ctx, *gradients):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # a graph has its own answer
            name = type(ctx).__name__.removesuffix("Backward").strip("_")
            raise RuntimeError(f"{name} of ssm_lm has a first derivative alone, and create_graph=True asks for more")
        return backward(ctx, *gradients)

    return once
