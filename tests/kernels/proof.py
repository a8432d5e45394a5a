"""What the proofs of the kernels depend on, as checksums: `make kernel-test` plays them again where one has changed.

Interpreting and sanitizing every kernel at many sizes, and compiling for every card, takes a third of all the tests'
time, and depends on few files: the kernels with what they import (their twins among it), these tests, and the versions
that are pinned. proven.sha256 holds the checksums of those with which all passed. Whole models in kernels depend on
more, and are played each time, as are the fast tests of each kernel.

    python tests/kernels/proof.py > tests/kernels/proven.sha256
"""

import ast
import hashlib
from pathlib import Path

REPO = Path(__file__).parents[2]
MODELING = REPO / "ssm_lm" / "modeling"
NO_PROOFS = ("interpreted/test_models_in_kernels.py", "test_kernel_registry.py", "test_without_triton.py")


def neighbours(file: Path) -> list[Path]:
    """The files of modeling/ that a file of it imports, always as `from .name import ...`, at the top or late."""
    found = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom) and node.level]
    return [MODELING / f"{node.module}.py" for node in found]


def sources() -> list[Path]:
    kernels, left = set(), sorted(MODELING.glob("triton_*.py"))
    while left:
        file = left.pop()
        if file not in kernels:
            kernels.add(file)
            left += neighbours(file)
    here = Path(__file__).parent
    tests = {*here.rglob("*.py"), here / "resources.json"} - {here / name for name in NO_PROOFS}
    return sorted([*kernels, *tests, REPO / "ssm_lm/bench/compile.py", REPO / "constraints.txt"])


if __name__ == "__main__":
    for path in sources():
        print(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(REPO)}")
