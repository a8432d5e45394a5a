"""The decoding step from a token's id to the logits of the next one, in one run of the library: for the loop of
decoding_sampling.py, whose tokens follow one another and whose surroundings are known.

What Python does between two tokens it does with nothing near, for the weights have just gone through the processor:
a handful of calls are a tenth of a small model's token.
"""

import torch
from torch import nn

from .native_step import (
    FROM_IDS,
    Program,
    Unsupported,
    is_time_for_the_library,
    most_rows,
    programs_of,
    weight_of_head,
)


class TokenProgram(Program):
    """A step of an S4ForCausalLM: ids in `tokens` (B, 1), each below `entries`; logits in `found` (B, V), float32."""

    def write(self, model: nn.Module, cache) -> None:
        embedding = model.model.embed_tokens
        if type(embedding) is not nn.Embedding or embedding.max_norm is not None or model.model.training:
            raise Unsupported("an embedding of another kind, or dropout")
        table = self.weight(embedding.weight)
        head = weight_of_head(model.lm_head, self.h.shape[1], table.dtype)
        if head is None or len(head) > len(table):
            raise Unsupported("a head of another kind")
        with torch.inference_mode(False):  # see `room`
            self.tokens = torch.zeros(self.shape, dtype=torch.int64, device="cpu")
        self.entries, half = len(table), table.dtype == torch.bfloat16
        self.call("embed", *self.h.shape, self.tokens, table, half, self.h)
        super().write(model.model, cache)
        rounds = half and self.rows <= most_rows(half)  # more than that are rounded by PyTorch's product
        if rounds:
            self.call("round_half", self.out.numel(), self.out)
        self.found = self.product(self.out, head)
        if rounds:
            self.call("round_half", self.found.numel(), self.found)

    def is_current(self, model: nn.Module, tokens: torch.Tensor, cache, look: tuple | None) -> bool:
        other = model.model.training or getattr(model.model.embed_tokens, "max_norm", None) is not None
        return not other and super().is_current(model, tokens, cache, look)


class TokenSteps:
    """Steps of an S4ForCausalLM on a cache, one token of every row each, in the library or by the model's forward.

    watched: whether somebody else's code runs between them, after which everything is looked at again.
    fill: the token of rows that have ended; or None.
    """

    def __init__(self, model: nn.Module, cache, watched: bool, fill: torch.Tensor | None):
        self.model, self.cache, self.watched, self.fill = model, cache, watched, fill
        self.programs, self.program, self.look = programs_of(model.model), None, None

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens: (B, 1). The logits (B, V) of what follows them, which are there until the next call."""
        if self.watched or self.look is None or self.look != self.programs.look():
            self.program = self._find(tokens)
        if self.program is None:
            ids = tokens.contiguous()
            step = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
            return step.logits[:, -1]
        self.program.tokens.copy_(tokens)
        self.program.advance(self.cache)
        return self.program.found

    def _find(self, tokens: torch.Tensor) -> TokenProgram | None:
        """The program of the cache as it stands, None where the model's forward is to be called."""
        model, cache = self.model, self.cache
        self.look = self.programs.look()
        if not is_time_for_the_library(model.config.kernels):
            return None
        program = self.programs.find(FROM_IDS, TokenProgram, model, tokens, cache)
        return program if type(program) is TokenProgram and self._are_below(program.entries, tokens) else None

    def _are_below(self, entries: int, tokens: torch.Tensor) -> bool:
        """Whether the library finds the tokens in its table, and those that may follow; of others PyTorch says that
        there are none. Logits are as many as there are entries, or fewer: only somebody else can make others.
        """
        known = tokens if self.fill is None else torch.cat([tokens.flatten(), self.fill.flatten().to(tokens)])
        return bool(((0 <= known) & (known < entries)).all())
