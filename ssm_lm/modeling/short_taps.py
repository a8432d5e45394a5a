"""A causal convolution of a few taps a channel in plain PyTorch: the twin of triton_short_convolution.py.

The equation stands in short_convolution.py. Shapes: B batch, L length, C channels, K taps.
"""

import torch
import torch.nn.functional as F

from .activations import ACTIVATIONS


def convolve_taps(
    u: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    tail: torch.Tensor | None,
    begins: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    activation: str = "identity",
    has_tail: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """u (B, L, C), any L, weight (C, K), bias (C,) -> f(y) of u's shape and dtype, and the tail after it, or None
    without has_tail.

    tail: (B, K - 1, C), the inputs before u, or None for zeros. begins, seq_idx: (B, L), of `Documents`, or both None.
    activation: f, one of ACTIVATIONS.
    """
    K = weight.shape[1]
    if seq_idx is not None:
        u = u.masked_fill((seq_idx < 0)[..., None], 0)
    if tail is None:
        dtype = torch.promote_types(weight.dtype, torch.float32)
        tail = u.new_zeros(len(u), K - 1, u.shape[2], dtype=dtype)
    padded = torch.cat([tail.to(u.dtype), u], 1)
    same = None if begins is None else _same_document(begins, K)
    y = _Convolve.apply(padded, weight.to(u.dtype), bias.to(u.dtype), same)
    return ACTIVATIONS[activation].function(y), tail_of(padded, begins, K, tail.dtype) if has_tail else None


def tail_of(padded: torch.Tensor, begins: torch.Tensor | None, K: int, dtype: torch.dtype) -> torch.Tensor:
    """(B, K - 1, C): the last of padded (B, K - 1 + L, C), zero where it is of another document than the last token."""
    first = padded.shape[1] - K + 1
    tail = padded[:, first:]
    if begins is not None:
        numbers = _documents(begins, K)
        tail = torch.where((numbers[:, first:] == numbers[:, -1:])[..., None], tail, 0)
    return tail.to(dtype, copy=True)  # a view would keep the whole sequence


def _documents(begins, K):
    """The number of each token's document, (B, K - 1 + L), 0 for the row's first and the tail before it."""
    return F.pad(begins.cumsum(1), (K - 1, 0))


def _same_document(begins, K):
    """(B, L, 1) bool for every tap but the last: whether what it looks at is of the token's document."""
    numbers = _documents(begins, K)
    length = begins.shape[1]
    here = numbers[:, K - 1 :]
    return [(numbers[:, j : j + length] == here)[..., None] for j in range(K - 1)]


class _Convolve(torch.autograd.Function):
    """padded (B, K - 1 + L, C), weight (C, K), bias (C,) -> (B, L, C). same: of `_same_document`, or None.

    By itself, autograd takes twice the time: it pads the gradient of each tap's slice to the whole length.
    """

    @staticmethod
    def forward(ctx, padded, weight, bias, same):
        ctx.save_for_backward(padded, weight)
        ctx.same = same
        taps, length = weight.t().contiguous(), padded.shape[1] - weight.shape[1] + 1
        y = torch.addcmul(bias, _seen(padded[:, :length], same, 0), taps[0])
        for j, tap in enumerate(taps[1:], 1):
            y.addcmul_(_seen(padded[:, j : j + length], same, j), tap)
        return y

    @staticmethod
    def backward(ctx, gradient):
        padded, weight = ctx.saved_tensors
        taps, length = weight.t().contiguous(), gradient.shape[1]
        of_padded, of_taps = torch.zeros_like(padded), []
        for j, tap in enumerate(taps):
            part = slice(j, j + length)
            of_padded[:, part] += _seen(gradient * tap, ctx.same, j)
            of_taps.append((_seen(padded[:, part], ctx.same, j) * gradient).sum((0, 1)))
        return of_padded, torch.stack(of_taps, 1), gradient.sum((0, 1)), None


def _seen(values, same, j):
    """Values of tap j, zero over a document's border; `where`, for what is not a number must not pass either."""
    return values if same is None or j >= len(same) else torch.where(same[j], values, 0)
