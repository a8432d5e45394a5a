"""A tiny model with a tokenizer, as the verbs of serving load them."""

import pytest
import torch

from ssm_lm import S4Config, S4ForCausalLM
from ssm_lm.data.bpe import train_bpe

TEXT = ["User: the cat sat on the mat\nAssistant: and the dog sat on the cat\n" * 3, "naïve façade — 猫\n" * 3]


@pytest.fixture(scope="session")
def tokenizer():
    return train_bpe(TEXT, 300)


@pytest.fixture(scope="session")
def build(tokenizer):
    """build(**values) -> a model that a seed determines, whose texts do not end by themselves."""

    def make(seed=0, **values):
        torch.manual_seed(seed)
        ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 8, "initializer_range": 0.3}
        config = S4Config(vocab_size=len(tokenizer), tie_word_embeddings=False, **(ids | sizes | values))
        return S4ForCausalLM(config).eval()

    return make


@pytest.fixture(scope="session")
def model(build):
    return build(ssm="s4d", arch="s4-ffn")
