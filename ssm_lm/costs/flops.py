"""FLOPs of a training step, by the equations of this architecture.

Symbols: B sequences of L tokens in a forward; H hidden_size, N state_size, I intermediate_size, V vocab_size, T
chunk_size. A multiply-add counts as two operations. The backward of a matmul is two matmuls of its size, one for each
factor, so "backward" is twice "forward" but where the text says otherwise.

    a token's matmuls, forward                                                 in every
    out_proj       2 H g H                g = 2 for glu, else 1                sublayer ssm
    in, out_proj   8 H^2                  q, k, v; output                      sublayer h3, whose state space has
                                                                               head_dim H channels
                   6 E H                  two branches; output, E = expand H   sublayer gated, whose state space
                                                                               has E channels for H
    chunk scan     H (2 T + 4 N)          Toeplitz; inject and emit            S4, S4D
                   + H 2 N^2 / T          the dense carry, once a chunk        S4
                   P/2 (8 T + 16)         the same on complex signals, N = 2   S5 (P = state_size)
    B, C           4 H P                  inputs to states, states to outputs  S5
    chunk scan     H/P (2 T (N + P))      attention within a chunk             SSD (P channels a head), whose input has
                   + 4 H N                inject and emit                      2 N (+ H/P) features more
    FFN            4 H I; 6 H I                                                sublayers ffn; swiglu
    head           2 H V                  adaptive: see `_adaptive_head`       model

    a forward's matmuls whatever B and L: the operators of a chunk, by doubling, `_s4_operators`; for mode fft the
    kernel: Cauchy products, `_s4_kernel`, or a Vandermonde product, `_s4d_kernel`

Where S4's operators have a kernel they are no matmuls, but 8 H N^2 operations a token of a chunk, two thirds of the
doubling at N = T = 64. They are counted by the doubling there too.

What is recomputed in the backward comes apart from these, in `recompute`: the operators of a chunk scan, which are
made a second time instead of being kept, and under activation checkpointing the whole forward of the blocks.

`other` holds what a state space does beside matmuls: FFTs, at 2.5 n log2 n a real transform of n points, the
elementwise recurrence over its states, and the short convolution before it, 2 K a channel.
Not counted, as is usual: norms, activations, dropout, the softmax, the optimizer, the powers of a diagonal. They cost
memory traffic, not arithmetic.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers.activations import ACT2FN

from ..modeling.adaptive import cluster_bounds, cluster_widths
from ..modeling.configuration_s4 import STATES, S4Config
from ..modeling.execution import Execution, Problem, Rule, decide
from ..modeling.hippo import INITIALIZATIONS
from ..modeling.kernel_limits import limit_of_architecture
from ..modeling.mixers import make_state_space
from ..modeling.ssd import channels_of_a_head


class Part(NamedTuple):
    """Operations of one forward and backward over B L tokens, all layers together.

    forward, backward, recompute: in matmuls. other: all else, forward and backward. in_float32: of state spaces, what
    stays float32 under autocast: all but a kernel's scan of bfloat16 signals.
    """

    name: str
    forward: float
    backward: float
    recompute: float = 0.0
    other: float = 0.0
    in_float32: bool = False

    @property
    def model(self) -> float:
        """What the mathematics asks for; the numerator of MFU."""
        return self.forward + self.backward + self.other

    @property
    def hardware(self) -> float:
        """What is executed."""
        return self.model + self.recompute


def never(operation: str, unsupported: str | None, key: tuple) -> bool:
    """The rule of a CPU: no Triton kernel runs."""
    return False


def on_paper(config: S4Config, architecture: str) -> Rule:
    """The rule for a GPU that is not there: its kernels pass their self-checks."""
    usable = config.kernels != "torch" and limit_of_architecture(architecture) is None

    def runs(operation, unsupported, key):
        return usable and unsupported is None

    return runs


def training_execution(
    config: S4Config,
    length: int,
    needs_state: bool,
    runs: Rule = never,
    architecture: str = "interpreter",
    dtype: torch.dtype = torch.float32,
) -> Execution:
    """How a layer of this config runs in training, as it would decide itself. needs_state: carry_state. dtype: of the
    signal, which is bfloat16 under autocast of it.
    """
    with torch.device("meta"):
        layer = make_state_space(config)
    problem = Problem(
        config.mode,
        length,
        dtype,
        architecture,
        needs_state=needs_state,
        gradient=True,
        activation=ACT2FN[config.hidden_act] if "ssm" in config.sublayers else None,  # as a mixer asks
        cached=needs_state,
    )
    return decide(layer, problem, runs)


def training_flops(
    config: S4Config,
    batch_size: int,
    length: int,
    *,
    needs_state: bool = False,
    checkpointing: bool = False,
    tail_shares: Sequence[float] | None = None,
    task: str = "lm",
    runs: Rule = never,
    architecture: str = "interpreter",
    dtype: torch.dtype = torch.float32,
) -> list[Part]:
    """The parts of a forward and backward over (batch_size, length) tokens.

    needs_state: states are carried from window to window. checkpointing: activation checkpointing of the blocks.
    tail_shares: for an adaptive softmax, the share of the targets in every tail; None: every tail sees every token, as
    on a GPU. task: "lm", or "classification", whose head is one linear layer a sequence. runs, architecture: whether a
    Triton kernel runs, and on what; see `on_paper`. dtype: of the signals that state spaces take.
    """
    execution = training_execution(config, length, needs_state, runs, architecture, dtype)
    tokens = batch_size * length
    H, blocks = config.hidden_size, config.num_hidden_layers
    directions = 2 if config.bidirectional else 1

    # ---- embedding
    parts = []
    if config.input_size is not None:
        encoder = 2 * tokens * config.input_size * H
        parts.append(Part("embedding", encoder, encoder))  # the input needs no gradient
    elif config.adaptive_cutoffs is not None:
        projected = 2 * tokens * H * sum(_widths(config))  # every cluster's projection sees every token
        parts.append(Part("embedding", projected, 2 * projected))

    # ---- blocks
    matmuls, repeated = _projections(config, tokens)
    for name, forward in matmuls.items():
        parts.append(Part(name, forward, 2 * forward, repeated[name] if checkpointing else 0))
    wide, of_token = _gated_widths(config)
    in_h3 = (config.head_dim or 1) * H
    channels = Counter({"ssm": H, "h3": in_h3, "gated": wide}[kind] for kind in config.sublayers if STATES[kind])
    for width, layers in channels.items():
        found = _state_space(config, width, batch_size, length, execution, needs_state)
        for name, forward, backward, recompute, other in found:
            if checkpointing:
                recompute += forward
            scaled = (x * layers * blocks * directions for x in (forward, backward, recompute, other))
            low = name == "scan" and execution.kernel and execution.dtype == torch.bfloat16
            parts.append(Part(name, *scaled, in_float32=not low))
    convolved = blocks * sum(
        {"h3": 3 * H, "gated": wide + of_token.convolved}.get(kind, 0) for kind in config.sublayers
    )
    if convolved:
        parts.append(Part("convolution", 0, 0, other=3 * 2 * tokens * config.conv_size * convolved))

    # ---- head
    if task == "classification":
        head = 2 * batch_size * H * config.num_labels
    elif config.adaptive_cutoffs is None:
        head = 2 * tokens * H * config.vocab_size
    else:
        head = _adaptive_head(config, tokens, tail_shares)
    parts.append(Part("head", head, 2 * head))
    return parts


def total(parts: Sequence[Part], what: str = "model") -> float:
    """The sum of `what` ("model" or "hardware") over the parts."""
    return sum(getattr(part, what) for part in parts)


def _projections(config, tokens) -> tuple[dict[str, float], dict[str, float]]:
    """The matmuls of the sublayers beside those of their state spaces, by name: those of a forward, and those that are
    repeated under checkpointing. The recomputation ends at the last tensor that the backward asks for, which is the
    input of the block's last matmul, unless something after it, a dropout or a gate, has a tensor to make again.
    """
    H, inner = config.hidden_size, config.intermediate_size
    wide, of_token = _gated_widths(config)
    of_kind = {
        "ssm": [("out_proj", (2 if config.glu == "glu" else 1) * H)],
        "h3": [("in_proj", 3 * H), ("out_proj", H)],
        "gated": [("in_proj", 2 * wide + sum(of_token)), ("out_proj", wide)],
        "ffn": [("ffn", inner), ("ffn", inner)],
        "swiglu": [("ffn", 2 * inner), ("ffn", inner)],
    }
    order = [matmul for kind in config.sublayers for matmul in of_kind[kind]]
    forward = dict.fromkeys((name for name, _ in order), 0.0)
    for name, width in order:
        forward[name] += 2 * tokens * H * width * config.num_hidden_layers
    name, width = order[-1]
    gate_follows = config.sublayers[-1] == "ssm" and config.glu != "none"
    last = 0 if config.dropout or gate_follows else 2 * tokens * H * width * config.num_hidden_layers
    return forward, forward | {name: forward[name] - last}


class _OfToken(NamedTuple):
    """Features of a gated mixer that are no channels: b and c of an SSD, and its raw steps."""

    convolved: int
    steps: int


def _gated_widths(config) -> tuple[int, _OfToken]:
    """The channels of a gated mixer, and what else the input of its state space holds."""
    wide = config.expand * config.hidden_size
    if config.ssm != "ssd":
        return wide, _OfToken(0, 0)
    return wide, _OfToken(2 * config.state_size, _heads(config, wide) if config.selective_dt else 0)


def _heads(config, channels: int) -> int:
    return channels // channels_of_a_head(channels, config.head_dim)


def _widths(config) -> list[int]:
    return cluster_widths(config.hidden_size, len(config.adaptive_cutoffs) + 1, config.adaptive_div_val)


def _adaptive_head(config, tokens, tail_shares) -> float:
    """Cluster 0: a projection and n_0 + K logits a token. Tail i: a projection to d_i and n_i logits for its tokens."""
    H = config.hidden_size
    sizes = [end - first for first, end in cluster_bounds(config.vocab_size, config.adaptive_cutoffs)]
    widths = _widths(config)
    tails = len(sizes) - 1
    flops = 2 * tokens * H * (widths[0] + sizes[0] + tails)
    shares = [1.0] * tails if tail_shares is None else tail_shares
    for share, size, width in zip(shares, sizes[1:], widths[1:], strict=True):
        flops += 2 * tokens * share * width * (H + size)
    return flops


# ---- one state space, one direction: (name, forward, backward, recompute, other)


def _state_space(config, H, B, L, execution, needs_state):
    """Of one over H channels."""
    N, mode = config.state_size, execution.mode
    tokens, s5 = B * L, config.ssm == "s5"
    rank = len(INITIALIZATIONS["s4"][config.ssm_init](2).P) if config.ssm == "s4" else 0
    if s5:
        mixing = 4 * tokens * H * N  # x B_bar, states C
        yield "B and C", mixing, 2 * mixing, 0, 0
    if mode == "chunk" and s5 and execution.kernel:
        # a number of a state: half a complex product and a sum. Two launches over the sequence forward, two in reverse,
        # the last of which also sums its part of the gradient of Lambda
        yield "scan", 0, 0, 0, (4 + 4 + 4 + 8) * tokens * N
        return
    if config.ssm == "ssd":
        yield "scan", *_ssd(config, H, B, L, mode)
        return
    if mode == "chunk":
        scan, scan_other, operators = _chunk_scan(config, H, B, L, rank, execution)
        yield "scan", scan, 2 * scan, 0, 3 * scan_other
        if operators:
            yield "operators", operators, 2 * operators, operators, 0
        return
    kernel, kernel_backward, other = 0, 0, 0
    if mode == "fft":
        n = 1 << (2 * L - 1).bit_length()
        transform = 2.5 * n * math.log2(n)
        # real transforms forward: input and output; backward: the same two; the kernel's own: one each way. A complex
        # one (S5) is two real ones
        other = (4 * B + 2) * transform * (N if s5 else H)
        if config.ssm == "s4":
            kernel, kernel_backward = _s4_kernel(H, N, L, rank)
        elif config.ssm == "s4d":
            kernel = _s4d_kernel(H, N, L)
            kernel_backward = 2 * kernel
        if needs_state:  # one more pass, without output, for the final state
            scan, _, operators = _chunk_scan(config, H, B, L, rank, execution)
            kernel, kernel_backward = kernel + scan + operators, kernel_backward + 2 * scan + 3 * operators
    elif mode == "recurrent":
        if config.ssm == "s4":  # G^T h; and F times it, which for rank 1 is elementwise
            kernel = (2 if rank == 1 else 4 * rank) * tokens * H * N + _discretization(H, N, rank)
            kernel_backward = 2 * kernel
        other = 3 * 6 * tokens * N * (1 if s5 else H)  # the state times Lambda, plus the input, times C
    else:  # associative
        other = 3 * 4 * tokens * N * max(1, (L - 1).bit_length())  # a complex product and a sum a pass
    yield "kernel" if mode == "fft" else "scan", kernel, kernel_backward, 0, other


def _ssd(config, H, B, L, mode) -> tuple[float, float, float, float]:
    """(forward, backward, recompute, other) of one over H channels."""
    N, T, heads = config.state_size, min(config.chunk_size, L), _heads(config, H)
    if mode == "recurrent":
        read = 2 * B * L * H * N  # S^T c
        return read, 2 * read, 0, 3 * 6 * B * L * H * N
    scan = 0
    for size, chunks in ((T, L // T), (L % T, 1)):
        rows = B * chunks * size
        emitted = L > T  # the first chunk of all alone has no state before it
        scan += 2 * rows * size * (heads * N + H) + 2 * rows * H * N * (1 + emitted)
    # turning b and c, the mask of every pair, and the recurrence over the chunks
    other = B * L * heads * (2 * 3 * N + 4 * T) + 4 * B * (L // T) * H * N
    return scan, 2 * scan, 0, 3 * other


def _chunk_scan(config, H, B, L, rank, execution) -> tuple[float, float, float]:
    """(matmuls of the scan, its elementwise work, matmuls of the operators), forward."""
    T = min(execution.chunk_size, L)
    scan = elementwise = operators = 0
    # whole chunks, then what is left as one chunk of its own length; the kernel pads the sequence to whole chunks
    for size, chunks in ((T, -(-L // T)),) if execution.kernel else ((T, L // T), (L % T, 1)):
        if not size:
            continue
        signals, N, p = (config.state_size // 2, 2, 2) if config.ssm == "s5" else (H, config.state_size, 1)
        rows = B * chunks * signals
        scan += rows * 2 * (p * size) ** 2  # Toeplitz
        scan += rows * 2 * 2 * p * size * N  # inject, emit
        if config.ssm == "s4":
            scan += rows * 2 * N * N  # carry
            operators += _s4_operators(H, N, size, rank)
        else:
            elementwise += rows * 4 * N  # a complex product and a sum
    return scan, elementwise, operators


def _discretization(H, N, rank) -> float:
    """p^T w p, and the correction of B_bar, in einsum's order; a product by a 1 x 1 matrix does not count."""
    flops = 2 * H * N * rank**2 + 2 * H * N * N
    return flops if rank == 1 else flops + 2 * H * N * rank**2 + 2 * H * N * N * rank


def _s4_operators(H, N, T, rank) -> float:
    """Columns A^j B and rows C A^(j+1), j < T, by doubling: floor(log2 T) squarings of the dense A_bar (N, N)."""
    squarings = T.bit_length() - 1
    products = bin(T).count("1") - 1  # A^T from its binary digits
    flops = _discretization(H, N, rank) + 2 * H * N * N * rank  # A_bar = R(E) - F G^T
    flops += 2 * H * N * N  # C A
    flops += (squarings + products) * 2 * H * N**3
    flops += 2 * (T - 1) * 2 * H * N * N  # the other columns and rows
    return flops + 2 * H * N * T  # taps


def _s4_kernel(H, N, L, rank) -> tuple[float, float]:
    """Cauchy products at L/2 nodes, (1 + rank)^2 of them, two real sums each; and A_bar^L, by squarings."""
    nodes, products = (L + 1) // 2, (1 + rank) ** 2
    cauchy = 2 * 2 * H * nodes * (N // 2) * 2 * products
    power = _discretization(H, N, rank) + 2 * H * N * N * rank
    power += (L.bit_length() - 1) * 2 * H * N**3 + bin(L).count("1") * 2 * H * N * N
    # backward: the weights' gradient, and that of the resolvent, as much each; then sums over the nodes
    return cauchy + power, 2 * cauchy + H * nodes * N + 2 * power


def _s4d_kernel(H, N, L) -> float:
    """The Vandermonde product of two factors, l = q R + r: (Q, N) times (N, R)."""
    R = 1 << max(0, (L - 1).bit_length() // 2)
    return 2 * H * -(-L // R) * R * N
