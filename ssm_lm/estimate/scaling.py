"""Step time on paper: the roofline of a rank, ZeRO's volumes over the network, and what hides behind what.

docs/scaling.md has the equations with their assumptions; the names are the same here.
"""

import math
from typing import NamedTuple

import torch

from ..costs.devices import Device
from ..costs.flops import Part
from ..modeling.blocks import S4Block
from ..modeling.configuration_s4 import STATES, S4Config
from .memory import FLOAT, Pieces

# bytes that AdamW moves for a parameter: reads p, g, m, v, writes p, m, v
OPTIMIZER_TRAFFIC = 7 * FLOAT
# seconds of the host for an operator of eager PyTorch, or a launch of a kernel of ours: assumed, not measured
LAUNCH = 6e-6


class Network(NamedTuple):
    """Bytes/s a GPU and direction, within and between nodes; seconds a hop. Defaults: NVLink 4, 400 Gb/s a GPU."""

    intra: float = 450e9
    inter: float = 50e9
    latency: float = 10e-6
    gpus_per_node: int = 8

    def bus(self, ranks: int) -> float:
        """Bytes/s of a ring over `ranks`: every node's NICs together carry what NVLink carries within it."""
        if ranks <= self.gpus_per_node:
            return self.intra
        return min(self.intra, self.gpus_per_node * self.inter)


class Assumptions(NamedTuple):
    """efficiency: the share of the roofline that is reached. overlap: the share of the time of the computation beside
    it that communication may hide behind.
    """

    efficiency: float = 0.4
    overlap: float = 0.8


class StepTime(NamedTuple):
    """Seconds of one optimizer step on `ranks`. compute: forwards and backwards; communication: all of it, hidden or
    not; exposed: what is left to wait for; sequence: the exchange of states; step is the sum that counts.
    """

    ranks: int
    compute: float
    optimizer: float
    communication: float
    exposed: float
    sequence: float

    @property
    def step(self) -> float:
        return self.compute + self.optimizer + self.exposed + self.sequence


def roofline(
    pieces: Pieces, parts: list[Part], device: Device, precision: str, ssm_precision: str, checkpointing
) -> dict:
    """{piece: (seconds of arithmetic, seconds of memory)} of a forward and backward, at the device's peaks.

    precision, ssm_precision: "bf16", "tf32" or "fp32", of the projections and of the state spaces.
    """
    arithmetic = dict.fromkeys(("embedding", "ssm", "ffn", "head"), 0.0)
    for part in parts:
        piece = part.name if part.name in arithmetic else "ssm"
        peak = device.peak(ssm_precision if part.in_float32 else precision)
        arithmetic[piece] += (part.hardware - part.other) / peak + part.other / device.fp32
    traffic = {"embedding": _both(pieces.embedding), "ssm": 0, "ffn": 0, "head": _both(pieces.head)}
    for kind, sublayer in zip(pieces.kinds, pieces.block, strict=True):
        again = sublayer.forward_traffic if checkpointing else 0
        traffic["ssm" if STATES[kind] else "ffn"] += pieces.blocks * (_both(sublayer) + again)
    return {piece: (arithmetic[piece], traffic[piece] / device.bandwidth) for piece in arithmetic}


def launches(pieces: Pieces, checkpointing: bool) -> dict[str, int]:
    """{piece: kernels that a forward and backward launches}, at least: one an operator, and those of our kernels."""
    found = {piece: _launched(getattr(pieces, piece)) for piece in ("embedding", "head")} | {"ssm": 0, "ffn": 0}
    for kind, sublayer in zip(pieces.kinds, pieces.block, strict=True):
        again = sublayer.forward_launches if checkpointing else 0
        found["ssm" if STATES[kind] else "ffn"] += pieces.blocks * (_launched(sublayer) + again)
    return found


def _launched(trace) -> int:
    return trace.forward_launches + trace.backward_launches


def _both(trace) -> int:
    return trace.forward_traffic + trace.backward_traffic


def volumes(parameters: int, ranks: int, stage: int | None, accumulation: int) -> tuple[float, float]:
    """Bytes that a rank sends in a step: (beside forwards and backwards, between backward and the next forward).

    none, 0: an all-reduce of the gradients, 2 P, beside the last backward.
    1: a reduce-scatter, P, and an all-gather of the new parameters, P, after the step.
    2: a reduce-scatter a micro-batch, then the same all-gather.
    3: all-gathers in forward and backward and a reduce-scatter, 3 P, every micro-batch.
    P stands for 4 bytes x parameters x (W - 1) / W: gradients and parameters travel as float32.
    """
    P = FLOAT * parameters * (ranks - 1) / ranks
    if stage == 3:
        return 3 * P * accumulation, 0.0
    if stage == 2:
        return P * accumulation, P
    return (P, P) if stage == 1 else (2 * P, 0.0)


def state_exchange(config: S4Config, batch_size: int, ranks: int) -> tuple[int, int]:
    """(bytes that a rank receives in an exchange of sequence parallelism, on average; exchanges in a forward and
    backward). Each state of a layer, of a state space (B, H, N) or the tail of a convolution, is exchanged once in the
    forward and once in the backward. Independent of the length.
    """
    with torch.device("meta"):
        block = S4Block(config, 0)
    kept = [module.zero_state(batch_size).numel() for module in block.modules() if hasattr(module, "zero_state")]
    return FLOAT * sum(kept) * (ranks - 1) // len(kept), 2 * config.num_hidden_layers * len(kept)


def step_time(
    ranks: int,
    parameters: int,
    micro_batch: float,
    device: Device,
    network: Network,
    assumptions: Assumptions,
    *,
    stage: int | None,
    accumulation: int = 1,
    bucket: int = 50_000_000,
    sequence_ranks: int = 1,
    exchange: float = 0.0,
    exchanges: int = 0,
    launched: int = 0,
) -> StepTime:
    """One optimizer step. micro_batch: roofline seconds of a forward and backward on one rank, which launches so many
    kernels: a GPU that is done before the host has handed over the next one waits for it.

    bucket: elements a collective; exchange: bytes of a layer's state exchange, `exchanges` of them in a forward and
    backward, over sequence_ranks.
    """
    compute = accumulation * max(micro_batch / assumptions.efficiency, launched * LAUNCH)
    share = ranks if stage in (1, 2, 3) else 1
    optimizer = OPTIMIZER_TRAFFIC * parameters / share / device.bandwidth / assumptions.efficiency
    beside, after = volumes(parameters, ranks, stage, accumulation)
    hops = math.log2(ranks) if ranks > 1 else 0.0
    rate = network.bus(ranks)

    def seconds(volume):
        return volume / rate + volume / (FLOAT * bucket) * network.latency * hops

    # what computes beside it: the last backward, two thirds of a micro-batch; for stages 2 and 3 all of them
    window = {2: 2 / 3 * compute, 3: compute}.get(stage, 2 / 3 * compute / accumulation)
    communication = seconds(beside) + seconds(after)
    exposed = max(0.0, seconds(beside) - assumptions.overlap * window) + seconds(after)
    sequence = 0.0
    if sequence_ranks > 1:
        one = exchange / network.bus(sequence_ranks) + network.latency * math.log2(sequence_ranks)
        sequence = accumulation * exchanges * one
    return StepTime(ranks, compute, optimizer, communication, exposed, sequence)
