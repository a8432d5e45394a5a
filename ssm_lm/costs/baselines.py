"""Parameters and FLOPs of a baseline: 6 N D, and what attention adds to it.

N are the parameters that multiply every token: all but the embeddings, and the head, which may share one. Attention
multiplies each token's query with the keys of its sequence, and the weights with the values: 4 L E forward in a layer
of width E (PaLM's appendix B, which counts the masked half too). A Mamba's scan is elementwise and is not counted.
"""

import torch
from torch import nn

from ..baselines import baseline_classes
from .flops import Part

WITH_ATTENTION = ("gpt2", "llama")


def baseline_parameters(config) -> tuple[int, int]:
    """(all, those outside of embeddings and head), each tensor once, from a model on the meta device."""
    with torch.device("meta"):
        model = baseline_classes(config.model_type)[1](config)
    every = sum(p.numel() for p in model.parameters())
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding)] + [model.lm_head]
    embeddings = {id(p): p.numel() for table in tables for p in table.parameters()}
    return every, every - sum(embeddings.values())


def baseline_flops(config, batch_size: int, length: int) -> list[Part]:
    """The parts of a forward and backward over (batch_size, length) tokens."""
    tokens, (_, inner) = batch_size * length, baseline_parameters(config)
    head = config.vocab_size * config.hidden_size
    parts = [Part("layers", 2 * tokens * inner, 4 * tokens * inner)]
    if config.model_type in WITH_ATTENTION:
        width = config.num_attention_heads * (getattr(config, "head_dim", None) or _head_dim(config))
        forward = 4 * tokens * length * width * config.num_hidden_layers
        parts.append(Part("attention", forward, 2 * forward))
    return [*parts, Part("head", 2 * tokens * head, 4 * tokens * head)]


def _head_dim(config) -> int:
    return config.hidden_size // config.num_attention_heads
