"""A causal convolution of a few taps a channel, and the tail of inputs that it keeps between tokens.

    y_t = bias + sum_j weight[:, j] u_(t - K + 1 + j),  j = 0 .. K-1           u before the first token is 0

It stands before the state space of the blocks "h3" and "gated" (Fu et al., 2212.14052; Gu and Dao, 2312.00752). It is
a state space too, a shift register whose state is its last K - 1 inputs, and offers what `StateSpace` offers to whoever
keeps, crops, carries or exchanges states: `zero_state`, `advance`, `transition`, `carry_over`, and a forward with a
state in and out.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .documents import Documents


class ShortConvolution(nn.Module):
    """channels C; size K, at least 1: how many tokens an output sees. weight (C, K), its last column for the token
    itself, bias (C,): in the model's dtype.
    """

    bidirectional = False
    unconvolved = 0  # see StateSpace

    def __init__(self, channels: int, size: int):
        super().__init__()
        self.channels, self.size = channels, size
        self.weight = nn.Parameter(torch.empty(channels, size))
        self.bias = nn.Parameter(torch.empty(channels))
        if not self.weight.is_meta:
            for name, value in self.initial_values().items():
                getattr(self, name).data.copy_(value)

    def initial_values(self) -> dict[str, torch.Tensor]:
        """Fresh values for every parameter, by name: uniform, as torch's convolutions start."""
        bound = 1 / math.sqrt(self.size)
        return {name: torch.empty(p.shape).uniform_(-bound, bound) for name, p in self.named_parameters()}

    def zero_state(self, batch_size: int, device=None) -> torch.Tensor:
        """(B, K - 1, C), at least float32: a tail of zeros."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        shape = batch_size, self.size - 1, self.channels
        return torch.zeros(shape, dtype=dtype, device=device or self.weight.device)

    def forward(
        self,
        u: torch.Tensor,
        initial_state: torch.Tensor | None = None,
        output_final_state: bool = True,
        seq_idx: Documents | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """u (B, L, C), any L -> y of its shape and dtype, and the tail after it, or None where it is not wanted.

        initial_state: the tail before it, or None for zeros. seq_idx: the documents of u, as `StateSpace.forward` takes
        them: no tap looks over a border, the row's first document goes on from the tail, padding counts as zero.
        """
        begins = None
        if seq_idx is not None:
            u, begins = u.masked_fill((seq_idx.seq_idx < 0)[..., None], 0), seq_idx.begins
        state = self.zero_state(len(u), u.device) if initial_state is None else initial_state
        padded = torch.cat([state.to(u.dtype), u], 1)
        same = None if begins is None else self._same_document(begins)
        y = _Convolve.apply(padded, self.weight.to(u.dtype), self.bias.to(u.dtype), same)
        return y, self._tail(padded, begins, state.dtype) if output_final_state else None

    def advance(
        self, u: torch.Tensor, state: torch.Tensor, memo=None, begins: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The tail after u (B, L, C) from the one before. begins: (B, L) bool, tokens before which it becomes zero."""
        return self._tail(torch.cat([state, u.to(state.dtype)], 1), begins, state.dtype)

    def transition(self, length: int) -> int:
        """What `carry_over` takes for `length` tokens."""
        return length

    def transition_over(self, u: torch.Tensor) -> int:
        """The same for the tokens u (B, L, C)."""
        return u.shape[1]

    def carry_over(self, length: int, state: torch.Tensor) -> torch.Tensor:
        """What is left of a tail after `length` zeros."""
        return F.pad(state, (0, 0, 0, length))[:, -state.shape[1] :] if self.size > 1 else state

    def _documents(self, begins):
        """The number of each token's document, (B, K - 1 + L), 0 for the row's first and the tail before it."""
        return F.pad(begins.cumsum(1), (self.size - 1, 0))

    def _same_document(self, begins):
        """(B, L, 1) bool for every tap but the last: whether what it looks at is of the token's document."""
        numbers = self._documents(begins)
        length = begins.shape[1]
        here = numbers[:, self.size - 1 :]
        return [(numbers[:, j : j + length] == here)[..., None] for j in range(self.size - 1)]

    def _tail(self, padded, begins, dtype):
        first = padded.shape[1] - self.size + 1
        tail = padded[:, first:]
        if begins is not None:
            numbers = self._documents(begins)
            tail = torch.where((numbers[:, first:] == numbers[:, -1:])[..., None], tail, 0)
        return tail.to(dtype, copy=True)  # a view would keep the whole sequence

    def extra_repr(self) -> str:
        return f"channels={self.channels}, size={self.size}"


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
