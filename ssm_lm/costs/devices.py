"""Peaks of known devices, from their makers' data sheets: dense, without sparsity."""

import re
from typing import NamedTuple


class Device(NamedTuple):
    """Peak FLOP/s of dense matmuls by precision (bf16: None where there is none), bytes/s and bytes of its memory."""

    name: str
    architecture: str  # as Triton names it
    bf16: float | None
    tf32: float | None
    fp32: float
    bandwidth: float
    memory: float

    def peak(self, precision: str) -> float:
        """FLOP/s for "bf16", "tf32" or "fp32"; a precision that the device lacks runs as fp32."""
        return getattr(self, precision) or self.fp32


def _device(name, architecture, bf16, tf32, fp32, bandwidth, memory):
    """In TFLOP/s, TB/s and GB."""
    tera = [None if x is None else x * 1e12 for x in (bf16, tf32, fp32, bandwidth)]
    return Device(name, architecture, *tera, memory * 1e9)


DEVICES = {
    device.name: device
    for device in (
        _device("b200", "sm_100", 2250, 1125, 75, 7.7, 180),
        _device("h200", "sm_90", 989.4, 494.7, 66.9, 4.8, 141),
        _device("h100", "sm_90", 989.4, 494.7, 66.9, 3.35, 80),
        _device("h100-pcie", "sm_90", 756, 378, 51, 2.0, 80),
        _device("a100", "sm_80", 312, 156, 19.5, 2.039, 80),
        _device("a100-40gb", "sm_80", 312, 156, 19.5, 1.555, 40),
        _device("l40s", "sm_89", 362, 183, 91.6, 0.864, 48),
        _device("l4", "sm_89", 121, 60, 30.3, 0.3, 24),
        _device("a10", "sm_86", 125, 62.5, 31.2, 0.6, 24),
        _device("v100", "sm_70", None, None, 15.7, 0.9, 32),
        _device("t4", "sm_75", None, None, 8.1, 0.32, 16),
        _device("rtx-4090", "sm_89", 165.2, 82.6, 82.6, 1.008, 24),
        _device("rtx-3090", "sm_86", 71, 35.6, 35.6, 0.936, 24),
        _device("mi300x", "gfx942", 1307.4, 653.7, 163.4, 5.3, 192),
        _device("mi250x", "gfx90a", 383, None, 47.9, 3.2, 128),
    )
}

# what the drivers call them, the more particular first
_NAMES = (
    (r"\bB200\b", "b200"),
    (r"\bH200\b", "h200"),
    (r"\bH100.*PCIe", "h100-pcie"),
    (r"\bH100\b", "h100"),
    (r"\bA100.*40GB", "a100-40gb"),
    (r"\bA100\b", "a100"),
    (r"\bL40S\b", "l40s"),
    (r"\bL4\b", "l4"),
    (r"\bA10\b", "a10"),
    (r"\bV100\b", "v100"),
    (r"\bT4\b", "t4"),
    (r"RTX 4090\b(?! Laptop| D)", "rtx-4090"),
    (r"RTX 3090\b(?! Ti)", "rtx-3090"),
    (r"\bMI300X\b", "mi300x"),
    (r"\bMI250X\b", "mi250x"),
)


def known_device(driver_name: str) -> Device | None:
    """The device that a driver calls so, as "NVIDIA H100 80GB HBM3", or None."""
    for pattern, name in _NAMES:
        if re.search(pattern, driver_name, re.IGNORECASE):
            return DEVICES[name]
    return None
