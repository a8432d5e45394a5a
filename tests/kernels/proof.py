"""What the proofs of the kernels depend on, as checksums: `make kernel-test` plays them again where one has changed.

Interpreting and sanitizing every kernel at many sizes, and compiling for every card, takes a third of all the tests'
time, and depends on few files: the kernels with what they import (their twins among it), the sizes that are compiled
and sanitized (bench/shipped), these tests, the pinned versions, and the Makefile, which names the newest Triton.
proven.sha256 holds the checksums of those with which all passed. Whole models in kernels depend on more, and are
played each time, as are the fast tests of each kernel.

    python tests/kernels/proof.py           which files have changed since; ends with 1 where there are any
    python tests/kernels/proof.py --write   all has passed with the files as they are
"""

import hashlib
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
    return sorted([*kernels | imported, *shipped, *tests, REPO / "Makefile", REPO / "constraints.txt"])


def checksums() -> list[str]:
    """As the command sha256sum writes them."""
    return [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(REPO)}" for path in sources()]


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        PROVEN.write_text("\n".join(checksums()) + "\n")
    else:
        proven = PROVEN.read_text().splitlines() if PROVEN.exists() else []
        changed = sorted({line.split()[-1] for line in {*checksums()} ^ {*proven}})
        print(f"changed since the kernels were proven: {', '.join(changed)}" if changed else "the kernels are proven")
        sys.exit(bool(changed))
