"""A layer of the model: the sublayers of `arch`, each x + dropout(f(norm(x))) around a mixer or a feed-forward."""

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_s4 import STATES, S4Config
from .feed_forwards import FEED_FORWARDS
from .mixers import MIXERS
from .norms_and_dropout import add_dropped, at_gated_end, make_dropout, make_norm, norm_before


class S4Sublayer(nn.Module):
    """Pre-norm residual around a mixer or a feed-forward network."""

    def __init__(self, config: S4Config, inner: nn.Module):
        super().__init__()
        self.norm = make_norm(config, before_product=True)
        self.inner = inner
        self.dropout = make_dropout(config)
        self.kernels = config.kernels

    def forward(self, hidden_states, **kwargs):
        reads_rows = getattr(self.inner, "reads_rows", None)
        turned = reads_rows is not None and reads_rows(hidden_states, **kwargs)
        normed, hidden_states = norm_before(self.norm, hidden_states, turned)
        if getattr(self.inner, "takes_end", False):
            end = at_gated_end(hidden_states, self.dropout, self.kernels)
            if end is not None:
                return self.inner(normed, end=end, **kwargs)
        return add_dropped(hidden_states, self.inner(normed, **kwargs), self.dropout, self.kernels)


class S4Block(GradientCheckpointingLayer):
    """One layer of the architecture: [SSM, SSM, FFN] or another list of kinds, see ARCHITECTURES."""

    def __init__(self, config: S4Config, layer_index: int):
        super().__init__()
        self.kinds = config.sublayers
        self.sublayers = nn.ModuleList()
        states = 0  # of the sublayers so far: the cache holds those of a layer one after the other
        for kind in self.kinds:
            inner = MIXERS[kind](config, layer_index, states) if kind in MIXERS else FEED_FORWARDS[kind](config)
            self.sublayers.append(S4Sublayer(config, inner))
            states += STATES[kind]

    def forward(self, hidden_states, attention_mask=None, past_key_values=None, documents=None, **kwargs):
        along = {"attention_mask": attention_mask, "past_key_values": past_key_values, "documents": documents}
        for kind, sublayer in zip(self.kinds, self.sublayers, strict=True):
            hidden_states = sublayer(hidden_states, **(along if kind in MIXERS else {}))
        return hidden_states
