"""Models of the same size, ours and those that a user would take instead, for `ssm-lm bench generate|prefill|train`.

One of our layers [ssm, ssm, ffn], of h3, of ssd with a swiglu, of GPT-2 and of Llama has about 12 H^2 weights; one of
gated, Mamba and Mamba-2 has 6 H^2, so there are twice as many of them.
"""

from typing import NamedTuple

import torch

from ..baselines import BASELINES
from ..config.model import baseline_config, new_language_model
from ..errors import UserError
from ..modeling.configuration_s4 import S4Config

OURS = {
    "s4": {"ssm": "s4"},
    "s4d": {"ssm": "s4d"},
    "s5": {"ssm": "s5"},
    "h3": {"ssm": "s4d", "arch": "h3"},
    "gated": {"ssm": "s4d", "arch": "gated"},
    "ssd": {"ssm": "ssd", "arch": ["gated", "swiglu"]},
}
WITHOUT_CACHE = "gpt2-without-cache"  # as the S4 paper compared: the whole text again for every token
TWICE_THE_LAYERS = ("gated", "mamba", "mamba2")
HEAD = 64  # channels of a head


class Size(NamedTuple):
    """hidden H, layers of 12 H^2 weights, vocabulary, state N of ours."""

    hidden: int
    layers: int
    vocabulary: int
    state: int


SIZES = {  # parameters with the embedding, which the head shares
    "25M": Size(384, 12, 8192, 64),
    "125M": Size(768, 12, 50304, 64),
    "tiny": Size(64, 1, 256, 8),  # for a look at whether it runs
}


def check_names(names: list[str]) -> None:
    """Raise UserError for a name that is no contender."""
    known = [*OURS, *BASELINES, WITHOUT_CACHE]
    for name in names:
        if name not in known:
            raise UserError(f"--models {name}: give some of {', '.join(known)}")


def is_ours(name: str) -> bool:
    return name in OURS


def build(name: str, size: Size, positions: int, dtype: torch.dtype) -> torch.nn.Module:
    """The contender, with random weights and in evaluation mode. positions: the longest text that it will see."""
    layers = size.layers * (2 if name in TWICE_THE_LAYERS else 1)
    common = {"vocab_size": size.vocabulary, "hidden_size": size.hidden, "num_hidden_layers": layers}
    heads = size.hidden // HEAD
    if name in OURS:
        own = {"intermediate_size": 27 * size.hidden // 16} if name == "ssd" else {}  # as in configs/model/tiny.yaml
        config = S4Config(**common, state_size=size.state, **OURS[name], **own)
    else:
        kind = name.removesuffix("-without-cache")
        own = {
            "gpt2": {
                "num_attention_heads": heads,
                "max_position_embeddings": positions,
                # as ours has none; on a CPU, attention with dropout also is many times slower and holds L x L numbers
                "resid_pdrop": 0.0,
                "embd_pdrop": 0.0,
                "attn_pdrop": 0.0,
            },
            "llama": {
                "num_attention_heads": heads,
                "intermediate_size": 8 * -(-size.hidden // 3),
                "max_position_embeddings": positions,
            },
            "mamba": {},
            "mamba2": {"num_heads": 2 * heads, "head_dim": HEAD, "n_groups": 1},
        }[kind]
        config = baseline_config({"type": kind, "tie_word_embeddings": True, **common, **own})
    torch.manual_seed(0)
    return new_language_model(config).to(dtype).eval()
