"""Memory of a rank in training: states by ZeRO stage, activations and workspace as the real code allocates them.

States, for P parameters on W ranks, in bytes (parameters, gradients and AdamW's two moments are float32: under bf16
the matmuls are autocast, and the parameters stay as they are):

    stage          parameters      gradients           optimizer       buckets
    none, 0        4 P             4 P                 8 P             none: 4 P of DDP where W > 1; 0: see below
    1              4 P             4 P                 12 P / W        r at a time
    2              4 P             4 P / W             12 P / W        two of r
    3              4 P / W         4 P / W             12 P / W        two of r, and the gathered parameters

The 12 are the moments and a master copy, which DeepSpeed keeps for float32 parameters too; r is reduce_bucket_size.
Stage 3 gathers 4 P again, up to stage3_max_live_parameters (10^9), before it gives any of it back, and without
checkpointing autograd keeps the forward's copy beside the backward's.

Activations and workspace are counted (trace.py) for one sublayer of each kind, the embedding, and the head with its
loss, and added up along a step:

    forward   of piece k:  sum of kept_j over j < k                + forward peak_k
    backward  of piece k:  sum of kept_j over j < k                + backward peak_k + gradients of the pieces after k
    checkpointing:         blocks keep their input alone, and are run again, sublayer by sublayer, before their backward
    step:                  all gradients, and what the optimizer or the engine makes for a moment

The largest of these is the peak. Not in it: the CUDA context and NCCL's buffers (about 1 GB a rank), the allocator's
fragmentation, and the inside of library calls (cuBLAS, cuFFT).
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import nn

from ..internals.torch import FakeTensorMode
from ..modeling.configuration_s4 import S4Config
from ..modeling.kernel_launch import assume
from .fused import FusedOperators
from .kernels import STAND_INS
from .trace import Trace, trace

FLOAT = 4
# DeepSpeed's default for what stage 0 reduces at a time, in elements
STAGE_0_BUCKET = 500_000_000


class Pieces(NamedTuple):
    """A model, counted. parameters: all; sizes by piece in bytes: see `Trace`. block: the sublayers of one block."""

    parameters: int
    largest: int  # parameter
    embedding: Trace
    block: tuple[Trace, ...]
    kinds: tuple[str, ...]  # of the sublayers: keys of STATES
    blocks: int
    head: Trace
    block_input: int


class Memory(NamedTuple):
    """Bytes of a rank at the moment of the peak."""

    stage: int | None
    parameters: int
    optimizer: int
    gradients: int
    buckets: int
    activations: int
    workspace: int
    moment: str

    @property
    def total(self) -> int:
        return sum(self[1:7])


class _Embedding(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model
        self.embed = model.embed_tokens if model.embed_tokens is not None else model.encoder
        self.dropout = model.embedding_dropout

    def forward(self, inputs):
        return self.dropout(self.embed(inputs))


class _LanguageModelHead(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.norm, self.head = model.model.norm, model.lm_head
        self.loss = model.loss_without_logits

    def forward(self, hidden_states, labels):
        return self.loss(self.norm(hidden_states), labels)


class _ClassificationHead(nn.Module):
    def __init__(self, model):
        super().__init__()
        from ..modeling.modeling_s4 import pool

        self.norm, self.score, self.pool, self.pooling = model.model.norm, model.score, pool, model.config.pooling

    def forward(self, hidden_states, labels):
        logits = self.score(self.pool(self.norm(hidden_states), None, self.pooling))
        return nn.functional.cross_entropy(logits.float(), labels)


@contextmanager
def on_gpu(architecture: str) -> Iterator[None]:
    """Within, models run as they would on a GPU of this architecture, on tensors without data."""
    with assume(architecture, STAND_INS), FusedOperators():
        yield


def count_pieces(
    config: S4Config,
    batch_size: int,
    length: int,
    *,
    autocast: torch.dtype | None = None,
    architecture: str | None = None,
    needs_state: bool = False,
    task: str = "lm",
) -> Pieces:
    """Count a model of this config in training. Nothing is allocated.

    architecture: of a GPU, as in costs/devices.py: counts with the kernels, the segments and the fixed shapes that it
    uses; None: as on a CPU. needs_state: carry_state.
    """
    from ..modeling.cache_s4 import S4CacheLayer
    from ..modeling.configuration_s4 import STATES
    from ..modeling.modeling_s4 import S4ForCausalLM, S4ForSequenceClassification

    config = type(config).from_dict(config.to_dict() | {"use_cache": False})
    parameters, largest = parameter_counts(config, task)
    one = type(config).from_dict(config.to_dict() | {"num_hidden_layers": 1})
    with on_gpu(architecture) if architecture else nullcontext(), FakeTensorMode():
        causal = task == "lm"
        model = (S4ForCausalLM if causal else S4ForSequenceClassification)(one).train()
        if causal and one.adaptive_cutoffs is not None:
            model.lm_head.fixed_shape = lambda hidden_states: True
        ids = torch.zeros(batch_size, length, dtype=torch.long)
        inputs = ids if one.input_size is None else torch.zeros(batch_size, length, one.input_size)
        embedding = trace(_Embedding(model.model), [inputs], autocast)
        hidden = torch.empty(batch_size, length, one.hidden_size, requires_grad=True)
        sublayers, counted = [], {}
        cache = _OneLayerCache([S4CacheLayer()])
        for kind, sublayer in zip(one.sublayers, model.model.layers[0].sublayers, strict=True):
            if kind not in counted:
                kwargs = {"past_key_values": cache} if needs_state and STATES[kind] else {}
                hidden.grad = None
                counted[kind] = trace(sublayer, [hidden], autocast, **kwargs)
            elif needs_state and STATES[kind]:  # not counted, but those after it find their place in the cache
                cache.layers[0].states += [hidden] * STATES[kind]
            sublayers.append(counted[kind])
        head = (_LanguageModelHead if causal else _ClassificationHead)(model)
        hidden.grad = None
        labels = ids if causal else torch.zeros(batch_size, dtype=torch.long)
        head = trace(head, [hidden, labels], autocast)
    return Pieces(
        parameters,
        largest,
        embedding,
        tuple(sublayers),
        config.sublayers,
        config.num_hidden_layers,
        head,
        FLOAT * batch_size * length * config.hidden_size,
    )


class _OneLayerCache(NamedTuple):
    layers: list


def parameter_counts(config: S4Config, task: str = "lm") -> tuple[int, int]:
    """(all parameters, the largest one), exactly, from a model on the meta device. Tied parameters count once."""
    from ..modeling.modeling_s4 import S4ForCausalLM, S4ForSequenceClassification

    with torch.device("meta"):
        model = (S4ForCausalLM if task == "lm" else S4ForSequenceClassification)(config)
    sizes = [p.numel() for p in model.parameters()]
    return sum(sizes), max(sizes)


def rank_memory(
    pieces: Pieces,
    *,
    stage: int | None = None,
    ranks: int = 1,
    checkpointing: bool = False,
    accumulates: bool = False,
    reduce_bucket: int = 50_000_000,
    overlap: bool = True,
    max_live_parameters: int = 1_000_000_000,
) -> Memory:
    """The peak of one rank.

    stage: a ZeRO stage of DeepSpeed; None: plain torch, with DDP where ranks > 1. accumulates: gradients of earlier
    batches are there when a forward begins. reduce_bucket: elements. overlap: overlap_comm.
    max_live_parameters: stage3_max_live_parameters.
    """
    P, W = FLOAT * pieces.parameters, ranks
    bucket = FLOAT * reduce_bucket
    parameters = P // W if stage == 3 else P
    optimizer = 3 * P // W if stage in (1, 2, 3) else 2 * P
    gradient_share = 1 / W if stage in (2, 3) else 1
    gradients = int(P * gradient_share)
    buckets = 0
    if stage is None and W > 1:
        buckets = P
    elif stage in (1, 2):
        buckets = bucket * (2 if overlap else 1)
    elif stage == 3:
        # a model below max_live_parameters stays gathered once it was, and what autograd has saved of the forward's
        # copy stays until its backward; buckets and gradients exist from the start
        gathered = min(P, FLOAT * max_live_parameters) + (0 if checkpointing else P)
        buckets = bucket * (2 if overlap else 1) + gathered

    # ---- the step of the optimizer
    if stage is None:
        momentary = FLOAT * pieces.largest
    elif stage == 0:
        momentary = min(P, FLOAT * STAGE_0_BUCKET)
    else:
        momentary = (2 if stage < 3 else 1) * P // W  # the gradients of the rank's share, copied into one tensor
    at_step = P if stage is None and W > 1 else 0  # DeepSpeed has given its buckets back by then
    best = (gradients + at_step + momentary, gradients, 0, momentary, "optimizer step", at_step)

    for moment, kept, peak, later in _moments(pieces, checkpointing):
        held = (
            gradients if accumulates or stage == 3 else min(gradients, int(later * gradient_share))
        )  # tied ones come twice
        best = max(best, (held + buckets + peak, held, kept, peak - kept, moment, buckets))
    _, held, activations, workspace, moment, buckets = best
    return Memory(stage, parameters, optimizer, held, buckets, activations, workspace, moment)


def _moments(pieces: Pieces, checkpointing: bool):
    """(name, activations kept, activations and workspace, gradients that are there) along a forward and backward."""
    kept_by_block = pieces.block_input if checkpointing else sum(sublayer.kept for sublayer in pieces.block)
    kept = 0
    yield "forward of the embedding", 0, pieces.embedding.forward_peak, 0
    kept += pieces.embedding.kept
    for block in range(pieces.blocks):
        inside = 0
        for sublayer in pieces.block:
            yield f"forward of block {block + 1}", kept + inside, kept + inside + sublayer.forward_peak, 0
            if not checkpointing:
                inside += sublayer.kept
        kept += kept_by_block
    yield "forward of the loss", kept, kept + pieces.head.forward_peak, 0
    yield "backward of the loss", kept + pieces.head.kept, kept + pieces.head.backward_peak, 0
    gradients = pieces.head.gradients
    for block in reversed(range(pieces.blocks)):
        kept -= kept_by_block
        inside = sum(sublayer.kept for sublayer in pieces.block)
        for sublayer in reversed(pieces.block):
            inside -= sublayer.kept
            yield (
                f"backward of block {block + 1}",
                kept + inside + sublayer.kept,
                kept + inside + sublayer.backward_peak,
                gradients,
            )
            gradients += sublayer.gradients
    yield "backward of the embedding", pieces.embedding.kept, pieces.embedding.backward_peak, gradients
