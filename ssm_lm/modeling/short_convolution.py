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
from .kernel_limits import limit_of_short_convolution
from .ops import SHORT_CONVOLUTION, short_convolution
from .short_taps import tail_of


class ShortConvolution(nn.Module):
    """channels C; size K, at least 1: how many tokens an output sees. weight (C, K), its last column for the token
    itself, bias (C,): in the model's dtype.
    """

    bidirectional = False
    unconvolved = 0  # see StateSpace
    kernels = "auto"  # as in S4Config.kernels: whether the Triton kernel runs

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
        activation: str = "identity",
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """u (B, L, C), any L -> f(y) of its shape and dtype, and the tail after it, or None where it is not wanted.

        initial_state: the tail before it, or None for zeros. seq_idx: the documents of u, as `StateSpace.forward` takes
        them: no tap looks over a border, the row's first document goes on from the tail, padding counts as zero.
        activation: f, one of ACTIVATIONS; the kernel applies it before y is rounded.
        ValueError for a tail of another number of rows.
        """
        if initial_state is not None and initial_state.shape[0] != u.shape[0]:
            raise ValueError(f"initial_state must be of {u.shape[0]} rows, not of {initial_state.shape[0]}")
        documents = (None, None) if seq_idx is None else (seq_idx.begins, seq_idx.seq_idx)
        run_kernel = self._runs_kernel(u, activation, seq_idx is not None)
        inputs = u, self.weight, self.bias, initial_state, *documents
        return short_convolution(*inputs, activation, output_final_state, run_kernel)

    def _runs_kernel(self, u, activation, documents) -> bool:
        dtypes = u.dtype, self.weight.dtype
        trains = torch.is_grad_enabled() or self.training  # as `execution.decide` asks, of what a backward will run
        return SHORT_CONVOLUTION.runs_kernel(
            u,
            self.weight,
            unsupported=limit_of_short_convolution(*dtypes, self.size, activation),
            setting=self.kernels,
            problem=(*dtypes, self.size, activation, documents, trains),
        )

    def advance(
        self, u: torch.Tensor, state: torch.Tensor, memo=None, begins: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The tail after u (B, L, C) from the one before. begins: (B, L) bool, tokens before which it becomes zero."""
        return tail_of(torch.cat([state, u.to(state.dtype)], 1), begins, self.size, state.dtype)

    def transition(self, length: int) -> int:
        """What `carry_over` takes for `length` tokens."""
        return length

    def transition_over(self, u: torch.Tensor) -> int:
        """The same for the tokens u (B, L, C)."""
        return u.shape[1]

    def carry_over(self, length: int, state: torch.Tensor) -> torch.Tensor:
        """What is left of a tail after `length` zeros."""
        return F.pad(state, (0, 0, 0, length))[:, -state.shape[1] :] if self.size > 1 else state

    def extra_repr(self) -> str:
        return f"channels={self.channels}, size={self.size}"
