"""A language model as a plain function of token ids and states, as exporters of graphs take it.

    (input_ids (B, L), states) -> (logits, states)

A cache is an object that a forward changes; a graph has inputs and outputs. The states are those of the cache, layer
after layer, each (B, ...) float32; all zero before a text begins. torch.export takes the function for any B and L:

    graph = StatesInAndOut(model)
    program = torch.export.export(graph, (ids, graph.first_states(2)), dynamic_shapes=graph.dynamic_shapes(length=True))

Any L is a scan over tokens. A graph of a fixed L is chunks, as in training, and a program of its own.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from transformers import DynamicCache

from ..modeling.single_steps import Memo
from ..modeling.state_space import StateSpace


class _Layer:
    """What a mixer asks a layer of a cache for, on given states."""

    record_past = False

    def __init__(self, states: list[torch.Tensor], memos: dict[int, Memo]):
        self.states, self.memos = list(states), memos

    def get_state(self, index: int) -> torch.Tensor:
        return self.states[index]

    def get_memo(self, index: int) -> Memo:
        return self.memos.get(index) or Memo()

    def update_state(self, index: int, state: torch.Tensor, *what_drove_it) -> None:
        self.states[index] = state


class _Cache:
    def __init__(self, layers: list[_Layer]):
        self.layers = layers


class StatesInAndOut(nn.Module):
    """model: an S4ForCausalLM, in evaluation mode. last_only: logits (B, V) of the last token, not (B, L, V)."""

    def __init__(self, model, last_only: bool = False):
        super().__init__()
        self.model, self.last_only = model, last_only
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model.model(torch.zeros(1, 1, dtype=torch.long, device=model.device), past_key_values=cache, use_cache=True)
        self.zero = [[torch.zeros_like(state) for state in layer.states] for layer in cache.layers]
        self.memos: list[dict[int, Memo]] = [{} for _ in self.zero]

    def first_states(self, batch: int) -> list[torch.Tensor]:
        """Of a text that has not begun."""
        return [state.repeat_interleave(batch, 0) for layer in self.zero for state in layer]

    def state_names(self) -> list[str]:
        return [f"state_{i}_{j}" for i, layer in enumerate(self.zero) for j in range(len(layer))]

    def dynamic_shapes(self, length: bool = False) -> tuple:
        """For torch.export: the batch, and with `length` the length too, may be any."""
        batch = torch.export.Dim("batch")
        ids = {0: batch} | ({1: torch.export.Dim("length")} if length else {})
        return ids, [{0: batch} for _ in self.state_names()]

    def forward(self, input_ids: torch.Tensor, states: list[torch.Tensor]):
        given, layers = list(states), []
        for zero, memos in zip(self.zero, self.memos, strict=True):
            layers.append(_Layer(given[: len(zero)], memos))
            given = given[len(zero) :]
        hidden = self.model.model(input_ids=input_ids, past_key_values=_Cache(layers)).last_hidden_state
        logits = self.model.lm_head(hidden[:, -1] if self.last_only else hidden)
        return logits, [state for layer in layers for state in layer.states]


OPERATORS = "operators", "operators_with_skip"  # the methods of a state space that make them


@contextlib.contextmanager
def derived_once(graph: StatesInAndOut, length: int) -> Iterator[None]:
    """What is derived from the parameters for `length` tokens a call is made now, in the precision that it needs, and
    is a constant of graphs that are made within the block: a runtime need not know powers and float64.
    """
    with torch.no_grad():
        spaces = [module for module in graph.model.modules() if isinstance(module, StateSpace)]
        if length > 1:
            for space in spaces:
                if space.is_time_invariant:
                    made = {name: getattr(space, name)(length) for name in OPERATORS}
                    vars(space).update({name: _constantly(operators) for name, operators in made.items()})
        mixers = [m for m in graph.model.modules() if isinstance(getattr(m, "ssm", None), StateSpace)]
        for mixer in mixers:
            memo = Memo()
            memo.discrete = mixer.ssm.discretize()
            graph.memos[mixer.layer_index][mixer.state_index] = memo
    try:
        yield
    finally:
        graph.memos = [{} for _ in graph.zero]
        for space in spaces:
            for name in OPERATORS:
                vars(space).pop(name, None)


def _constantly(operators):
    return lambda length, reverse=False: operators
