"""What moves information along the sequence: a state space, and what stands around it in a block.

    ssm     y = GLU(W_o dropout(act(SSM(x))) + b)             S4: Gu et al., 2111.00396
    h3      q, k, v = conv(W_i x);  y = W_o (q * SSM(k * v))    H3: Fu et al., 2212.14052, with Hyena's convolutions
                                                              on all three (Poli et al., 2302.10866)
    gated   u, z = W_i x;  y = W_o norm(SSM(silu(conv(u))) * silu(z))    the frame of Mamba: Gu and Dao, 2312.00752;
                                                              with an SSD, whose b and c are part of u, of Mamba-2:
                                                              2405.21060

SSM is any of ssm.py, with its D; conv a ShortConvolution; * the product of channels. A state space is linear and the
same at every token: it mixes what stands where in a text and cannot compare it. The products do.

Every mixer is (B, L, H) -> (B, L, H). What it keeps between tokens lies in the cache, one tensor a state: the
convolution's tail, then the state space's.
"""

import inspect
from collections.abc import Callable

import torch
from torch import nn
from transformers.activations import ACT2FN

from .configuration_s4 import S4Config
from .documents import Documents
from .execution import Execution, as_autocast, as_autocast_dtype
from .norms_and_dropout import after_activation, make_dropout, make_rms_norm
from .ops import gradient_in_rows
from .short_convolution import ShortConvolution
from .ssm import LAYERS, StateSpace


def make_state_space(config: S4Config, channels: int | None = None) -> StateSpace:
    """The state space of a config, over `channels`; None: hidden_size."""
    channels = channels or config.hidden_size
    layer = LAYERS[config.ssm]
    own = {
        # as many as hidden_size: one a channel
        "n_ssm": channels if config.n_ssm == config.hidden_size else config.n_ssm,
        "b_clip": config.b_clip,
        "blocks": config.ssm_blocks,
        "head_dim": config.head_dim,
        "selective": config.selective_dt,
    }
    takes = inspect.signature(layer).parameters  # each kind has some of these
    return layer(
        channels,
        config.state_size,
        init=config.ssm_init,
        discretization=config.discretization,
        dt_min=config.dt_min,
        dt_max=config.dt_max,
        chunk_size=config.chunk_size,
        bidirectional=config.bidirectional,
        **{key: value for key, value in own.items() if key in takes},
    )


def masked(x: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """x (B, L, C), zero where the mask (B, L or more) is. A padded token then drives no state; under left padding the
    state stays zero until the prompt begins.
    """
    if attention_mask is None:
        return x
    return x * attention_mask[:, -x.shape[1] :, None].to(x.dtype)


class Mixer(nn.Module):
    """A state space between the cache and the tokens; subclasses say what stands around it.

    layer_index, state_index: where the cache holds its state. channels: its width; None: hidden_size.
    """

    def __init__(self, config: S4Config, layer_index: int, state_index: int, channels: int | None = None):
        super().__init__()
        self.layer_index, self.state_index = layer_index, state_index
        self.mode = config.mode
        self.ssm = make_state_space(config, channels)
        self.ssm.kernels = config.kernels

    def cache_of(self, past_key_values):
        """The layer of the cache that holds the states, or None."""
        return None if past_key_values is None else past_key_values.layers[self.layer_index]

    def scan(
        self, x, cache, documents: Documents | None, activation: nn.Module | None = None
    ) -> tuple[torch.Tensor, Execution]:
        """activation(state space(x)), from the state in the cache, which it takes to the last token."""
        x = as_autocast(x)  # what a cache records is what was scanned
        state = None if cache is None else cache.get_state(self.state_index)
        execution = self.ssm.decide(
            x,
            self.mode,
            state,
            needs_state=cache is not None,
            documents=documents is not None,
            activation=activation,
            cached=cache is not None,
        )
        y, state = self.ssm(
            x,
            mode=self.mode,
            initial_state=state,
            output_final_state=cache is not None,
            memo=cache.get_memo(self.state_index) if cache is not None and not torch.is_grad_enabled() else None,
            seq_idx=documents,
            activation=activation,
            # a cache that records the past still needs the old state
            in_place=cache is not None and not torch.is_grad_enabled() and not cache.record_past,
            execution=execution,
        )
        if cache is not None:
            cache.update_state(self.state_index, state, x.shape[1], self.ssm, x, documents)
        return y, execution


class ConvolvedMixer(Mixer):
    """With a short convolution before the state space; its tail stands before that's state.

    convolved: its channels; None: the input of the state space.
    """

    def __init__(self, config: S4Config, layer_index: int, state_index: int, channels: int, convolved=None):
        super().__init__(config, layer_index, state_index + 1, channels)
        self.tail_index = state_index
        convolved = convolved or self.ssm.input_size - self.ssm.unconvolved
        self.conv = ShortConvolution(convolved, config.conv_size)
        self.conv.kernels = config.kernels

    def convolve(self, x, cache, documents: Documents | None, activation: str = "identity") -> torch.Tensor:
        """activation(conv(x)), from the tail in the cache, which it takes to the last token."""
        tail = None if cache is None else cache.get_state(self.tail_index)
        y, tail = self.conv(
            x, initial_state=tail, output_final_state=cache is not None, seq_idx=documents, activation=activation
        )
        if cache is not None:
            cache.update_state(self.tail_index, tail, x.shape[1], self.conv, x, documents)
        return y


class GatedProjection(nn.Linear):
    """W x + b, whose second half gates the first; with `end`, what that makes of W x and b: `at_gated_end`."""

    def forward(self, x, end: Callable | None = None):
        return super().forward(x) if end is None else end(nn.functional.linear(x, self.weight), self.bias)


class S4Mixer(Mixer):
    """A state space, then a position-wise layer, gated or not, that mixes the channels."""

    def __init__(self, config: S4Config, layer_index: int, state_index: int):
        super().__init__(config, layer_index, state_index)
        self.activation = ACT2FN[config.hidden_act]
        self.dropout = make_dropout(config)
        self.glu, self.kernels = config.glu, config.kernels
        if config.glu == "glu":
            self.out_proj = GatedProjection(config.hidden_size, 2 * config.hidden_size)
        else:
            self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    @property
    def takes_end(self) -> bool:
        """Whether `forward` takes an `end`; not with an adapter around the projection."""
        return type(self.out_proj) is GatedProjection

    def reads_rows(self, x, attention_mask=None, past_key_values=None, documents: Documents | None = None) -> bool:
        """Whether a forward of training over what is made of x (B, L, H) reads it as rows (H, B, L), without a copy."""
        if attention_mask is not None or past_key_values is not None or documents is not None:
            return False
        trains = torch.is_grad_enabled() or self.training
        return trains and self.ssm.fills_rows(x, self.mode, None if self._after_scan(x) else self.activation)

    def _after_scan(self, x) -> Callable | None:
        """Activation and dropout of what is scanned in one launch, or None."""
        return after_activation(x, as_autocast_dtype(x), self.activation, self.dropout, self.kernels)

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        past_key_values=None,
        documents: Documents | None = None,
        end: Callable | None = None,
    ):
        """end: of `at_gated_end`; what comes back is then the sublayer's output."""
        x = masked(hidden_states, attention_mask)
        fused = self._after_scan(x)
        activation = self.activation if fused is None else None
        y, execution = self.scan(x, self.cache_of(past_key_values), documents, activation)
        return self._mix((fused or self.dropout)(y), execution.in_rows, end)

    def _mix(self, y, in_rows: bool, end: Callable | None):
        more = () if end is None else (end,)
        # a quantised projection may read memory as it lies
        if in_rows and type(self.out_proj) in (nn.Linear, GatedProjection):
            y = gradient_in_rows(y)  # the order of memory in which the chunk scan's kernel works
            projected = self.out_proj(y.flatten(0, 1), *more).view(*y.shape[:2], -1)
        else:
            projected = self.out_proj(y.contiguous(), *more)
        if end is not None:
            return projected
        if self.glu == "half":
            return y * torch.sigmoid(projected)
        return nn.functional.glu(projected, dim=-1) if self.glu == "glu" else projected


class H3Mixer(ConvolvedMixer):
    """Query, key and value, convolved; the state space remembers k * v, and q asks it.

    With head_dim d above 1, k * v is the outer product of a head's key and value, d^2 numbers, each with a state space
    of its own, and q * y is the head's query times what came back: y_e = sum_c q_c SSM(k_c v_e). A head then tells d
    keys apart, by d times the state space.
    """

    def __init__(self, config: S4Config, layer_index: int, state_index: int):
        H, self.head_dim = config.hidden_size, config.head_dim or 1
        super().__init__(config, layer_index, state_index, channels=H * self.head_dim, convolved=3 * H)
        self.in_proj = nn.Linear(H, 3 * H, bias=False)
        self.out_proj = nn.Linear(H, H, bias=False)

    def forward(self, hidden_states, attention_mask=None, past_key_values=None, documents: Documents | None = None):
        cache = self.cache_of(past_key_values)
        x = self.in_proj(masked(hidden_states, attention_mask))
        q, k, v = self.convolve(x, cache, documents).chunk(3, -1)
        # masked once more, for the convolution has a bias
        y, _ = self.scan(masked(self._outer(k, v), attention_mask), cache, documents)
        return self.out_proj(self._inner(q, y))

    def _outer(self, k, v):
        """(B, L, H) twice -> (B, L, H d), in the order head, key, value."""
        if self.head_dim == 1:
            return k * v
        k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in (k, v))
        return (k[..., :, None] * v[..., None, :]).flatten(2)

    def _inner(self, q, y):
        """(B, L, H) and (B, L, H d) -> (B, L, H)."""
        if self.head_dim == 1:
            return q * y
        d = self.head_dim
        return (q.unflatten(-1, (-1, d))[..., None] * y.unflatten(-1, (-1, d, d))).sum(-2).flatten(2)


class GatedMixer(ConvolvedMixer):
    """One branch is convolved, activated and scanned, the other gates it; both are `expand` times as wide."""

    def __init__(self, config: S4Config, layer_index: int, state_index: int):
        wide = config.expand * config.hidden_size
        super().__init__(config, layer_index, state_index, channels=wide)
        self.in_proj = nn.Linear(config.hidden_size, self.ssm.input_size + wide, bias=False)
        self.norm = make_rms_norm(config, wide, before_product=True)
        self.out_proj = nn.Linear(wide, config.hidden_size, bias=False)

    def forward(self, hidden_states, attention_mask=None, past_key_values=None, documents: Documents | None = None):
        cache = self.cache_of(past_key_values)
        x = self.in_proj(masked(hidden_states, attention_mask))
        u, rest, gate = x.split([self.conv.channels, self.ssm.unconvolved, self.norm.normalized_shape[0]], -1)
        u = self.convolve(u, cache, documents, "silu")
        u = torch.cat([u, rest], -1) if self.ssm.unconvolved else u
        y, _ = self.scan(masked(u, attention_mask), cache, documents)
        return self.out_proj(self.norm(y, gate))


MIXERS = {"ssm": S4Mixer, "h3": H3Mixer, "gated": GatedMixer}
