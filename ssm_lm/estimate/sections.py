"""The sections of an estimate's report, each counted from the same run on paper."""

import math

import torch

from ..costs.devices import DEVICES
from ..costs.flops import on_paper, total, training_execution, training_flops
from .memory import Memory, count_pieces, rank_memory
from .scaling import LAUNCH, Assumptions, Network, StepTime, launches, roofline, state_exchange, step_time
from .subject import Subject

STAGES = (None, 0, 1, 2, 3)
RANKS = [8 * 2**k for k in range(10)]  # 8 to 4096
# what a rank holds beside tensors: the CUDA context, NCCL's buffers; and the share of the memory that is aimed at
RESERVED, USABLE = 2e9, 0.92


class OnPaper:
    """A run with what was counted of it. args: the command's; see the methods for the sections, each as JSON has it."""

    def __init__(self, subject: Subject, args):
        self.subject, self.args = subject, args
        self.device, self.ranks = DEVICES[args.device], args.nodes * args.gpus
        self.network = Network(args.intra * 1e9, args.inter * 1e9, gpus_per_node=args.gpus)
        config = subject.config
        architecture = self.device.architecture
        # state spaces take their signals in bfloat16, not in float16
        signal = torch.bfloat16 if subject.autocast == torch.bfloat16 else torch.float32
        rule = {"runs": on_paper(config, architecture), "architecture": architecture, "dtype": signal}
        self.pieces = self._count(subject.batch)
        self.parts = training_flops(
            config,
            subject.batch,
            subject.local_length,
            needs_state=subject.needs_state,
            checkpointing=subject.checkpointing,
            task=subject.task,
            **rule,
        )
        self.execution = training_execution(config, subject.local_length, subject.needs_state, **rule)
        self.limits = roofline(
            self.pieces, self.parts, self.device, subject.precision, subject.ssm_precision, subject.checkpointing
        )
        self.launches = launches(self.pieces, subject.checkpointing)
        self.micro_batch = sum(max(pair) for pair in self.limits.values())  # seconds of it
        self.exchange, self.exchanges = state_exchange(config, subject.batch, subject.sequence_ranks)

    def _count(self, batch: int):
        """The pieces of a micro-batch of so many sequences on one rank."""
        return count_pieces(
            self.subject.config,
            batch,
            self.subject.local_length,
            task=self.subject.task,
            autocast=self.subject.autocast,
            architecture=self.device.architecture,
            needs_state=self.subject.needs_state,
        )

    def _rank_memory(self, pieces, stage: int | None, checkpointing: bool) -> Memory:
        zero = self.subject.zero
        layout = {"reduce_bucket": self.subject.bucket, "overlap": bool(zero.get("overlap_comm", True))}
        if "stage3_max_live_parameters" in zero:
            layout["max_live_parameters"] = int(zero["stage3_max_live_parameters"])
        accumulates = self.subject.accumulation > 1
        return rank_memory(
            pieces, stage=stage, checkpointing=checkpointing, ranks=self.ranks, accumulates=accumulates, **layout
        )

    def _step(self, ranks: int, stage: int | None) -> StepTime:
        return step_time(
            ranks,
            self.pieces.parameters,
            self.micro_batch,
            self.device,
            self.network,
            Assumptions(self.args.efficiency, self.args.overlap),
            stage=stage,
            accumulation=self.subject.accumulation,
            bucket=self.subject.bucket,
            sequence_ranks=self.subject.sequence_ranks,
            exchange=self.exchange,
            exchanges=self.exchanges,
            launched=sum(self.launches.values()),
        )

    # ---- sections

    def model(self) -> dict:
        config = self.subject.config
        return {
            "parameters": self.pieces.parameters,
            "layers": f"{config.num_hidden_layers} x [{', '.join(config.sublayers)}]",
            "ssm": config.ssm,
            "mode": self.execution.mode,
            "kernel": self.execution.kernel,
        }

    def plan(self) -> dict:
        subject = self.subject
        sequences = subject.global_batch(self.ranks)
        return {
            "device": self.device.name,
            "nodes": self.args.nodes,
            "gpus_per_node": self.args.gpus,
            "sequence_length": subject.length,
            "sequence_ranks": subject.sequence_ranks,
            "per_device_batch": subject.batch,
            "gradient_accumulation_steps": subject.accumulation,
            "sequences_per_step": sequences,
            "tokens_per_step": sequences * subject.length,
            "steps": subject.steps(self.ranks),
            "zero_stage": subject.stage,
            "activation_checkpointing": subject.checkpointing,
            "precision": subject.precision,
            "state_space_precision": subject.ssm_precision,
        }

    def flops_per_token(self) -> dict:
        tokens = self.subject.batch * self.subject.local_length
        return {
            "model": total(self.parts) / tokens,
            "hardware": total(self.parts, "hardware") / tokens,
            "parts": [
                {"part": p.name, "forward": p.forward / tokens, "backward": p.backward / tokens}
                | {"recompute": p.recompute / tokens, "other": p.other / tokens}
                for p in self.parts
            ],
        }

    def memory(self) -> dict:
        """Four sections: every stage with and without checkpointing, the run itself, and what a larger batch takes."""
        subject = self.subject
        options = [
            {"stage": stage, "activation_checkpointing": policy}
            | _as_json(self._rank_memory(self.pieces, stage, policy))
            for stage in STAGES
            for policy in (False, True)
        ]
        here = self._rank_memory(self.pieces, subject.stage, subject.checkpointing)
        larger = self._rank_memory(self._count(subject.batch + 1), subject.stage, subject.checkpointing)
        budget, a_sequence = self.device.memory * USABLE - RESERVED, larger.total - here.total
        recommended = subject.batch + math.floor((budget - here.total) / max(1, a_sequence))
        return {
            "memory": options,
            "memory_as_configured": _as_json(here) | {"device": self.device.memory, "budget": budget},
            "bytes_of_one_more_sequence": a_sequence,
            "recommended_per_device_batch": max(0, recommended),
        }

    def roofline(self) -> dict:
        return {
            piece: {"arithmetic": a, "memory": m, "launches": self.launches[piece]}
            for piece, (a, m) in self.limits.items()
        }

    def sublayers(self) -> dict:
        """Of one sublayer of each kind, forward and backward: bytes that are moved, the least that can be, those of our
        kernels, launches.
        """
        kinds = dict(zip(self.pieces.kinds, self.pieces.block, strict=True))
        return {
            kind: {
                way: {
                    "bytes": getattr(trace, f"{way}_traffic"),
                    "least": getattr(trace, f"{way}_least"),
                    "in_kernels": getattr(trace, f"{way}_in_kernels"),
                    "launches": getattr(trace, f"{way}_launches"),
                }
                for way in ("forward", "backward")
            }
            for kind, trace in kinds.items()
        }

    def time(self) -> dict:
        subject = self.subject
        step, steps = self._step(self.ranks, subject.stage), subject.steps(self.ranks)
        tokens = subject.global_batch(self.ranks) * subject.length
        flops = total(self.parts) * subject.accumulation
        return step._asdict() | {
            "step": step.step,
            "tokens_per_second": tokens / step.step,
            "mfu": flops / step.step / self.device.peak(subject.precision),
            "tokens": tokens * steps if steps else None,
            "days": steps * step.step / 86400 if steps else None,
        }

    def assumed(self) -> dict:
        return {
            "efficiency": self.args.efficiency,
            "measured": self.args.measured_on,
            "launch_seconds": LAUNCH,
            "overlap": self.args.overlap,
            "intra_bytes_per_second": self.network.intra,
            "inter_bytes_per_second": self.network.inter,
            "latency_seconds": self.network.latency,
            "reserved_bytes": RESERVED,
            "usable_share_of_memory": USABLE,
        }

    def scaling(self) -> list[dict]:
        """A row for each stage of ZeRO and number of ranks; the batch of a rank stays."""
        rows = []
        for stage in STAGES[1:]:
            for ranks in RANKS:
                if ranks % self.subject.sequence_ranks:
                    continue
                step, sequences = self._step(ranks, stage), self.subject.global_batch(ranks)
                speed = sequences * self.subject.length / step.step
                rows.append(
                    {"stage": stage, "sequences_per_step": sequences, "tokens_per_second": speed}
                    | step._asdict()
                    | {"step": step.step, "scaling_efficiency": step.compute / step.step}
                )
        return rows


def _as_json(memory: Memory) -> dict:
    return memory._asdict() | {"total": memory.total}
