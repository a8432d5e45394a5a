"""Without any extra there are the layers, the models, prepare, eval, generate and export; the rest says one command."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from ssm_lm import lacking
from ssm_lm.errors import UserError
from ssm_lm.extras import need
from tests.test_noise import not_brought_by

REPO = Path(__file__).parents[1]
PLAIN = """
import contextlib
import io
import sys

hidden = sys.argv[1:]
sys.modules |= dict.fromkeys(hidden)  # an import of these fails, and importlib.util.find_spec finds nothing
import torch

from ssm_lm import S4Config, S4ForCausalLM
from ssm_lm.cli import main
from ssm_lm.modeling.ssm import S4, S4D, S5

for layer in (S4(4), S4D(4), S5(4)):
    layer(torch.randn(1, 9, 4))[0].sum().backward()
assert main(["prepare", "--dataset", "text", "--tokenizer", "bpe:300", "--output", "data"]) == 0
from ssm_lm.loading.tokenizer import load_tokenizer

tokenizer = load_tokenizer("data/tokenizer", needs_model=False)
S4ForCausalLM(S4Config(vocab_size=300, hidden_size=16, num_hidden_layers=1, state_size=8)).save_pretrained("model")
tokenizer.save_pretrained("model")
assert main(["eval", "model", "--data", "data", "--split", "validation"]) == 0
assert main(["generate", "model", "--prompt", "the cat", "--max-new-tokens", "3"]) == 0
assert main(["export", "model", "--output", "exported"]) == 0
for words, wanted in (
    (["train", "run.yaml"], "pip install 'ssm_lm[train]'"),
    (["estimate", "run.yaml"], "pip install 'ssm_lm[train]'"),
    (["prepare", "--dataset", "wikitext-2", "--tokenizer", "bpe:300", "--output", "w"], "pip install 'ssm_lm[train]'"),
    (["eval", "model", "--tasks", "piqa"], "pip install 'ssm_lm[eval]'"),
    (["bench", "kernels", "--compile-only"], "pip install 'ssm_lm[gpu]'"),
):
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        assert main(words) == 2, words
    assert wanted in said.getvalue(), said.getvalue()
    assert said.getvalue().count(chr(10)) == 1, said.getvalue()
print("all is well")
"""


@pytest.mark.slow
def test_what_runs_without_any_extra(tmp_path):
    hidden = not_brought_by()
    assert {"deepspeed", "accelerate", "datasets", "tensorboard", "pyarrow", "matplotlib", "triton"} <= set(hidden)
    (tmp_path / "text").mkdir()
    for split in ("train", "valid", "test"):
        (tmp_path / "text" / f"{split}.txt").write_text("the cat sees the moon .\n" * 200)
    (tmp_path / "run.yaml").write_text("model: {hidden_size: 16}\ndata: data\noutput_dir: run\nmax_steps: 2\n")
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    environment |= {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, *hidden],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "all is well" in done.stdout


def test_one_line_names_what_is_missing_and_one_command():
    need("x", "train", "json", "os")
    with pytest.raises(UserError, match=r"^x needs no_such_a, no_such_b: pip install 'ssm_lm\[train\]'$"):
        need("x", "train", "no_such_a", "json", "no_such_b")


def test_the_extras_of_doctor_are_those_of_the_project():
    from ssm_lm.doctor import EXTRAS

    extras = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {*EXTRAS} - {""} == {*extras} - {"dev"}


# ---- what a machine with a GPU lacks


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A machine without a GPU."""
    monkeypatch.setattr(lacking, "ROOT", tmp_path)
    return tmp_path


def add_card(root: Path, vendor: str, kind: str = "0x030200") -> None:
    device = root / "sys" / "bus" / "pci" / "devices" / f"0000:{vendor[2:4]}:00.0"
    device.mkdir(parents=True)
    (device / "vendor").write_text(vendor + "\n")
    (device / "class").write_text(kind + "\n")


def test_without_a_gpu_nothing_is_lacking(root):
    add_card(root, "0x8086", "0x030000")  # Intel's
    add_card(root, "0x10de", "0x0c0330")  # a card's USB port
    assert lacking.gpus_of_the_machine() == []
    assert lacking.lacking() == {}


def set_torch(monkeypatch, **parts):
    import torch

    for name, value in {"cuda": None, "hip": None, **parts}.items():
        if name == "available":
            monkeypatch.setattr(torch.cuda, "is_available", lambda value=value: value)
        else:
            monkeypatch.setattr(torch.version, name, value)


def test_an_nvidia_card(root, monkeypatch):
    add_card(root, "0x10de")
    set_torch(monkeypatch, available=False)
    assert "pip install --force-reinstall torch" in lacking.lacking()["torch with CUDA"]
    set_torch(monkeypatch, cuda="13.0", available=False)
    assert "has not loaded it" in lacking.lacking()["NVIDIA's driver"]
    driver = root / "proc" / "driver" / "nvidia" / "version"
    driver.parent.mkdir(parents=True)
    driver.write_text("NVRM version: NVIDIA UNIX Open Kernel Module  570.86.15  Release Build\n")
    assert "CUDA 13.0 and finds no device under driver" in lacking.lacking()["a newer driver"]
    set_torch(monkeypatch, cuda="13.0", available=True)
    monkeypatch.setattr(lacking.shutil, "which", lambda name: None)
    monkeypatch.setattr(lacking.sysconfig, "get_path", lambda name: str(root))
    assert lacking.lacking().keys() == {"a C compiler", "Python's headers"}


def test_an_amd_card(root, monkeypatch):
    add_card(root, "0x1002", "0x120000")
    set_torch(monkeypatch, available=False)
    assert "--device /dev/kfd" in lacking.lacking()["AMD's driver"]
    (root / "dev").mkdir()
    (root / "dev" / "kfd").touch()
    assert lacking.ROCM_WHEELS in lacking.lacking()["torch with ROCm"]
    assert lacking.ROCM_WHEELS in (REPO / "README.md").read_text()
    monkeypatch.setattr(lacking.os, "access", lambda *words: False)
    assert "usermod" in lacking.lacking()["access to the GPU"]
