"""Times of the kernels on a GPU, beside an FFT convolution and, where it is installed, the SSD of mamba-ssm."""

import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch

from ..internals.torch import spin
from ..modeling.kernel_limits import MOST_TAPS
from ..modeling.short_convolution import ShortConvolution
from ..modeling.single_steps import Memo
from ..modeling.ssm import LAYERS
from . import roofline

WARM_UP, REPEATS = 3, 20
OTHERS = "mamba-ssm"  # how a model of somebody else's code is called
SETTINGS = (("auto", "kernels"), ("torch", "PyTorch"))  # of a layer's `kernels`, and by what it then runs
# of a GPU, before a call is timed: more bytes than its caches hold, and cycles, 10 ms or so, in which the host hands
# over all launches of the call, so that the GPU's time is measured and not the host's
CACHE_BYTES, AHEAD = 256 << 20, 20_000_000


def measure(function: Callable[[], object], device: torch.device, repeats: int = REPEATS) -> tuple[float, float | None]:
    """(median seconds of a call, peak MiB of the device's memory beyond what was there before, None on a CPU), after a
    few calls to warm up.
    """
    for _ in range(WARM_UP):
        function()
    if device.type != "cuda":
        return statistics.median(host_seconds(function) for _ in range(repeats)), None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    peak = (torch.cuda.max_memory_allocated(device) - before) / 2**20
    flush = torch.empty(CACHE_BYTES, dtype=torch.int8, device=device)
    return statistics.median(_gpu_seconds(function, flush) for _ in range(repeats)), peak


def host_seconds(function: Callable[[], object], device: torch.device | None = None) -> float:
    """Seconds of one call, by the host's clock; on a GPU until it has done what it was given."""
    on_gpu = device is not None and device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if on_gpu:
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _gpu_seconds(function, flush) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.zero_()
    spin(AHEAD)
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


class Contender(NamedTuple):
    """One of a group that does the same work: the first of a group is ours.

    function: runs it and returns a tensor; leaves: what its backward is taken to, none for inference alone.
    """

    group: str
    model: str
    parameters: int
    length: int
    function: Callable[[], torch.Tensor]
    leaves: list[torch.Tensor]


def contenders(u: torch.Tensor, state: int) -> Iterator[Contender]:
    """Sequences by the kernels, by FFT and by mamba-ssm; short and long convolutions; steps. u (B, L, H)."""
    _, length, hidden = u.shape
    layers = {
        # A, B and P are shared by the channels as in the WikiText-103 model; S5's state is one for all channels
        name: (layer_class(hidden) if name == "s5" else layer_class(hidden, state_size=state, n_ssm=1)).to(u.device)
        for name, layer_class in LAYERS.items()
        if layer_class.is_time_invariant
    }
    for name, layer in layers.items():
        count, leaves = sum(p.numel() for p in layer.parameters()), [u, *layer.parameters()]
        for mode in ("chunk",) if name == "s5" else ("chunk", "fft"):
            model = f"{name} kernels" if mode == "chunk" else f"{name} torch.fft"
            yield Contender("sequence", model, count, length, partial(_sequence, layer, u, mode), leaves)
    yield from ssd(u, state)
    yield from mamba_ssd(u, state)
    yield from taps(u)
    for name, layer in layers.items():
        count, leaves = sum(p.numel() for p in layer.parameters()), list(layer.parameters())
        for setting, by in SETTINGS:
            if name != "s5":
                tap = partial(_with, layer, setting, partial(layer.kernel, length))
                yield Contender(f"{name} taps", f"{name} taps, {by}", count, length, tap, leaves)
            memo, zero = Memo(), layer.zero_state(len(u), u.device)
            step = partial(layer, u[:, :1].detach(), mode="recurrent", initial_state=zero, memo=memo, in_place=True)
            step = partial(_with, layer, setting, lambda step=step: step()[0])
            yield Contender(f"{name} step", f"{name} step, {by}", count, 1, step, [])


def _sequence(layer, u, mode):
    return layer(u, mode=mode, output_final_state=False)[0]


def _with(layer, setting, function):
    """With the layer's kernels chosen by `setting`, as in S4Config."""
    before, layer.kernels = layer.kernels, setting
    try:
        return function()
    finally:
        layer.kernels = before


def ssd(u: torch.Tensor, state: int) -> Iterator[Contender]:
    """The scan of an SSD, whose input has vectors of the token beside u, by its kernels and in plain PyTorch."""
    layer = LAYERS["ssd"](u.shape[-1], state_size=state).to(u.device)
    count = sum(p.numel() for p in layer.parameters())
    x = torch.randn(*u.shape[:2], layer.input_size, device=u.device).to(u.dtype).requires_grad_()
    for setting, by in SETTINGS:
        sequence = partial(_with, layer, setting, partial(_sequence, layer, x, "chunk"))
        yield Contender("sequence", f"ssd {by}", count, u.shape[1], sequence, [x, *layer.parameters()])


def taps(u: torch.Tensor) -> Iterator[Contender]:
    """The short convolution of the block gated, with its activation, by its kernel and in plain PyTorch."""
    layer = ShortConvolution(u.shape[-1], MOST_TAPS).to(u.device)
    count, leaves = sum(p.numel() for p in layer.parameters()), [u, *layer.parameters()]
    for setting, by in SETTINGS:
        convolve = partial(_with, layer, setting, partial(_convolved, layer, u))
        yield Contender("short convolution", f"short convolution, {by}", count, u.shape[1], convolve, leaves)


def _convolved(layer, u):
    return layer(u, output_final_state=False, activation="silu")[0]


def mamba_ssd(u: torch.Tensor, state: int) -> Iterator[Contender]:
    """The scan of mamba-ssm at the same width and order, heads of 64 channels; nothing where it is not installed, and
    a warning where it is and cannot be imported.
    """
    try:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    except ImportError as error:
        if not isinstance(error, ModuleNotFoundError) or error.name != "mamba_ssm":
            warnings.warn(f"mamba-ssm is left out: it cannot be imported ({error})", stacklevel=2)
        return
    B, L, hidden = u.shape
    heads = max(1, hidden // 64)
    A = -torch.rand(heads, device=u.device) - 0.1
    dt, matrix = u.new_full((B, L, heads), 0.01), u.new_full((B, L, 1, state), 0.1)

    def scan():
        return mamba_chunk_scan_combined(u.view(B, L, heads, -1), dt, A, matrix, matrix, chunk_size=256)

    yield Contender("sequence", f"{OTHERS} ssd", A.numel(), L, scan, [u])


def rows(
    device: torch.device,
    batch: int = roofline.BATCH,
    length: int = roofline.LENGTH,
    hidden: int = roofline.HIDDEN,
    state: int = roofline.STATE,
    dtype: torch.dtype = torch.bfloat16,
    repeats: int = REPEATS,
) -> list[dict]:
    """One row a contender, forward, and one with its backward; ratio_to_ours is to the first of its group.

    One of others that fails is left out, with a warning.
    """
    u = torch.randn(batch, length, hidden, device=device).to(dtype).requires_grad_()
    found, ours = [], {}
    for contender in contenders(u, state):
        calls = {"forward": partial(_forward, contender)}
        if contender.leaves:
            calls["forward and backward"] = _both(contender)
        for direction, call in calls.items():
            try:
                seconds, peak = measure(call, device, repeats)
            except Exception as error:
                if not contender.model.startswith(OTHERS):
                    raise
                warnings.warn(f"{contender.model}, {direction}, is left out: {error}", stacklevel=2)
                continue
            # the kernel of a convolution serves the whole batch at once
            tokens = (1 if contender.group.endswith("taps") else batch) * contender.length
            found.append(
                {
                    "task": "kernels",
                    "model": f"{contender.model}, {direction}",
                    "parameters": contender.parameters,
                    "dtype": str(dtype).removeprefix("torch."),
                    "batch": batch,
                    "length": contender.length,
                    "seconds": seconds,
                    "tokens_per_second": tokens / seconds,
                    "peak_mib": peak,
                    "ratio_to_ours": seconds / ours.setdefault((contender.group, direction), seconds),
                    "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
                }
            )
    return found


def _forward(contender: Contender) -> None:
    with torch.no_grad():
        contender.function()


def _both(contender: Contender) -> Callable[[], object]:
    """Forward and backward from a gradient of the output that is there: a loss in float32 would move more bytes than
    the layer.
    """
    gradients: list[torch.Tensor] = []  # made by the first call, one of those that warm up

    def both():
        output = contender.function()
        if not gradients:
            gradients.append(torch.randn_like(output))
        torch.autograd.grad(output, contender.leaves, gradients, allow_unused=True)

    return both
