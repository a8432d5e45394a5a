"""What a run measures of itself: speed, MFU, memory, waiting; the metrics file; traces of the profiler.

Everything here is about rank 0's process unless its name says "all ranks", and goes wherever the Trainer's log entries
go: TensorBoard, trainer_state.json, and `metrics.jsonl`, one object an entry.

    flops_per_second     all ranks: FLOPs by the formula of this architecture (costs/flops.py), nothing recomputed
    mfu                  that over the devices' peak, where the peak is known: from `peak_tflops` in the config, or by
                         the GPU's name. The table has GPUs alone: on a CPU, give `peak_tflops` to see an MFU.
    memory_gb            allocated on the GPU now; on a CPU the resident size of the process
    memory_peak_gb       the most since the run began
    data_wait_share      of the time, how much went by waiting for the next batch
    communication_share  of one step, how much had a collective in flight, hidden behind arithmetic or not; from a
                         profiled step every `communication_sample_steps`. More than one rank only.
    checkpoint_seconds   how long training stood still for a checkpoint written since the last entry
"""

import contextlib
import functools
import json
import os
import re
import resource
import time
from pathlib import Path

import torch
from transformers import TrainerCallback

from ..baselines import is_baseline
from ..costs.baselines import baseline_flops
from ..costs.devices import known_device
from ..costs.flops import total, training_flops
from ..internals.torch import events_of
from ..modeling.kernel_launch import architecture
from ..modeling.ops import use_kernel
from .history import METRICS_FILE, trim

# collectives as the profiler names them: NCCL's kernels on a GPU, Gloo's own ranges on a CPU
COLLECTIVES = re.compile(r"^(nccl|gloo:)", re.IGNORECASE)


class Meters:
    """Sums between two log entries."""

    def __init__(self, args, config, is_language_model: bool):
        self.args, self.config = args, config
        self.task = "lm" if is_language_model else "classification"
        self.peak = peak_flops(args)
        self.communication_share = None
        self.reset()

    def reset(self) -> None:
        """Begin anew; what is not about a stretch of time stays."""
        self.flops, self.seconds = 0.0, {}

    @contextlib.contextmanager
    def timing(self, what: str):
        """Add the time that the block takes to `what`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - start

    def saw(self, inputs: dict) -> None:
        """Count the FLOPs of a batch, by its shape."""
        tokens = inputs.get("input_ids", inputs.get("inputs_embeds"))
        if tokens is not None:
            self.flops += self._batch_flops(*tokens.shape[:2])

    @functools.lru_cache(maxsize=1024)  # noqa: B019  (one object a run)
    def _batch_flops(self, batch_size: int, length: int) -> float:
        if is_baseline(self.config):
            return total(baseline_flops(self.config, batch_size, length))
        needs_state = getattr(self.args, "carry_state", False)
        probe = torch.empty(0, device=self.args.device)

        def runs(operation, unsupported, key):  # as the layers have decided in the forward
            return use_kernel(operation, probe, unsupported=unsupported, setting=self.config.kernels, problem=key)

        parts = training_flops(
            self.config,
            batch_size,
            length,
            needs_state=needs_state,
            task=self.task,
            runs=runs,
            architecture=architecture(probe.device),
            dtype=torch.bfloat16 if _autocasts_to_bfloat16(self.args) else torch.float32,
        )
        return total(parts)

    def entries(self, seconds: float) -> dict:
        """The entries of a log about the last `seconds`; starts the next sums."""
        flops = self.flops * self.args.world_size / seconds
        found = {"flops_per_second": flops, **memory()}
        if self.peak is not None:
            found["mfu"] = flops / (self.peak * self.args.world_size)
        found["data_wait_share"] = self.seconds.get("data", 0.0) / seconds
        if self.communication_share is not None:
            found["communication_share"] = self.communication_share
        if "checkpoint" in self.seconds:
            found["checkpoint_seconds"] = self.seconds["checkpoint"]
        self.reset()
        return found


def peak_flops(args) -> float | None:
    """FLOP/s of a rank's device at the precision of the run, or None where the device is not in the table."""
    if args.peak_tflops is not None:
        return args.peak_tflops * 1e12
    if not torch.cuda.is_available() or args.use_cpu:
        return None
    device = known_device(torch.cuda.get_device_name(args.device))
    half = args.bf16 or args.fp16 or (args.deepspeed or {}).get("torch_autocast")
    # by the setting that transformers writes: torch refuses to read the older allow_tf32 beside it
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return None if device is None else device.peak("bf16" if half else "tf32" if tf32 else "fp32")


def _autocasts_to_bfloat16(args) -> bool:
    engine = getattr(args, "deepspeed", None) or {}
    return getattr(args, "bf16", False) or engine.get("torch_autocast", {}).get("dtype") == "bfloat16"


def memory() -> dict:
    """memory_gb and memory_peak_gb, in 1e9 bytes."""
    if torch.cuda.is_available():
        return {
            "memory_gb": torch.cuda.memory_allocated() / 1e9,
            "memory_peak_gb": torch.cuda.max_memory_allocated() / 1e9,
        }
    found = {"memory_peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}
    statm = Path("/proc/self/statm")
    if statm.is_file():
        found["memory_gb"] = int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9
    return found


class MetricsFile(TrainerCallback):
    """metrics.jsonl in the output folder: one JSON object a log entry, in order, each step's entries once.

    A resumed run takes away what was logged after its checkpoint, and goes on from there.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            trim(Path(args.output_dir) / METRICS_FILE, state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs:
            entry = {"step": state.global_step, "time": time.time(), **logs}
            with open(Path(args.output_dir) / METRICS_FILE, "a", encoding="utf-8") as file:
                file.write(json.dumps(entry, default=float) + "\n")


class ProfileTrace(TrainerCallback):
    """A trace of `args.profile` steps in output_dir/profile, for TensorBoard or chrome://tracing; on rank 0 alone.

    The first WARM_UP steps of the process are left out: they fill caches and allocators.
    """

    WARM_UP = 3

    def __init__(self):
        self.profiler = None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            folder = str(Path(args.output_dir) / "profile")
            self.profiler = torch.profiler.profile(
                schedule=torch.profiler.schedule(wait=self.WARM_UP - 1, warmup=1, active=args.profile, repeat=1),
                on_trace_ready=torch.profiler.tensorboard_trace_handler(folder),
                record_shapes=True,
                profile_memory=True,
            )
            self.profiler.start()

    def on_step_end(self, args, state, control, **kwargs):
        if self.profiler is not None:
            self.profiler.step()
            if self.profiler.step_num >= self.WARM_UP + args.profile:
                self._stop()

    def on_train_end(self, args, state, control, **kwargs):
        self._stop()

    def _stop(self):
        if self.profiler is not None:
            self.profiler.stop()
            self.profiler = None


class CommunicationSample(TrainerCallback):
    """Profiles one step in `args.communication_sample_steps`, for `Meters.communication_share`.

    A profiled step costs more than another, and one in hundreds does not. On a GPU only its own activity is recorded.
    """

    FIRST = 5  # a run of fewer steps than the interval has one sample too

    def __init__(self, meters: Meters):
        self.meters, self.profiler = meters, None

    def on_step_begin(self, args, state, control, **kwargs):
        every = args.communication_sample_steps
        if state.is_world_process_zero and state.global_step % every == self.FIRST % every:
            kinds = torch.profiler.ProfilerActivity
            kind = kinds.CUDA if torch.cuda.is_available() else kinds.CPU
            self.profiler = torch.profiler.profile(activities=[kind], acc_events=True)
            self.profiler.start()
            self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if self.profiler is None:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        elapsed = time.perf_counter() - self.start
        self.profiler.stop()
        spans = [(start, end) for name, start, end in events_of(self.profiler) if COLLECTIVES.match(name)]
        self.meters.communication_share = min(1.0, covered(spans) / 1e9 / elapsed)
        self.profiler = None


def covered(spans: list[tuple[int, int]]) -> int:
    """The length of the union of intervals (start, end)."""
    length, reached = 0, 0
    for start, end in sorted(spans):
        length += max(0, end - max(start, reached))
        reached = max(reached, end)
    return length
