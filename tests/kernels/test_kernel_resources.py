"""Every shipped kernel, compiled for GPUs that are not here, against the report under version control.

After a change of a kernel that is meant:

    ssm-lm bench kernels --compile-only --json tests/kernels/resources.json

Triton keeps what it compiled in TRITON_CACHE_DIR (~/.triton/cache), so that a second run takes seconds.
"""

import functools
import importlib.util
import json
from pathlib import Path

import pytest

from ssm_lm.bench import compile, roofline
from ssm_lm.bench.kernels import TARGETS, resource_row

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

import triton
import triton.language as tl

REPORT = Path(__file__).with_name("resources.json")
UPDATE = "ssm-lm bench kernels --compile-only --json tests/kernels/resources.json"
LISTED = [(case, target) for target in TARGETS.split(",") for case in compile.compile_cases(target)]
CASES = {(case["name"], target): case for case, target in LISTED}


def in_tiers() -> list:
    """Every case once: a kernel of every module for sm_90, and of those with tensor cores one for gfx942, are fast, the
    others for sm_90 slow. What is left, variants among it, takes minutes, and is compiled by the newest Triton too.
    """
    chosen = {}
    for (name, target), case in sorted(CASES.items(), key=lambda item: not item[1]["tensor_cores"]):
        if target == "sm_90" or (target == "gfx942" and case["tensor_cores"]):
            chosen.setdefault((case["module"], target), (name, target))
    fast = set(chosen.values())
    tiers = {
        case: () if case in fast else pytest.mark.slow if case[1] == "sm_90" and not variant else pytest.mark.long
        for case, variant in ((case, listed.get("variant")) for case, listed in CASES.items())
    }
    return [pytest.param(*case, marks=tiers[case]) for case in sorted(CASES)]


@functools.cache
def recorded_rows() -> dict[tuple[str, str], dict]:
    return {(row["kernel"], row["target"]): row for row in json.loads(REPORT.read_text())}


def check(name: str, target: str) -> None:
    case, recorded = CASES[name, target], recorded_rows()[name, target]
    is_comparable = recorded["triton"] == triton.__version__  # another compiler makes other code
    found = compile.compile_case(case, target, disassembled=is_comparable)
    assert found.spills == 0
    assert found.stack == 0
    assert found.shared <= found.shared_limit
    if case["tensor_cores"]:
        assert found.tensor_cores > 0
    if target == "sm_100":
        assert not found.tcgen05  # open miscompiles of Triton, issues 10590 and 10821
    if is_comparable:
        assert json.loads(json.dumps(resource_row(case, target, found))) == recorded, f"if this is meant: {UPDATE}"


@pytest.mark.proof
@pytest.mark.parametrize(("name", "target"), in_tiers())
def test_every_kernel(name, target):
    check(name, target)


def test_the_report_is_complete():
    assert len(CASES) == len(LISTED)  # no name twice
    assert set(recorded_rows()) == set(CASES), UPDATE
    assert {case["module"] for case in CASES.values()} == {f"triton_{name}" for name in compile.kernel_names()}


@pytest.mark.parametrize("carry", ["dense", "diagonal"])
def test_the_chunk_scan_is_near_the_memory_roofline(carry):
    """Forward at the shape of the WikiText-103 model, the turn and the scan, by counted bytes and operations: at most
    2.6 times what it takes to read u and the operators once and to write y once, for eight rows leave room for two
    segments a row, whose states are found by a pass of their own; of 16 rows, without segments, at most twice.
    """
    turn = CASES["chunk_scan to rows bf16", "sm_90"]["work"]  # of eight rows
    u, T = 2 * roofline.TOKENS * roofline.HIDDEN, 64
    operators = 4 * roofline.HIDDEN * (T + 2 * T * 64 + (64 * 64 if carry == "dense" else 64))
    for name, eights, passes, most in (("N=64 in segments", 1, 2, 2.6), ("N=64", 2, 1, 2)):
        scan = CASES[f"chunk_scan forward {carry} bf16 {name} w4s4", "sm_90"]["work"]
        assert scan["bytes"] == eights * (passes + 1) * u + operators
        least = (eights * 2 * u + operators) / roofline.BANDWIDTH
        assert eights * roofline.bound(turn).time + roofline.bound(scan).time <= most * least
        assert eights * roofline.fft_convolution_bytes() / roofline.BANDWIDTH > 10 * least


def test_an_fft_convolution_moves_many_times_as_much():
    """bfloat16 in and out is 4 bytes; the passes of an FFT are 98."""
    each = roofline.fft_convolution_bytes() / (roofline.TOKENS * roofline.HIDDEN)
    assert each == pytest.approx(98, abs=1)
    assert roofline.fft_convolution_bytes(length=16384) / (2 * roofline.TOKENS * roofline.HIDDEN) > 125


@triton.jit
def product_kernel(x, y, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(out + at, tl.dot(tl.load(x + at), tl.load(y + at)))


@pytest.mark.proof
@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "operation"), [("sm_80", "HMMA"), ("sm_90", "HGMMA"), ("sm_100", "UTCHMMA"), ("gfx942", "v_mfma")]
)
def test_tensor_cores_and_spills_are_seen(target, operation):
    arguments = {"x": "*bf16:16", "y": "*bf16:16", "out": "*fp32:16"}
    found = compile.resources(
        compile.compile_kernel(product_kernel, target, arguments, {"SIZE": 128}, {"num_warps": 4})
    )
    assert operation in found.tensor_core_ops
    assert found.tcgen05 == (target == "sm_100")
    if target == "sm_90":
        options = {"num_warps": 1, "maxnreg": 64}
        cramped = compile.compile_kernel(product_kernel, target, arguments, {"SIZE": 64}, options)
        assert compile.resources(cramped).spills > 0
