"""How long an H100 must take at least: by what a kernel moves and computes, counted, not measured.

The shape is that of the WikiText-103 model: B = 8 rows of L = 8192 tokens, H = 1024 channels, N = 64.
"""

from typing import NamedTuple

from ..costs.devices import DEVICES

BATCH, LENGTH, HIDDEN, STATE = 8, 8192, 1024, 64
TOKENS = BATCH * LENGTH

H100 = DEVICES["h100"]
BANDWIDTH = H100.bandwidth
TENSOR_CORES = {"bf16": H100.bf16, "tf32": H100.tf32, "tf32x3": H100.tf32 / 3}


class Bound(NamedTuple):
    """The least times of one launch, in seconds: what the memory, the tensor cores and the other units need."""

    memory: float
    tensor: float
    other: float

    @property
    def time(self) -> float:
        """All three work at once."""
        return max(self)


def bound(work: dict) -> Bound:
    """Of the work of a case of `compile.compile_cases`: bytes, flops, tensor_flops, tensor_dtype."""
    return Bound(
        work["bytes"] / BANDWIDTH,
        work.get("tensor_flops", 0) / TENSOR_CORES[work.get("tensor_dtype", "bf16")],
        work.get("flops", 0) / H100.fp32,
    )


def fft_convolution_bytes(batch: int = BATCH, length: int = LENGTH, hidden: int = HIDDEN) -> int:
    """What `ops.fft_convolution`, D u and the activation read and write in one forward, bfloat16 in and out.

    Every step is a pass over memory, and sees twice the length for its padding. cuFFT takes one pass while a sequence
    fits a multiprocessor, two from 32,768 points on; its inverse destroys its input, so PyTorch copies that before.
    """
    passes = 2 if 2 * length >= 32768 else 1
    spectrum = 8  # bytes a token: L + 1 complex64 numbers for 2 L real ones
    each = {  # bytes a token and channel, read + written
        "bfloat16 to float32": 2 + 4,
        "zero padding": 4 + 8,
        "rfft of u": (8 + spectrum) * passes,
        "product of the spectra": 2 * spectrum,
        "copy before irfft": 2 * spectrum,
        "irfft": (spectrum + 8) * passes,
        "plus D u": 4 + 2 + 2,
        "activation": 2 + 2,
    }
    kernel = {"zero padding": 4 + 8, "rfft of the kernel": (8 + spectrum) * passes, "product": spectrum}
    return hidden * length * (batch * sum(each.values()) + sum(kernel.values()))
