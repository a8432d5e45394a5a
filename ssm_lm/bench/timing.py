"""Times of the kernels on a GPU, beside an FFT convolution and, where it is installed, the SSD of mamba-ssm."""

import statistics
import time
from collections.abc import Callable, Iterator

import torch

from ..modeling.ssm import LAYERS
from . import roofline

WARM_UP, REPEATS = 3, 20


def measure(function: Callable[[], object], device: torch.device, repeats: int = REPEATS) -> tuple[float, float | None]:
    """(median seconds of a call, peak MiB of the device's memory, None on a CPU), after a few calls to warm up."""
    for _ in range(WARM_UP):
        function()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for _ in range(repeats):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            end.synchronize()
            seconds.append(start.elapsed_time(end) / 1e3)
        else:
            start = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None
    return statistics.median(seconds), peak


def layers(hidden: int, state: int, device: torch.device) -> Iterator[tuple[str, int, Callable]]:
    """(name, parameters, function of u): every layer with the kernels, and S4 and S4D by FFT. The first is "ours"."""
    for name, layer_class in LAYERS.items():
        # S5's state is one for all channels; A, B and P of the others are too, as in the WikiText-103 model
        layer = layer_class(hidden) if name == "s5" else layer_class(hidden, state_size=state, n_ssm=1)
        layer = layer.to(device)
        parameters = sum(p.numel() for p in layer.parameters())
        yield f"{name} kernels", parameters, lambda u, layer=layer: _run(layer, u, "chunk")
        if name != "s5":
            yield f"{name} torch.fft", parameters, lambda u, layer=layer: _run(layer, u, "fft")


def _run(layer, u, mode):
    return layer(u, mode=mode, output_final_state=False)[0]


def mamba_ssd(hidden: int, state: int, device: torch.device) -> Iterator[tuple[str, int, Callable]]:
    """The scan of mamba-ssm at the same width and order, heads of 64 channels; nothing where it is not installed."""
    try:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    except ImportError:
        return
    heads = max(1, hidden // 64)
    A = -torch.rand(heads, device=device) - 0.1

    def run(u):
        B, L, _ = u.shape
        dt = u.new_full((B, L, heads), 0.01)
        matrix = u.new_full((B, L, 1, state), 0.1)
        return mamba_chunk_scan_combined(u.view(B, L, heads, -1), dt, A, matrix, matrix, chunk_size=256)

    yield "mamba-ssm ssd", A.numel(), run


def rows(
    device: torch.device,
    batch: int = roofline.BATCH,
    length: int = roofline.LENGTH,
    hidden: int = roofline.HIDDEN,
    state: int = roofline.STATE,
    dtype: torch.dtype = torch.bfloat16,
    repeats: int = REPEATS,
) -> list[dict]:
    """One row a contender and direction, forward and forward with backward; ratio_to_ours is to the first of each."""
    u = torch.randn(batch, length, hidden, device=device).to(dtype)
    found, ours = [], {}
    for contenders in (layers, mamba_ssd):
        for name, parameters, function in contenders(hidden, state, device):
            for direction, call in (("forward", _forward(function, u)), ("forward and backward", _both(function, u))):
                seconds, peak = measure(call, device, repeats)
                found.append(
                    {
                        "task": "kernels",
                        "model": f"{name}, {direction}",
                        "parameters": parameters,
                        "dtype": str(dtype).removeprefix("torch."),
                        "batch": batch,
                        "length": length,
                        "seconds": seconds,
                        "tokens_per_second": batch * length / seconds,
                        "peak_mib": peak,
                        "ratio_to_ours": seconds / ours.setdefault(direction, seconds),
                    }
                )
    return found


def _forward(function, u):
    def call():
        with torch.no_grad():
            function(u)

    return call


def _both(function, u):
    u = u.clone().requires_grad_()

    def call():
        u.grad = None
        function(u).float().square().mean().backward()

    return call
