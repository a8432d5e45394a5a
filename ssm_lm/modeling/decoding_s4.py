"""The decoding strategies that generate() of transformers does not have, by name, as it takes them:

    model.generate(input_ids, custom_generate=model.strategies["contrastive"], penalty_alpha=0.6, top_k=4)

generate() prepares prompt, cache, logits processors and stopping criteria as ever; a strategy is the loop.
"""

from .decoding_contrastive import contrastive_search
from .decoding_diverse import diverse_beam_search
from .decoding_recycling import token_recycling

STRATEGIES = {
    "contrastive": contrastive_search,
    "diverse-beam": diverse_beam_search,
    "token-recycling": token_recycling,
}
