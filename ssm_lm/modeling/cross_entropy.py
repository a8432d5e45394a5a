"""The loss of logits and their gradient in plain PyTorch, in the logits' place: the twin of triton_cross_entropy.py.

The equation stands in losses.py. Shapes: n tokens, V entries of a vocabulary.
"""

import torch

IGNORED = -100  # a target that the loss leaves out, as everywhere in PyTorch


def logits_to_loss(
    z: torch.Tensor, targets: torch.Tensor, bias: torch.Tensor | None = None, gradient: bool = True
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """z (n, V), which is overwritten or let go, targets (n) int64, bias (V) or None, which z lacks yet -> the summed
    negative log-likelihood, at least float32, and with `gradient` that of z + bias (n, V), in the same dtype.
    """
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    counted = (targets != IGNORED).to(z.dtype)[:, None]
    y = targets.clamp(min=0)[:, None]
    if bias is not None:
        z += bias
    z -= z.amax(-1, keepdim=True)
    target = z.gather(-1, y)
    z.exp_()
    normalizer = z.sum(-1, keepdim=True)
    total = ((normalizer.log() - target) * counted).sum()
    if not gradient:
        return total, None
    z *= counted / normalizer
    return total, z.scatter_add_(-1, y, -counted)
