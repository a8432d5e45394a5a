"""A machine without Triton, or without a GPU driver, does all that a CPU can do, and `ssm-lm doctor` says why."""

import json
import os
import subprocess
import sys

import pytest

from ssm_lm.bench.compile import kernel_names

pytestmark = pytest.mark.slow

BLOCKED = """
import importlib.metadata
import sys


class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def version(name, original=importlib.metadata.version):
    if name == "triton":
        raise importlib.metadata.PackageNotFoundError(name)
    return original(name)


sys.meta_path.insert(0, Blocked())
importlib.metadata.version = version
"""

# the wheels of other packages know for which system they were built; ours then sees a Mac
MAC = """
import os, platform, sys
import huggingface_hub.hf_api, psutil, torch, transformers.generation, transformers.modeling_utils

sys.platform = "darwin"
os.sched_getaffinity = None
del os.sched_getaffinity
platform.system = lambda: "Darwin"
platform.platform = lambda *args, **kwargs: "macOS-26.0-arm64-arm-64bit"
"""

EVERYTHING = """
import sys
import torch
from ssm_lm import S4Config, S4ForCausalLM
from ssm_lm.cli import main
from ssm_lm.modeling.ssm import LAYERS

for ssm in LAYERS:
    arch = "s4-ffn" if LAYERS[ssm].is_time_invariant else "gated"
    config = S4Config(vocab_size=17, hidden_size=8, num_hidden_layers=1, state_size=4, ssm=ssm, arch=arch)
    model, ids = S4ForCausalLM(config), torch.randint(1, 17, (2, 9))
    for mode in ("chunk", "recurrent", "auto", *(["fft"] if LAYERS[ssm].is_time_invariant else [])):
        for module in model.modules():
            if hasattr(module, "mode"):
                module.mode = mode
        model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    options = {"max_new_tokens": 3, "min_new_tokens": 3}  # a random model may choose the end of the text
    assert model.eval().generate(ids, **options, do_sample=False, pad_token_id=0).shape == (2, 12)
assert not [name for name in sys.modules if name.startswith("ssm_lm.modeling.triton_")]  # asked for on a GPU alone
sys.argv = ["ssm-lm", "doctor", "--json"]
main()
"""


def run(preparation: str) -> dict:
    """Everything, in a process that is prepared first; doctor's report."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "SSM_LM_KERNELS")}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:ssm_lm", "-c", preparation + EVERYTHING],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(result.stdout[result.stdout.index("{") :])


@pytest.mark.parametrize("preparation", [BLOCKED, BLOCKED + MAC], ids=["linux", "macos"])
def test_without_triton(preparation):
    report = run(preparation)
    assert report["torch"]["triton"] is None
    assert set(report["kernels"]) == set(kernel_names())
    for line in report["kernels"].values():
        assert line.startswith("PyTorch: Triton cannot be imported")
        assert "No module named 'triton'" in line
    assert report["self-check"]["passed"]


def test_without_a_driver():
    pytest.importorskip("triton")
    report = run("")
    assert "no driver" in report["torch"]["triton"]
    assert set(report["kernels"]) == set(kernel_names())
    for line in report["kernels"].values():
        assert line.startswith("PyTorch: there is no GPU")
    assert report["self-check"]["passed"]


def test_doctor_prints_a_line_for_every_kernel():
    result = subprocess.run(
        [sys.executable, "-m", "ssm_lm", "doctor"],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200", "SSM_LM_KERNELS": "torch"},
        capture_output=True,
        text=True,
        check=True,
    )
    for op in kernel_names():
        assert any(op in line and "PyTorch: SSM_LM_KERNELS=torch" in line for line in result.stdout.splitlines()), op
