"""Tiny models with random weights, and texts for them: what nearly every test of this folder begins with."""

import torch

from ssm_lm import S4Config, S4ForCausalLM

SIZES = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 8, "initializer_range": 0.3}
# what has a convolution and products around its state space; its feed-forward has gates
MIXTURE = ["h3", "gated", "swiglu"]
SSD = ["gated", "swiglu"]  # for ssm: ssd, which stands in no other mixer
# for generate(): a random tied model repeats its input, and no token may end a text by accident
ENDLESS = {"tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def tiny_config(**values) -> S4Config:
    """SIZES, and `values` in their place or beside them."""
    return S4Config(**(SIZES | values))


def tiny_model(cls=S4ForCausalLM, seed=0, **values):
    """A model of class `cls` that a seed determines, in eval mode."""
    torch.manual_seed(seed)
    return cls(tiny_config(**values)).eval()


def prompt(length, batch=1, seed=0, vocabulary=SIZES["vocab_size"]):
    """Token ids (batch, length) without 0, which generate() takes for padding where it is given no mask."""
    return torch.randint(1, vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))


def checkpoint_activations(model, *args) -> None:
    """Have a model recompute its activations; transformers 5.23 gave the method another name."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(*args)
