"""Memory and speed of one layer on a CPU, each in a process of its own with one thread."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc"),
]

PRELUDE = """
import json, statistics, sys, time
import torch
from ssm_lm.modeling.ops import cauchy
from ssm_lm.modeling.ssm import S4, S4D, S5
torch.set_num_threads(1)
torch.manual_seed(0)

def peak_mib():
    # of this process since it began; ru_maxrss would start from what the parent held when it forked
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024

def interleaved(functions, rounds):
    seconds = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.process_time()  # of the one thread: neighbours on the machine take wall time, not this
            function()
            seconds[name].append(time.process_time() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}
"""


def measure(script: str, **values) -> dict:
    """What the script prints, which is one JSON object."""
    root = Path(__file__).parents[2]
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    code = PRELUDE + "\n".join(f"{name} = {value!r}" for name, value in values.items()) + script
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


MEMORY = """
layer = {"s4": S4, "s4d": S4D, "s5": S5}[name](256, 64)
u = torch.randn(1, 256, 256, requires_grad=True)
layer(u, mode="chunk")[0].sum().backward()  # what libraries take once
before = peak_mib()
u = torch.randn(4, length, 256, requires_grad=True)
y, state = layer(u, mode="chunk")
y.backward(torch.ones_like(y))
print(json.dumps({"mib": peak_mib() - before}))
"""


@pytest.mark.parametrize("name", ["s4", "s4d", "s5"])
def test_memory_is_linear_and_small(name):
    """Forward and backward of one layer, B = 4, H = 256, N = 64: input and its gradient are 512 MiB at 65,536."""
    short, long = (measure(MEMORY, name=name, length=length)["mib"] for length in (16384, 65536))
    assert long < 2.5 * 1024
    assert long < 4.4 * short


SPEED = """
layer = {"s4": S4, "s4d": S4D}[name](256, 64)
u = torch.randn(4, length, 256, requires_grad=True)

def run(mode):
    return lambda: layer(u, mode=mode, output_final_state=False)[0].sum().backward()

print(json.dumps(interleaved({"chunk": run("chunk"), "fft": run("fft")}, rounds=3)))
"""


# how many times as fast, below what one idle core shows, as neighbours on the machine slow the two down unequally. AVX2
# does half as many matrix products a second as AVX-512, and the scan is made of them; the FFT waits for memory. A core
# of an EPYC with AVX2 showed, in the order below, 1.5 to 1.7, 2.1 to 2.3, 0.9 to 1.3 and 1.5 to 1.7
FACTORS = {"AVX512": (1.8, 1.8, 1.1, 1.3)}.get(torch.backends.cpu.get_cpu_capability(), (1.2, 1.5, 0.8, 1.2))
CASES = (("s4", 4096), ("s4", 16384), ("s4d", 4096), ("s4d", 16384))


@pytest.mark.alone
@pytest.mark.parametrize(
    ("name", "length", "factor"), [(*case, factor) for case, factor in zip(CASES, FACTORS, strict=True)]
)
def test_chunk_mode_is_faster_than_fft(name, length, factor):
    """Forward and backward, with the kernel and the operators made anew, B = 4, H = 256, N = 64, float32."""
    seconds = measure(SPEED, name=name, length=length)
    assert seconds["fft"] > factor * seconds["chunk"], seconds


CAUCHY = """
H, half, length = 256, 32, 16384
v = [torch.randn(H, 1, half, requires_grad=True) for _ in range(2)]
poles = [(-torch.rand(H, half)).requires_grad_(), (10 * torch.randn(H, half)).requires_grad_()]
nodes = 2 * torch.tan(torch.pi * torch.arange(length // 2).double() / length).float()

def blocked():
    re, im = cauchy(*v, nodes, *poles)
    (re.square() + im.square()).sum().backward()

def materialised():
    w, p, s = torch.complex(*v)[..., None], torch.complex(*poles)[:, None, :, None], 1j * nodes
    out = (w / (s - p) + w.conj() / (s - p.conj())).sum(2)
    out.abs().square().sum().backward()

u = torch.randn(64, 64, requires_grad=True)
(u @ u).sum().backward()
before = peak_mib()
blocked()
middle = peak_mib()
materialised()
after = peak_mib()
seconds = interleaved({"blocked": blocked, "materialised": materialised}, rounds=2)
print(json.dumps({"seconds": seconds, "mib": [middle - before, after - before]}))
"""


@pytest.mark.alone
def test_blocked_cauchy_is_fast_and_small():
    """Against the complex (H, N/2, L/2) formula, forward and backward, L = 16384, one product a channel."""
    found = measure(CAUCHY)
    assert found["seconds"]["materialised"] > 5 * found["seconds"]["blocked"], found
    assert found["mib"][0] < found["mib"][1] / 10, found
