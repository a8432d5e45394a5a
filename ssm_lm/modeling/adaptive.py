"""Adaptive input embedding and adaptive softmax: wide vectors for frequent tokens, narrow ones for rare tokens.

Token ids are sorted by frequency and cut into clusters 0 .. K: cluster i holds the ids from cutoffs[i-1] to cutoffs[i]
and gives each a vector of d_i = hidden_size / div_val^i entries.

    embedding   e(v) = sqrt(H) Proj_i dropout(E_i[v])                                      v in cluster i
    softmax     log p(v | h) = log s_v                             s = softmax over cluster 0 and K cluster entries
                log p(v | h) = log s_(cluster i) + log softmax(W_i dropout(Q_i^T h) + b_i)_v             i = 1 .. K

E_i, W_i (n_i, d_i), Proj_i, Q_i (H, d_i). Tied as in the recipe: W_i = E_i for every cluster, Q_i = Proj_i for the
tails. Q_0 is the head's own and starts at zero, so that the first predictions are those of the biases.

A token needs the entries of cluster 0 and those of its own cluster. At the 267,735 words of WikiText-103 these are
20,000 logits of the first softmax, and for few tokens those of one tail; the loss never holds the others.

Parameters are float32 or the model's dtype, log-probabilities float32 (float64 for a float64 model) always: they span
a range that half precision has no digits for.

Sources: Grave et al., "Efficient softmax approximation for GPUs" (2017); Baevski and Auli, "Adaptive input
representations" (2019); the initialisation is that of the S4 paper's WikiText-103 recipe.
"""

import itertools
import math

import torch
from torch import nn
from torch.nn import functional as F

from .losses import IGNORED, linear_cross_entropy

INIT_SCALE = 0.5  # of embeddings and projections: standard deviation INIT_SCALE / sqrt(width)


def cluster_bounds(vocab_size: int, cutoffs) -> list[tuple[int, int]]:
    """[(first id, end)] of every cluster."""
    edges = [0, *cutoffs, vocab_size]
    return list(itertools.pairwise(edges))


def cluster_widths(hidden_size: int, clusters: int, div_val: int) -> list[int]:
    """d_i = H / div_val^i."""
    return [hidden_size // div_val**index for index in range(clusters)]


def check_adaptive(vocab_size: int, hidden_size: int, cutoffs, div_val: int) -> None:
    """Raise a ValueError that names the config's key if these make no clusters."""
    edges = [0, *cutoffs, vocab_size]
    if not cutoffs or any(low >= high for low, high in itertools.pairwise(edges)):
        raise ValueError(
            f"adaptive_cutoffs must rise from above 0 to below vocab_size ({vocab_size}), and {list(cutoffs)} do not"
        )
    if div_val < 1:
        raise ValueError(f"adaptive_div_val must be positive, not {div_val}")
    if hidden_size % div_val ** len(cutoffs):
        raise ValueError(
            f"adaptive_div_val to the power of the number of cutoffs ({div_val}^{len(cutoffs)}) must divide "
            f"hidden_size ({hidden_size})"
        )


def tied_keys(clusters: int, tie_projections: bool) -> dict[str, str]:
    """What S4ForCausalLM ties, target: source; patterns, so that "weight_1" is not also the start of "weight_10"."""
    keys = {rf"lm_head\.weight_{i}$": rf"model\.embed_tokens\.weight_{i}$" for i in range(clusters)}
    if tie_projections:
        keys |= {rf"lm_head\.projection_{i}$": rf"model\.embed_tokens\.projection_{i}$" for i in range(1, clusters)}
    return keys


class _Clusters(nn.Module):
    """weight_i (n_i, d_i) and projection_i (H, d_i) of every cluster.

    They are parameters of one module, not of a list of modules: engines that shard parameters gather a module's own
    around its forward.
    """

    def __init__(self, vocab_size: int, hidden_size: int, cutoffs, div_val: int):
        super().__init__()
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.bounds = cluster_bounds(vocab_size, cutoffs)
        self.widths = cluster_widths(hidden_size, len(self.bounds), div_val)
        for i, ((low, high), width) in enumerate(zip(self.bounds, self.widths, strict=True)):
            self.register_parameter(f"weight_{i}", nn.Parameter(torch.empty(high - low, width)))
            self.register_parameter(f"projection_{i}", nn.Parameter(torch.empty(hidden_size, width)))

    def _weight(self, index: int) -> torch.Tensor:
        return getattr(self, f"weight_{index}")

    def _projection(self, index: int) -> torch.Tensor:
        return getattr(self, f"projection_{index}")

    def init_parameters(self, init) -> None:
        """Fresh values by transformers' initialization module, which leaves alone what a checkpoint brought."""
        for i, width in enumerate(self.widths):
            init.normal_(self._weight(i), 0.0, INIT_SCALE * width**-0.5)
            init.normal_(self._projection(i), 0.0, INIT_SCALE * self.hidden_size**-0.5)

    def extra_repr(self) -> str:
        pairs = zip(self.bounds, self.widths, strict=True)
        clusters = ", ".join(f"{high - low} x {width}" for (low, high), width in pairs)
        return f"hidden_size={self.hidden_size}, clusters=[{clusters}]"


class AdaptiveEmbedding(_Clusters):
    """Token ids (...) -> embeddings (..., H), scaled by sqrt(H). dropout acts on the narrow vectors, before Proj_i."""

    def __init__(self, vocab_size: int, hidden_size: int, cutoffs, div_val: int = 4, dropout: float = 0.0):
        super().__init__(vocab_size, hidden_size, cutoffs, div_val)
        self.num_embeddings, self.embedding_dim = vocab_size, hidden_size
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        # every cluster looks at every token, and what is not its own is masked: shapes do not depend on the data, and
        # with div_val 4 all projections together cost 1.33 times that of cluster 0
        embeddings = 0
        for i, (low, high) in enumerate(self.bounds):
            own = (ids >= low) & (ids < high)
            vectors = F.embedding(torch.where(own, ids - low, 0), self._weight(i))
            vectors = self.dropout(vectors * own[..., None])
            embeddings = embeddings + F.linear(vectors, self._projection(i))
        return embeddings * math.sqrt(self.hidden_size)


class AdaptiveSoftmax(_Clusters):
    """Hidden states -> log-probabilities over the whole vocabulary, or the summed loss of given targets.

    weight_i and projection_i are W_i and Q_i; bias_i (n_i); cluster_weight (K, d_0) and cluster_bias (K): the entries
    of the tails in the first softmax. dropout acts on the projected hidden states.
    """

    kernels = "auto"  # as in S4Config.kernels

    def __init__(self, vocab_size: int, hidden_size: int, cutoffs, div_val: int = 4, dropout: float = 0.0):
        super().__init__(vocab_size, hidden_size, cutoffs, div_val)
        self.in_features, self.out_features = hidden_size, vocab_size
        for i, (low, high) in enumerate(self.bounds):
            self.register_parameter(f"bias_{i}", nn.Parameter(torch.empty(high - low)))
        tails = len(self.bounds) - 1
        self.cluster_weight = nn.Parameter(torch.empty(tails, hidden_size))
        self.cluster_bias = nn.Parameter(torch.empty(tails))
        self.dropout = nn.Dropout(dropout)

    def _bias(self, index: int) -> torch.Tensor:
        return getattr(self, f"bias_{index}")

    def init_parameters(self, init) -> None:
        super().init_parameters(init)
        init.zeros_(self.projection_0)
        init.zeros_(self.cluster_weight)
        init.zeros_(self.cluster_bias)
        bound = self.hidden_size**-0.5
        for i in range(len(self.bounds)):
            init.uniform_(self._bias(i), -bound, bound)

    def forward(self, hidden_states, targets=None, chunk_size=None):
        """hidden_states (..., H) -> log-probabilities (..., V); with targets (n) and hidden_states (n, H): a scalar."""
        if targets is None:
            return self.log_probabilities(hidden_states)
        return self.summed_loss(hidden_states, targets, chunk_size)

    def _projected(self, hidden_states, index: int) -> torch.Tensor:
        """dropout(Q_i^T h), (..., d_i)"""
        return self.dropout(F.linear(hidden_states, self._projection(index).t()))

    def log_probabilities(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(..., H) -> (..., V), float32: exact for every id, and their exponentials sum to 1."""

        def log_softmax(logits):
            return F.log_softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))

        first = self._projected(hidden_states, 0)
        # the logits are joined here, not the weights: one token of a generation would copy all of them
        words = F.linear(first, self.weight_0, self.bias_0)
        head = log_softmax(torch.cat([words, F.linear(first, self.cluster_weight, self.cluster_bias)], -1))
        frequent = self.bounds[0][1]
        parts = [head[..., :frequent]]
        for i in range(1, len(self.bounds)):
            tail = F.linear(self._projected(hidden_states, i), self._weight(i), self._bias(i))
            parts.append(log_softmax(tail) + head[..., frequent + i - 1, None])
        return torch.cat(parts, -1)

    def fixed_shape(self, hidden_states) -> bool:
        """Whether every tail looks at every token; see `summed_loss`."""
        return hidden_states.device.type != "cpu" or torch.compiler.is_compiling()

    def summed_loss(self, hidden_states: torch.Tensor, targets: torch.Tensor, chunk_size: int | None = None):
        """The summed negative log-likelihood: hidden_states (n, H), targets (n) int64, -100 for none -> scalar.

        The first softmax is over all tokens, a tail's over its own; logits exist for a chunk of tokens at a time.

        Which tokens a tail has depends on the data, and on a GPU the host would have to wait for their number. There,
        and under torch.compile, every tail looks at every token with the targets of the others ignored: more
        arithmetic (at WikiText-103's sizes the tails then cost 0.8 times the first softmax), shapes that are fixed.
        """
        frequent = self.bounds[0][1]
        head_targets = targets
        for i, (low, high) in enumerate(self.bounds[1:], start=1):
            head_targets = torch.where((targets >= low) & (targets < high), frequent + i - 1, head_targets)
        weight = torch.cat([self.weight_0, self.cluster_weight])
        bias = torch.cat([self.bias_0, self.cluster_bias])
        options = chunk_size, self.kernels
        total = linear_cross_entropy(self._projected(hidden_states, 0), weight, head_targets, bias, *options)
        for i, (low, high) in enumerate(self.bounds[1:], start=1):
            own = (targets >= low) & (targets < high)
            if self.fixed_shape(hidden_states):
                rows, ids = hidden_states, torch.where(own, targets - low, IGNORED)
            else:
                rows, ids = hidden_states[own], targets[own] - low
            total = total + linear_cross_entropy(
                self._projected(rows, i), self._weight(i), ids, self._bias(i), *options
            )
        return total
