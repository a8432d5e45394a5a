"""The next token of many rows, each with wishes of its own."""

import random
from dataclasses import dataclass, field

import torch


@dataclass
class Draw:
    """How a row finds its tokens. temperature 0: the most likely one. top_p: of the likely tokens of that mass.

    seed: of the draws, which do not depend on the other rows; None: they differ from time to time.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    numbers: random.Random = field(init=False, repr=False)

    def __post_init__(self):
        self.numbers = random.Random(self.seed)


def choose(logits: torch.Tensor, draws: list[Draw]) -> list[int | None]:
    """logits (B, V) -> a token a row; None where they are no numbers."""
    best, tokens = logits.max(-1)
    finite, tokens = best.isfinite().tolist(), tokens.tolist()
    for whole in (True, False):
        rows = [i for i, draw in enumerate(draws) if draw.temperature and finite[i] and (draw.top_p >= 1) == whole]
        if rows:
            found = _draw(logits[rows].double(), [draws[i] for i in rows], whole)
            for row, token in zip(rows, found, strict=True):
                tokens[row] = token
    return [token if is_number else None for token, is_number in zip(tokens, finite, strict=True)]


def _draw(logits: torch.Tensor, draws: list[Draw], whole: bool) -> list[int]:
    """By the inverse of the distribution function, of all tokens or of the likely ones first, which takes a sort."""

    def column(values):
        return torch.tensor(values, dtype=logits.dtype, device=logits.device)[:, None]

    p = torch.softmax(logits / column([draw.temperature for draw in draws]), -1)
    order = None
    if not whole:
        p, order = p.sort(-1, descending=True)
        likely = p.cumsum(-1) - p < column([draw.top_p for draw in draws])
        likely[:, 0] = True
        p = p.masked_fill(~likely, 0)
    mass = p.cumsum(-1)
    point = column([draw.numbers.random() for draw in draws]) * mass[:, -1:]
    # the first token at which the mass is above the point, so none of mass 0
    index = torch.searchsorted(mass, point, right=True).clamp(max=logits.shape[-1] - 1)
    return (index if order is None else order.gather(-1, index))[:, 0].tolist()
