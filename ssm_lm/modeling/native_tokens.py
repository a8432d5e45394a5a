"""The decoding step from a token's id to the logits of the next one, in one run of the library: for the loop of
decoding_sampling.py, whose tokens follow one another and whose surroundings are known.

What Python does between two tokens it does with nothing near, for the weights have just gone through the processor:
a handful of calls are a tenth of a small model's token. Where nobody looks at them in between, greedy search takes
several tokens in one run.
"""

import ctypes
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from .native_library import for_c, library
from .native_step import (
    FROM_IDS,
    Program,
    Unsupported,
    is_time_for_the_library,
    most_rows,
    programs_of,
    weight_of_head,
)

AT_ONCE = 8  # tokens of greedy search in one run of the library, which hears no interrupt
STRETCH = 64  # for how many of them at most memory is made and the text put together


class Search(NamedTuple):
    """Greedy search. most: tokens of the whole text; ends (n): what ends a row, and is not chosen before the text has
    `least`; fill: the token of rows that have ended.
    """

    most: int
    ends: torch.Tensor
    least: int
    fill: int


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

    def searches(self, cache) -> bool:
        """Whether all of the step is the library's, and nobody records what drives the states."""
        return len(self.runs) == 1 and not any(layer.record_past for layer in cache.layers)

    def search(self, cache, rules: Search, length: int, room: int, unfinished, streamer, is_seen) -> torch.Tensor:
        """Up to `room` tokens after the ids in `tokens`, the last of a text of that length: see TokenSteps.search.
        is_seen(): whether the program still stands for the model, which it did.
        """
        chosen = torch.empty(2, room, self.rows, dtype=torch.int64, device="cpu")
        heard = () if streamer is None else chosen[1].unbind()  # who listens may write to them
        limit, at = ctypes.c_int64(), (ctypes.c_int64 * 2)(0, 1)
        ends = len(rules.ends), rules.ends, rules.least - length, rules.fill, unfinished
        places = *self.found.shape, self.found, self.tokens, room, chosen
        run = partial(library().search, *self.runs[0].args, limit, at, *map(for_c, (*places, *ends)))
        try:
            while at[0] < room and at[1] and (at[0] == 0 or is_seen()):
                limit.value = min(room, at[0] + AT_ONCE) if streamer is None else at[0] + 1
                run()
                if streamer is not None:
                    streamer.put(heard[at[0] - 1])
        finally:
            for layer in cache.layers:
                layer.after_update(0, at[0])
        return chosen[0, : at[0]].T

    def is_current(self, model: nn.Module, tokens: torch.Tensor, cache, look: tuple | None) -> bool:
        other = model.model.training or getattr(model.model.embed_tokens, "max_norm", None) is not None
        return not other and super().is_current(model, tokens, cache, look)


class TokenSteps:
    """Steps of an S4ForCausalLM on a cache, one token of every row each, in the library or by the model's forward.

    trust: how many tokens may follow one another before everything is looked at again. fill: the token of rows that
    have ended; or None.
    """

    def __init__(self, model: nn.Module, cache, trust: float, fill: torch.Tensor | None):
        self.model, self.cache, self.trust, self.fill = model, cache, trust, fill
        self.programs, self.program, self.look, self.left = programs_of(model.model), None, None, 0

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens: (B, 1). The logits (B, V) of what follows them, which are there until the next call."""
        program = self._current(tokens)
        self.left -= 1
        if program is None:
            ids = tokens.contiguous()
            step = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
            return step.logits[:, -1]
        program.tokens.copy_(tokens)
        program.advance(self.cache)
        return program.found

    def search(self, ids: torch.Tensor, rules: Search, unfinished: torch.Tensor, streamer) -> torch.Tensor | None:
        """Some tokens (B, T) that greedy search has after a text ids (B, L), which the streamer has heard of; None: ask
        for the logits. unfinished (B): 1 for the rows that go on, which is written to.
        """
        tokens, length = ids[:, -1:], ids.shape[1]
        program = self._current(tokens)
        if program is None or not program.searches(self.cache):
            return None
        program.tokens.copy_(tokens)
        room = min(STRETCH, self.left, rules.most - length)
        found = program.search(self.cache, rules, length, room, unfinished, streamer, self._is_seen)
        self.left -= found.shape[1]
        return found

    def _current(self, tokens: torch.Tensor) -> TokenProgram | None:
        """What the step on tokens (B, 1) runs as, looked for anew where it may have changed."""
        if not self.left or not self._is_seen():
            self.program, self.left = self._find(tokens), self.trust
        return self.program

    def _is_seen(self) -> bool:
        """Whether the last look still holds: see Programs."""
        return self.look is not None and self.look == self.programs.look()

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
