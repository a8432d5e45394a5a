"""How large the model of a folder is, from the headers of its weights."""

import math
from pathlib import Path

from ..loading.folder import CONFIG, read_json, resolve
from ..loading.weights import read_headers

# the tables of tokens and positions, and a head of its own, by the ends of their names: ours, and transformers'
EMBEDDINGS = ("embed_tokens", "embeddings", "wte", "wpe", "lm_head")


def count(folder: Path) -> tuple[int, int]:
    """(parameters, those outside of EMBEDDINGS). Raises UserError for a folder without a model."""
    place = resolve(folder)
    read_json(place / CONFIG)
    headers = {name: math.prod(shape) for name, (shape, _) in read_headers(place).items()}
    inner = {name: size for name, size in headers.items() if not set(name.split(".")[:-1]) & set(EMBEDDINGS)}
    return sum(headers.values()), sum(inner.values())
