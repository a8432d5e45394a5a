"""Sequence (context) parallelism: the ranks of a group hold one slice of the sequence each.

A state space is linear, so what came before a slice reaches it through one state alone. With s_q the state that slice q
leaves from a zero start, and Phi = A_bar^(length of a slice),

    h_r = sum_{q<r} Phi^(r-1-q) s_q            the state that slice r starts from

Each rank finds s_q by a scan without outputs (about a third of a forward), one all-gather a layer exchanges them, and
the ordinary scan runs from h_r. What is sent, (B, H, N) numbers a layer and rank, does not depend on the length, and
the backward sends as much. Memory a rank is that of its slice, so the longest sequence grows with the number of ranks.
A short convolution is linear too: its state is the tail of its inputs, (B, K - 1, C), and is exchanged as well.

Groups are runs of consecutive ranks, to keep them within a node. Everything else (ZeRO, accumulation, clipping) sees
data parallelism: the loss of a rank is its slice's share, and an average over all ranks is the gradient.
"""

from types import MethodType

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset, Sampler

from ..modeling.short_convolution import ShortConvolution
from ..modeling.ssm import StateSpace


class _AllGather(torch.autograd.Function):
    """(...) -> (ranks, ...). Backward: the sum over the ranks of what they want of this rank's part."""

    @staticmethod
    def forward(ctx, part, group, rank):
        ctx.group, ctx.rank = group, rank
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, part.contiguous(), group=group)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=ctx.group)  # gloo has no reduce-scatter
        return gradient[ctx.rank], None, None


class SequenceParallel:
    """The group of ranks that this rank shares its sequences with.

    size: ranks a sequence; it divides the world size. Every rank must make one, at the same point of the program.
    rank: this rank's place in its group, which is the number of its slice. Raises ValueError for another size.
    """

    def __init__(self, size: int):
        world = dist.get_world_size()
        if size < 1 or world % size:
            raise ValueError(f"sequence_parallel_size must divide the number of ranks ({world}), and {size} does not")
        self.size, self.rank = size, dist.get_rank() % size
        for first in range(0, world, size):
            ranks = list(range(first, first + size))
            group = dist.new_group(ranks)  # a collective over all ranks, whoever the group is for
            if dist.get_rank() in ranks:
                self.group = group

    def slice(self, length: int) -> slice:
        """Where this rank's part of a sequence of `length` tokens lies. `length` is a multiple of `size`."""
        part = length // self.size
        return slice(self.rank * part, (self.rank + 1) * part)

    def start_state(self, layer: StateSpace | ShortConvolution, left: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """h_r from s_r, `left`, the state that this rank's slice u (B, L, C) leaves; both as `layer.zero_state`.

        One all-gather; another one, of Phi, where the tokens choose their steps.

        Every rank walks the whole chain, so that the graph, and with it the collectives of the backward, are the same
        on all of them; a step of it is one small product.
        """
        parts = _AllGather.apply(left, self.group, self.rank)
        transition = layer.transition_over(u)
        if layer.unconvolved:  # steps of the tokens
            transitions = _AllGather.apply(transition, self.group, self.rank)
            parts = parts + 0 * transitions.sum()  # in the graph of every rank, as `parts` is
        else:
            transitions = [transition] * self.size
        state = start = torch.zeros_like(left)
        for number in range(self.size - 1):
            state = layer.carry_over(transitions[number], state) + parts[number]
            start = torch.where(torch.tensor(self.rank == number + 1, device=state.device), state, start)
        # rank 0 starts from zero, and still takes part in the backward
        return start + 0 * parts.sum(0) if self.rank == 0 else start

    def attach(self, model: nn.Module) -> None:
        """Let state spaces and convolutions of the model go on from the slices before this rank's, in training mode.

        In evaluation mode a layer is as it was, and its rank sees a whole sequence.
        """
        for layer in model.modules():
            if isinstance(layer, (StateSpace, ShortConvolution)):
                layer.forward = MethodType(_forward_of(self), layer)


def _forward_of(parallel: SequenceParallel):
    def forward(layer: StateSpace | ShortConvolution, u, initial_state=None, **options):
        plain = type(layer).forward
        if layer.training:
            if layer.bidirectional or initial_state is not None or options.get("seq_idx") is not None:
                raise ValueError(
                    "sequence parallelism is for causal state spaces over one document, from a zero state: not for "
                    "bidirectional ones, seq_idx or an initial_state"
                )
            zero = layer.zero_state(len(u), u.device)
            # nothing but u is kept of this scan: its states at the chunks' starts would be as large as u
            left = checkpoint(layer.advance, u, zero, use_reentrant=False, preserve_rng_state=False)
            initial_state = parallel.start_state(layer, left, u)
            options.pop("execution", None)  # it was decided without that state
        return plain(layer, u, initial_state=initial_state, **options)

    return forward


class SlicedWindows(Dataset):
    """A dataset of windows as this rank sees it: its slice of each, with targets that were shifted before the cut."""

    def __init__(self, windows: Dataset, parallel: SequenceParallel):
        self.windows, self.parallel = windows, parallel

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index) -> dict[str, torch.Tensor]:
        window = self.windows[index]
        part = self.parallel.slice(len(window["input_ids"]))
        shifted = F.pad(window["labels"], (0, 1), value=-100)[1:]
        return {
            "input_ids": window["input_ids"][part].clone(),
            "labels": window["labels"][part].clone(),
            "shift_labels": shifted[part].clone(),
        }


class RepeatedBatches(Sampler):
    """A sampler's order in batches, each `times` in a row: consecutive ranks are dealt the same one."""

    def __init__(self, sampler: Sampler, batch_size: int, times: int):
        self.sampler, self.batch_size, self.times = sampler, batch_size, times

    def __len__(self) -> int:
        return len(self.sampler) * self.times

    def __iter__(self):
        batch = []
        for index in self.sampler:
            batch.append(index)
            if len(batch) == self.batch_size:
                for _ in range(self.times):
                    yield from batch
                batch = []
