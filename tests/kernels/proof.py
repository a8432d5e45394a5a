"""What the proofs of the kernels depend on, as checksums: where none has changed since they passed, they are skipped.

Interpreting, sanitizing and compiling every kernel takes a third of all the tests' time, and depends on few files: the
kernels with what they import (their twins among it), the sizes that are compiled and sanitized (bench/shipped), the
models that are shipped, these tests, and the versions of a few packages. proven.sha256 holds the checksums of those
with which all passed. Whole models in kernels, and what launchers do, depend on more, and are played each time.

    python tests/kernels/proof.py           which files have changed since; ends with 1 where there are any
    python tests/kernels/proof.py --write   all has passed with the files as they are

`make kernel-proof` plays all of them, whatever has changed, and writes the file.
"""

import hashlib
import importlib.metadata
import re
import sys
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

REPO = Path(__file__).parents[2]
MODELING, BENCH = REPO / "ssm_lm" / "modeling", REPO / "ssm_lm" / "bench"
PROVEN = Path(__file__).with_name("proven.sha256")
NO_PROOFS = (
    "interpreted/test_models_in_kernels.py",
    "proof.py",
    "test_kernel_files.py",
    "test_kernel_registry.py",
    "test_without_triton.py",
)


def sources() -> list[Path]:
    kernels = set(MODELING.glob("triton_*.py"))
    imported = {Path(file) for kernel in kernels for file in get_relative_import_files(kernel)}
    shipped = {*BENCH.joinpath("shipped").glob("*.py"), BENCH / "compile.py", BENCH / "kernels.py"}
    here = Path(__file__).parent
    tests = {*here.rglob("*.py"), here / "resources.json"} - {here / name for name in NO_PROOFS}
    models = (REPO / "configs" / "model").glob("*.yaml")
    return sorted([*kernels | imported, *shipped, *tests, *models])


def pins() -> dict[str, list[str]]:
    """Of files that say much else the lines that name versions: what kernels run on, and the newest Triton."""
    lines = {"constraints.txt": r"^(?:numpy|tilelens|torch|triton)==.*", "Makefile": r"^TRITON \?=.*"}
    return {file: re.findall(line, (REPO / file).read_text(), re.MULTILINE) for file, line in lines.items()}


def checksums() -> list[str]:
    """As the command sha256sum writes them, but for the pins."""
    contents = {str(path.relative_to(REPO)): path.read_bytes() for path in sources()}
    contents |= {file: "\n".join(lines).encode() for file, lines in pins().items()}
    return [f"{hashlib.sha256(content).hexdigest()}  {name}" for name, content in sorted(contents.items())]


def changed_files() -> list[str]:
    """Since the proofs passed; all of them where they never did."""
    proven = PROVEN.read_text().splitlines() if PROVEN.exists() else []
    return sorted({line.split()[-1] for line in {*checksums()} ^ {*proven}})


def other_versions() -> list[str]:
    """Packages that kernels run on, here in another version than the pinned one, with which they were proven."""
    pinned = (line.split("==") for line in pins()["constraints.txt"])
    return [name for name, version in pinned if _version(name) != version]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package).split("+")[0]  # without the local part: +cpu
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        PROVEN.write_text("\n".join(checksums()) + "\n")
    else:
        changed = changed_files()
        print(f"changed since the kernels were proven: {', '.join(changed)}" if changed else "the kernels are proven")
        sys.exit(bool(changed))
