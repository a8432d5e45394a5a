"""What works on each position by itself: (B, L, H) -> (B, L, H), I = intermediate_size.

ffn       f = W_down dropout(act(W_up x + b)) + b                      the position-wise network of a Transformer
swiglu    f = W_down dropout(silu(W_gate x) * (W_up x)), no biases     Shazeer, 2002.05202, equation 6
"""

from torch import nn
from transformers.activations import ACT2FN

from .configuration_s4 import S4Config
from .norms_and_dropout import after_activation, gated_by_silu, make_dropout


class S4FeedForward(nn.Module):
    """The position-wise network of a Transformer."""

    def __init__(self, config: S4Config):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.dropout = make_dropout(config)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.kernels = config.kernels

    def forward(self, hidden_states):
        x = self.up_proj(hidden_states)
        fused = after_activation(x, x.dtype, self.activation, self.dropout, self.kernels)
        return self.down_proj(self.dropout(self.activation(x)) if fused is None else fused(x))


class SwiGLU(nn.Module):
    """A feed-forward network whose hidden values are gated; of the size of "ffn" at two thirds of its width."""

    def __init__(self, config: S4Config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.dropout = make_dropout(config)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.kernels = config.kernels

    def forward(self, hidden_states):
        gate, up = self.gate_proj(hidden_states), self.up_proj(hidden_states)
        return self.down_proj(gated_by_silu(gate, up, self.dropout, self.kernels))


FEED_FORWARDS = {"ffn": S4FeedForward, "swiglu": SwiGLU}
