"""S4Config: the hyperparameters of a state space language model."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .adaptive import check_adaptive
from .checks import (
    DISCRETIZATIONS,
    check_blocks,
    check_heads,
    check_one_of,
    check_positive,
    check_sharing,
    check_system,
)
from .execution import MODES
from .hippo import INITIALIZATIONS
from .kernels_s4 import SETTINGS

# the kinds of sublayer, each with how many states it keeps between tokens; see mixers.py and feed_forwards.py
STATES = {"ssm": 1, "h3": 2, "gated": 2, "ffn": 0, "swiglu": 0}
# what one layer is made of; num_hidden_layers counts these
ARCHITECTURES = {
    "s4": ("ssm", "ssm", "ffn"),  # the language model of the S4 paper
    "s4-ffn": ("ssm", "ffn"),  # the plain alternation
    "h3": ("h3", "ffn"),  # a state space between products, as in H3 and Hyena
    "gated": ("gated",),  # a state space with a gate, as in Mamba
    "ssm": ("ssm",),  # state spaces alone, as in the papers' Long Range Arena models
}
GATES = ("glu", "half", "none")
NORMS = ("layer", "rms")
POOLINGS = ("mean", "last", "max")


@strict
class S4Config(PreTrainedConfig):
    """Configuration of S4Model and of the models on top of it.

    vocab_size: number of token ids.
    hidden_size: channels H, each with a state space of its own.
    num_hidden_layers: how many times the sublayers of `arch` are stacked.
    arch: "s4", [SSM, SSM, FFN] as in the S4 paper; "s4-ffn", [SSM, FFN]; "ssm", [SSM]; "h3", [H3, FFN]; "gated",
        [gated]; or a list of kinds of sublayer, such as [h3, swiglu, gated]. Kinds, with their equations in mixers.py
        and feed_forwards.py: "ssm", a state space and what mixes its channels; "h3", query * state space(key * value);
        "gated", a state space with a gate; "ffn", a Transformer's feed-forward network; "swiglu", one with gated hidden
        values and without biases.
    ssm: "s4", diagonal plus low rank; "s4d", diagonal; "s5", diagonal with one system for all channels; "ssd", diagonal
        with B and C from the token, in the sublayer gated alone.
    state_size: order N of every real system, even: N/2 conjugate pairs. For s5 it is the state of the whole layer.
    ssm_init: "legs", the default but for ssd; for s4 also "legt" (rank 2) and "fourier"; for s4d also "lin", "inv",
        "quad" and "real"; for ssd "rope", its default, frequencies as of rotary embeddings, "lin",
        "real", without any, and "lin+real", each for every other head.
    discretization: "bilinear", the only one for s4; "zoh", the default for s4d and s5.
    dt_min, dt_max: a channel's step, for s5 a state's, is drawn log-uniformly between them.
    n_ssm: how many (A, B, P) a layer has; the channels share them in turn. None: 1 for s4 and s5, one a channel for
        s4d.
    b_clip: largest |B_n| of the initialisation of s4 and s4d; None: no limit.
    head_dim: channels of a head. Of ssd: they share decay and step; None: 64, or all where they are fewer. Of h3:
        above 1, key and value are multiplied each with each, for head_dim times as many state spaces; None: 1. Blocks
        without heads pass over it, as a key that tools for transformers' models set on any config.
    selective_dt: of ssd, the token chooses the step of every head.
    ssm_blocks: s5 starts with so many copies of the HiPPO spectrum of order state_size / ssm_blocks.
    bidirectional: every state space reads the sequence from both ends. For classification only.
    mode: "chunk", "fft", "recurrent", for s5 also "associative"; or "auto", the fastest for the length at hand.
    chunk_size: tokens in a chunk of the chunk scan.
    kernels: "auto", the Triton kernels where they can run, which is on a GPU; "triton", an error where they cannot;
        "torch", never, and no decoding step in C on a CPU. The environment variable SSM_LM_KERNELS goes before it.
    conv_size: of h3 and gated, tokens that the short convolution before the state space sees, itself among them.
    expand: of gated, width of its branches in multiples of hidden_size.
    intermediate_size: width of the FFN; None: 4 * hidden_size, or 8/3 of it, up to a multiple of 8, where swiglu stands
        without ffn: as many parameters.
    hidden_act: activation after an SSM and inside an FFN.
    glu: what mixes the channels after an SSM: "glu", a linear layer to twice the width and a GLU, as in S4; "half",
        x * sigmoid(linear(x)), as in S5; "none", a linear layer.
    norm: "layer" or "rms", before every sublayer and after the last; None: "rms" where `arch` has a sublayer of a kind
        h3, gated or swiglu, else "layer".
    dropout: on the output of the activation and of every sublayer.
    embedding_dropout: on the embeddings.
    adaptive_cutoffs: where the vocabulary is cut into clusters, ids sorted by frequency; gives the model an adaptive
        embedding and an adaptive softmax (adaptive.py). Its `logits` are log-probabilities, float32. None: neither.
    adaptive_div_val: cluster i has vectors of hidden_size / adaptive_div_val^i entries.
    adaptive_tie_projections: with tie_word_embeddings, the tails of the softmax share the embedding's projections too.
    head_dropout: inside an adaptive softmax, on the projected hidden states; embedding_dropout then acts inside the
        adaptive embedding.
    loss_chunk_size: tokens whose logits exist at a time in the loss. A number makes the training mode, given labels,
        return a loss and no logits (None in the output), as an adaptive model always does; evaluation mode keeps them.
        None: logits as everywhere; the forward's skip_logits then decides call by call.
    tie_dropout: a channel is dropped at all positions of a sequence or at none.
    input_size: for classification, the number of features of a continuous input `inputs_embeds` (batch, length,
        input_size), which a linear encoder takes to hidden_size; None: the input is tokens, or of hidden_size.
    pooling: "mean", "last" or "max" over the positions that are not padding, for classification.
    layer_norm_epsilon: added to the variance that a norm divides by.
    initializer_range: standard deviation of matrices and embeddings at the start.
    tie_word_embeddings: the head shares the embedding's weights.
    use_cache, bos_token_id, eos_token_id, pad_token_id: as everywhere in transformers.
    Raises a ValueError that names the key for a value that makes no model.
    """

    model_type = "s4"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # before transformers 5.24, and from there on

    vocab_size: int = 50257
    hidden_size: int = 1024
    num_hidden_layers: int = 16
    arch: str | list[str] | tuple[str, ...] = "s4"
    ssm: str = "s4"
    state_size: int = 64
    ssm_init: str | None = None
    discretization: str | None = None
    dt_min: float = 0.001
    dt_max: float = 0.1
    n_ssm: int | None = None
    b_clip: float | int | None = None
    ssm_blocks: int = 1
    head_dim: int | None = None
    selective_dt: bool = False
    bidirectional: bool = False
    mode: str = "auto"
    chunk_size: int = 64
    kernels: str = "auto"
    conv_size: int = 4
    expand: int = 2
    intermediate_size: int | None = None
    hidden_act: str = "gelu"
    glu: str = "glu"
    norm: str | None = None
    dropout: float | int = 0.0
    embedding_dropout: float | int = 0.0
    tie_dropout: bool = False
    input_size: int | None = None
    pooling: str = "mean"
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    use_cache: bool = True
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 0
    pad_token_id: int | None = None
    tie_word_embeddings: bool = True
    adaptive_cutoffs: list[int] | tuple[int, ...] | None = None
    adaptive_div_val: int = 4
    adaptive_tie_projections: bool = True
    head_dropout: float | int = 0.0
    loss_chunk_size: int | None = None

    def __post_init__(self, **kwargs):
        # a choice that depends on another key is made here once, so that config.json says what was built
        if self.ssm in DISCRETIZATIONS and self.discretization is None:
            self.discretization = DISCRETIZATIONS[self.ssm][0]
        if self.ssm in INITIALIZATIONS and self.ssm_init is None:
            self.ssm_init = next(iter(INITIALIZATIONS[self.ssm]))
        if self.n_ssm is None:
            self.n_ssm = self.hidden_size if self.ssm == "s4d" else 1
        if self.intermediate_size is None:
            narrow = "swiglu" in self.arch and "ffn" not in self.arch
            self.intermediate_size = 8 * -(-self.hidden_size // 3) if narrow else 4 * self.hidden_size
        if self.norm is None:
            self.norm = "rms" if {"h3", "gated", "swiglu"} & set(self.sublayers) else "layer"
        super().__post_init__(**kwargs)

    @property
    def sublayers(self) -> tuple[str, ...]:
        """The kinds of sublayer in one layer, keys of STATES."""
        return ARCHITECTURES.get(self.arch, ()) if isinstance(self.arch, str) else tuple(self.arch)

    @property
    def layer_types(self) -> list[str]:
        """What transformers' caches hold for every layer: see cache_s4.py."""
        return ["s4"] * self.num_hidden_layers

    def validate_layer_type(self):
        """The base class knows attention layers only; "s4" is registered by cache_s4.py."""

    def validate_s4(self):
        if isinstance(self.arch, str):
            check_one_of("arch", self.arch, ARCHITECTURES)
        elif not set(self.arch) <= STATES.keys() or not any(STATES[kind] for kind in self.arch):
            raise ValueError(
                f"arch as a list holds kinds, {', '.join(STATES)}, and at least one with a state space, not "
                f"{list(self.arch)}"
            )
        if self.ssm not in INITIALIZATIONS:
            raise ValueError(
                f"ssm is one of {', '.join(INITIALIZATIONS)}, not {self.ssm!r}; a layer of your own is registered "
                "first: for commands, SSM_LM_LAYERS names its file"
            )
        for key, known in (
            ("mode", MODES),
            ("kernels", SETTINGS),
            ("glu", GATES),
            ("norm", NORMS),
            ("pooling", POOLINGS),
        ):
            check_one_of(key, getattr(self, key), known)
        counted = "vocab_size hidden_size num_hidden_layers intermediate_size n_ssm ssm_blocks input_size".split()
        counted += ["conv_size", "expand", "head_dim"]
        check_positive(**{key: getattr(self, key) for key in counted})
        self._check_kind()
        check_system(
            self.ssm,
            init=self.ssm_init,
            discretization=self.discretization,
            state_size=self.state_size,
            dt_min=self.dt_min,
            dt_max=self.dt_max,
            chunk_size=self.chunk_size,
            init_key="ssm_init",
            discretization_key="discretization",
        )
        check_blocks(self.state_size, self.ssm_blocks, "ssm_blocks")
        check_sharing(self.hidden_size, self.n_ssm, self.b_clip)
        if self.loss_chunk_size is not None and self.loss_chunk_size < 1:
            raise ValueError(f"loss_chunk_size must be positive or null, not {self.loss_chunk_size}")
        if self.adaptive_cutoffs is not None:
            check_adaptive(self.vocab_size, self.hidden_size, self.adaptive_cutoffs, self.adaptive_div_val)
        elif self.head_dropout:
            raise ValueError("head_dropout belongs to the adaptive softmax: set adaptive_cutoffs too, or leave it at 0")
        for key in ("dropout", "embedding_dropout", "head_dropout"):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f"{key} is a probability below 1, not {getattr(self, key)}")

    def _check_kind(self):
        """Keys that belong to one kind of state space alone."""
        if self.ssm != "s5" and self.mode == "associative":
            raise ValueError(f"mode associative is for ssm: s5, not for {self.ssm}")
        if self.ssm != "s5" and self.ssm_blocks != 1:
            raise ValueError(f"ssm_blocks is for ssm: s5, not for {self.ssm}")
        if self.ssm == "s5" and self.n_ssm != 1:
            raise ValueError(f"n_ssm must be 1 for ssm: s5, which is one system for all channels, not {self.n_ssm}")
        if self.ssm not in ("s4", "s4d") and self.b_clip is not None:
            raise ValueError(f"b_clip is for ssm: s4 and s4d; {self.ssm} has no B of that kind")
        if self.ssm == "ssd":
            self._check_ssd()
        elif self.selective_dt:
            raise ValueError(f"selective_dt is for ssm: ssd, not {self.ssm}")
        elif self.head_dim is not None and "h3" in self.sublayers:
            check_heads(self.hidden_size, self.head_dim, "hidden_size")

    def _check_ssd(self):
        kinds = [kind for kind in self.sublayers if STATES[kind]]
        if set(kinds) != {"gated"}:
            raise ValueError(
                "ssm: ssd has its B and C from the token, and the sublayer gated projects them: arch is gated, or a "
                f"list with it and no other mixer, not {self.arch!r}"
            )
        if self.bidirectional or self.mode == "fft":
            raise ValueError(
                "ssm: ssd is run in the modes chunk and recurrent, from the front; not bidirectional, not fft"
            )
        if self.n_ssm != 1:
            raise ValueError(f"n_ssm must be 1 for ssm: ssd, whose B and C are the token's, not {self.n_ssm}")
        if self.head_dim is not None:
            check_heads(self.expand * self.hidden_size, self.head_dim, "expand * hidden_size")
