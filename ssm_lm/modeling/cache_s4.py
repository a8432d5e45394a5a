"""The recurrent states of one layer of the model as a layer of transformers' caches.

`DynamicCache(config=...)` and `StaticCache(config=...)` build one of these for every entry of `config.layer_types`, so
that generate(), beam search, prefill in chunks and offloading work on states as they do on keys and values. Memory
does not grow with the length.

A state cannot be taken back, but it can be computed again. After `activate_past_recording` a layer keeps a snapshot of
each state and what has driven it since, so that `crop` brings the states to where they were some tokens ago: assisted
decoding needs that for the tokens that were drafted in vain.
"""

import weakref
from collections import defaultdict
from contextlib import nullcontext

import torch
from transformers.cache_utils import STATIC_LAYER_TYPE_MAPPING, CacheLayerMixin

from .single_steps import Memo


class Reference:
    """What a cache needs of a model, and does not own: a copy of the cache shares it, a pickle leaves it out."""

    def __init__(self, ssm=None):
        self.get = (lambda: None) if ssm is None else weakref.ref(ssm)

    def __deepcopy__(self, memo):
        return self

    def __reduce__(self):
        return Reference, ()


class Record:
    """One state as it was, and what has driven it since: enough to bring it to any token in between.

    snapshot: the state before the first recorded token, (B, H, N) of a state space, (B, K - 1, C) of a convolution.
    inputs[i]: (B, L_i, H or C), one entry a forward. ssm: what they drive, a StateSpace or a ShortConvolution.
    begins[i]: (B, L_i) bool, tokens before which the state became zero (the first of a document), or None.
    """

    def __init__(self, snapshot: torch.Tensor):
        self.snapshot = snapshot
        self.inputs: list[torch.Tensor] = []
        self.begins: list[torch.Tensor | None] = []
        self.ssm = Reference()

    def __len__(self) -> int:
        return sum(inputs.shape[1] for inputs in self.inputs)

    def append(self, ssm, inputs, begins) -> None:
        self.ssm = Reference(ssm)
        self.inputs.append(inputs)
        self.begins.append(begins)

    def state_after(self, length: int, memo: Memo | None) -> torch.Tensor:
        """The state after the first `length` tokens: step by step with the state space's memo, as one scan without."""
        ssm, state = self.ssm.get(), self.snapshot
        if ssm is None:
            raise ValueError("the model of this cache is gone: a cache that was read from a file needs a forward first")
        for inputs, begins in zip(self.inputs, self.begins, strict=True):
            part = min(length, inputs.shape[1])
            if part:
                state = ssm.advance(inputs[:, :part], state, memo, None if begins is None else begins[:, :part])
            length -= part
        return state

    def keep_last(self, length: int, memo: Memo | None) -> None:
        """Move the snapshot forward, so that the last `length` tokens are left: by one scan, which is faster over many
        tokens, or step by step where the parameters have left again (offloaded, or sharded).
        """
        surplus = len(self) - length
        parameter = next(self.ssm.get().parameters())
        here = parameter.device == self.snapshot.device and parameter.numel() > 0
        self.snapshot = self.state_after(surplus, None if here else memo)
        inputs = torch.cat(self.inputs, 1)[:, surplus:].clone()  # no view, which would keep all of them
        if any(begins is not None for begins in self.begins):
            pairs = zip(self.begins, self.inputs, strict=True)
            begins = [b if b is not None else x.new_zeros(x.shape[:2], dtype=torch.bool) for b, x in pairs]
            self.begins = [torch.cat(begins, 1)[:, surplus:].clone()]
        else:
            self.begins = [None]
        self.inputs = [inputs]

    def map(self, change) -> None:
        """Apply `change` to every tensor; their first dimension is the batch."""
        self.snapshot = change(self.snapshot)
        self.inputs = [change(inputs) for inputs in self.inputs]
        self.begins = [None if begins is None else change(begins) for begins in self.begins]


class S4CacheLayer(CacheLayerMixin):
    """states[i]: the layer's i-th state, float32, in the order in which a forward comes to them: (B, H, N) of a state
    space, (B, K - 1, C) the tail of a convolution; empty before the first forward.

    memos[i]: what that state space derived from its parameters for single steps (see `StateSpace.forward`), which is
    dropped when these were written to; the states stay, as keys and values would. It is no part of what the cache
    holds: what looks into a cache for its tensors (torch.export does) finds states and lengths.

    records[i]: while the past is recorded, state i as it was at the last crop and what has driven it since, else None.
    A record that grows to more than `max_recorded` tokens goes back to the last `min_recorded` of them, so at least
    these can be cropped, and memory stays bounded: max_recorded x hidden_size numbers a row and state space, of a
    convolution max_recorded x its channels.
    """

    __slots__ = ("memos",)  # outside of __dict__, where transformers' exporters look

    _layer_type = "s4"  # registers the class with DynamicCache
    is_compileable = True
    is_croppable = True
    is_sliding = False
    supports_early_init = False
    min_recorded, max_recorded = 128, 256

    def __init__(self, **kwargs):
        super().__init__()
        self.states: list[torch.Tensor] = []
        self.memos: dict[int, Memo] = defaultdict(Memo)
        self.records: list[Record | None] = []
        self.record_past = False
        self.cumulative_length = 0

    # ---- what the model calls

    def get_state(self, index: int) -> torch.Tensor | None:
        """The state of the layer's state space `index`, or None where there is none yet."""
        return self.states[index] if index < len(self.states) else None

    def get_memo(self, index: int) -> Memo:
        if not hasattr(self, "memos"):  # a cache that an exporter took apart and put together again
            self.memos = defaultdict(Memo)
        if torch.compiler.is_compiling():
            return self.memos[index] if index in self.memos else Memo()
        return self.memos[index]

    def update_state(
        self, index: int, state: torch.Tensor, num_new_tokens: int, ssm=None, inputs=None, documents=None
    ) -> None:
        """Put the state after `num_new_tokens` more tokens in the place of the old one.

        ssm, inputs (B, num_new_tokens, H), documents: the state space, what drove it and the documents in it, for the
        record. They are needed while the past is recorded.
        """
        if index == len(self.states):
            self.lazy_initialization(state)
        self.before_update(index)
        self._put(index, state)
        self.after_update(index, num_new_tokens, ssm, inputs, documents)

    def before_update(self, index: int) -> None:
        """To be called before state `index` changes, by whoever changes it where it lies; `after_update` after it."""
        if self.record_past and self.records[index] is None:
            self.records[index] = Record(self.states[index].clone())

    def after_update(self, index: int, num_new_tokens: int, ssm=None, inputs=None, documents=None) -> None:
        """The arguments are those of `update_state`."""
        if self.record_past:
            self._record(index, ssm, inputs, documents)
        if index == 0:  # every state of the layer sees the same tokens
            self._advance(num_new_tokens)

    def _put(self, index, state):
        if torch.is_grad_enabled():
            self.states[index] = state  # keeps its graph: the caller may go back through several forwards, or detach
        elif state is not self.states[index]:  # the step kernel has advanced it in place
            self.states[index].copy_(state)  # stays at its address, for compiled and captured decoding

    def _record(self, index, ssm, inputs, documents):
        record, begins = self.records[index], None
        if documents is not None:
            inputs = inputs.masked_fill((documents.seq_idx < 0)[..., None], 0)
            begins = documents.begins
        record.append(ssm, inputs, begins)
        if len(record) > self.max_recorded:
            record.keep_last(self.min_recorded, None if torch.is_grad_enabled() else self.get_memo(index))

    def _advance(self, num_new_tokens: int) -> None:
        self.cumulative_length += num_new_tokens

    # ---- what transformers' Cache calls

    def lazy_initialization(self, key_states, value_states=None):
        """Room for one more state, shaped as the one given."""
        self.dtype, self.device = key_states.dtype, key_states.device
        # a tensor of torch.inference_mode could not be written to after it, where the text may go on
        with nullcontext() if torch.compiler.is_compiling() else torch.inference_mode(False):
            state = torch.zeros_like(key_states, memory_format=torch.contiguous_format, requires_grad=False)
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(state)
        self.states.append(state)
        self.records.append(None)
        self.is_initialized = True

    def forget_states(self):
        """As before the first forward."""
        self.states, self.records, self.is_initialized = [], [], False

    def update(self, key_states, value_states=None, *args, **kwargs):
        raise NotImplementedError("an S4 cache layer holds states, not keys and values: call update_state")

    def get_mask_sizes(self, query_length):
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self):
        return self.cumulative_length

    def get_max_length(self):
        return -1

    def activate_past_recording(self):
        """From now on, keep what is needed to `crop` the last tokens. `reset` ends it."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Bring the states to where they were -tokens_to_remove (0 or more) tokens ago, and record from there.

        ValueError for a positive number, as in transformers, and for more tokens than are recorded: those since the
        last crop, at least `min_recorded` of them.
        """
        removed = -tokens_to_remove
        if removed < 0:
            raise ValueError(f"crop takes minus the number of tokens to remove, not {tokens_to_remove}")
        recorded = len(self.records[0]) if self.records and self.records[0] is not None else 0
        if removed > recorded:
            why = "since the last crop" if self.record_past else "without activate_past_recording"
            raise ValueError(f"cannot crop {removed} tokens: {recorded} are recorded {why}")
        if removed:
            for index, record in enumerate(self.records):
                # under autograd the memo would keep the graph of another forward
                memo = Memo() if torch.is_grad_enabled() else self.get_memo(index)
                self._put(index, record.state_after(recorded - removed, memo))
            self._advance(-removed)
        self.records = [None] * len(self.records)

    def reset(self):
        for state in self.states:
            state.zero_()
        self.memos = defaultdict(Memo)
        self.records = [None] * len(self.states)
        self.record_past = False
        self.cumulative_length = 0

    def _map(self, change):
        self.states = [change(state) for state in self.states]
        for record in self.records:
            if record is not None:
                record.map(change)

    def reorder_cache(self, beam_idx):
        """Every state keeps its address, as in `_put`."""
        old = self.states
        self._map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))
        if old and not torch.is_grad_enabled() and len(beam_idx) == len(old[0]):
            self.states = [state.copy_(chosen) for state, chosen in zip(old, self.states, strict=True)]

    def batch_repeat_interleave(self, repeats):
        self._map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices):
        self._map(lambda tensor: tensor[indices.to(tensor.device) if torch.is_tensor(indices) else indices])

    def offload(self):
        self._map(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self):
        self._map(lambda tensor: tensor.to(self.device, non_blocking=True))


class S4StaticCacheLayer(S4CacheLayer):
    """For compiled decoding: the length is a tensor that is advanced in place, so that no graph is guarded on its
    value. It does not record the past, for a record changes its shape with every token; transformers refuses assisted
    decoding with it, too.
    """

    _layer_type = None  # leaves the dynamic registration alone
    is_croppable = False

    def __init__(self, max_cache_len=None, **kwargs):
        super().__init__()
        self.cumulative_length = torch.tensor(0, dtype=torch.long)

    def lazy_initialization(self, key_states, value_states=None):
        super().lazy_initialization(key_states)
        self.cumulative_length = self.cumulative_length.to(key_states.device)
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(self.cumulative_length)

    def activate_past_recording(self):
        raise ValueError("a static cache records no past: use a DynamicCache where tokens are to be cropped")

    def _advance(self, num_new_tokens):
        self.cumulative_length.add_(num_new_tokens)

    def get_seq_length(self):
        return self.cumulative_length if self.is_initialized else 0

    def reset(self):
        length = self.cumulative_length
        super().reset()
        self.cumulative_length = length.zero_()


STATIC_LAYER_TYPE_MAPPING["s4"] = S4StaticCacheLayer


def check_holds_states(cache, layers: int) -> None:
    """ValueError unless a cache has states for so many layers: DynamicCache() makes room for keys and values."""
    found = getattr(cache, "layers", ())
    if len(found) != layers or not all(hasattr(layer, "get_state") for layer in found):
        raise ValueError(
            f"past_key_values does not hold the states of {layers} layers: make it with "
            "DynamicCache(config=model.config), or have the forward make it with use_cache=True"
        )
