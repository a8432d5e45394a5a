"""The kernels' files in a repository of the Hub: all are copied, and none makes Triton a requirement. And those that a
proof depends on, by which it is known whether it still holds.
"""

import importlib
from pathlib import Path

import proof
from transformers.dynamic_module_utils import get_imports, get_relative_import_files

import ssm_lm.modeling
from ssm_lm.bench import compile


def test_kernels_are_copied_and_triton_is_no_requirement():
    folder = Path(ssm_lm.modeling.__file__).parent
    files = {Path(file) for file in get_relative_import_files(folder / "modeling_s4.py")}
    assert {file.name for file in folder.glob("triton_*.py")} <= {file.name for file in files}
    assert [file.name for file in files if "triton" in get_imports(file)] == []


def test_a_proof_depends_on_every_kernel_on_what_it_imports_and_on_its_sizes():
    kernels = set(Path(ssm_lm.modeling.__file__).parent.glob("triton_*.py"))
    imported = {Path(file) for kernel in kernels for file in get_relative_import_files(kernel)}
    assert "chunked.py" in {file.name for file in imported}
    assert kernels | imported <= set(proof.sources())
    rows = {Path(importlib.import_module(f"ssm_lm.bench.shipped.{name}").__file__) for name in compile.kernel_names()}
    assert rows <= set(proof.sources())


def test_what_has_changed_since_the_proof_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(proof, "PROVEN", tmp_path / "proven.sha256")
    assert {"Makefile", "constraints.txt", "ssm_lm/modeling/triton_step.py"} <= set(proof.changed_files())
    lines = proof.checksums()
    proof.PROVEN.write_text("\n".join(lines) + "\n")
    assert proof.changed_files() == []
    proof.PROVEN.write_text("\n".join([*lines[2:], "0" * 64 + "  gone.py"]))
    assert proof.changed_files() == sorted(["gone.py", *(line.split()[1] for line in lines[:2])])


def test_another_version_than_the_proven_one_is_named(monkeypatch):
    pinned = dict(line.split("==") for line in proof.pins()["constraints.txt"])
    assert {"torch", "triton", "numpy", "tilelens"} == set(pinned)
    monkeypatch.setattr(proof.importlib.metadata, "version", lambda name: pinned[name] + "+cpu")
    assert proof.other_versions() == []
    pinned["triton"] = "0.1"
    monkeypatch.setattr(proof, "pins", lambda: {"constraints.txt": ["triton==9.9", f"torch=={pinned['torch']}"]})
    assert proof.other_versions() == ["triton"]
