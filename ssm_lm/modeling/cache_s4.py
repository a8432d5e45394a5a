"""The recurrent states of one layer of the model as a layer of transformers' caches.

`DynamicCache(config=...)` and `StaticCache(config=...)` build one of these for every entry of `config.layer_types`, so
that generate(), beam search, prefill in chunks and offloading work on states as they do on keys and values. Memory
does not grow with the length.
"""

import torch
from transformers.cache_utils import STATIC_LAYER_TYPE_MAPPING, CacheLayerMixin


class S4CacheLayer(CacheLayerMixin):
    """states[i]: (B, H, N) float32, the state of the layer's i-th state space; empty before the first forward.

    memos[i]: what that state space derived from its parameters for single steps (see `StateSpace.forward`). It is
    right for as long as the parameters stay the same, which is also how long a state makes sense.
    """

    _layer_type = "s4"  # registers the class with DynamicCache
    is_compileable = True
    is_croppable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self, **kwargs):
        super().__init__()
        self.states: list[torch.Tensor] = []
        self.memos: list[dict] = []
        self.cumulative_length = 0

    # ---- what the model calls

    def get_state(self, index: int) -> torch.Tensor | None:
        """The state of the layer's state space `index`, or None where there is none yet."""
        return self.states[index] if index < len(self.states) else None

    def get_memo(self, index: int) -> dict:
        return self.memos[index]

    def update_state(self, index: int, state: torch.Tensor, num_new_tokens: int) -> None:
        """Put the state after `num_new_tokens` more tokens in the place of the old one."""
        if index == len(self.states):
            self.lazy_initialization(state)
        if torch.is_grad_enabled():
            self.states[index] = state  # keeps its graph: the caller may go back through several forwards, or detach
        elif state is not self.states[index]:  # the step kernel has advanced it in place
            self.states[index].copy_(state)  # stays at its address, for compiled and captured decoding
        if index == 0:  # every state of the layer sees the same tokens
            self._advance(num_new_tokens)

    def _advance(self, num_new_tokens: int) -> None:
        self.cumulative_length += num_new_tokens

    # ---- what transformers' Cache calls

    def lazy_initialization(self, key_states, value_states=None):
        """Room for one more state, shaped as the one given."""
        self.dtype, self.device = key_states.dtype, key_states.device
        state = torch.zeros_like(key_states, memory_format=torch.contiguous_format, requires_grad=False)
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(state)
        self.states.append(state)
        self.memos.append({})
        self.is_initialized = True

    def update(self, key_states, value_states=None, *args, **kwargs):
        raise NotImplementedError("an S4 cache layer holds states, not keys and values: call update_state")

    def get_mask_sizes(self, query_length):
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self):
        return self.cumulative_length

    def get_max_length(self):
        return -1

    def reset(self):
        for state in self.states:
            state.zero_()
        self.memos = [{} for _ in self.states]
        self.cumulative_length = 0

    def reorder_cache(self, beam_idx):
        self.states = [state.index_select(0, beam_idx.to(state.device)) for state in self.states]

    def batch_repeat_interleave(self, repeats):
        self.states = [state.repeat_interleave(repeats, dim=0) for state in self.states]

    def batch_select_indices(self, indices):
        self.states = [state[indices] for state in self.states]

    def offload(self):
        self.states = [state.to("cpu", non_blocking=True) for state in self.states]

    def prefetch(self):
        self.states = [state.to(self.device, non_blocking=True) for state in self.states]


class S4StaticCacheLayer(S4CacheLayer):
    """For compiled decoding: the length is a tensor that is advanced in place, so its value is no guard."""

    _layer_type = None  # leaves the dynamic registration alone

    def __init__(self, max_cache_len=None, **kwargs):
        super().__init__()
        self.cumulative_length = torch.tensor(0, dtype=torch.long)

    def lazy_initialization(self, key_states, value_states=None):
        super().lazy_initialization(key_states)
        self.cumulative_length = self.cumulative_length.to(key_states.device)
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(self.cumulative_length)

    def _advance(self, num_new_tokens):
        self.cumulative_length.add_(num_new_tokens)

    def get_seq_length(self):
        return self.cumulative_length if self.is_initialized else 0

    def reset(self):
        length = self.cumulative_length
        super().reset()
        self.cumulative_length = length.zero_()


STATIC_LAYER_TYPE_MAPPING["s4"] = S4StaticCacheLayer
