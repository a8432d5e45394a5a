"""Two commits, the same numbers: what a refactoring is proven by.

    python -m tests.identity BEFORE [AFTER]        AFTER: a commit, or this working tree where it is left out

Each commit is checked out in a folder of its own and run, with this Python, over the cases of record.py: 20 losses,
the trained parameters with their names, the logits of a prompt in every mode, generated tokens. A row is equal when
every number is, bit by bit, on a CPU with one thread. Exit code 1 where a row differs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from .record import CASES

REPO = Path(__file__).parents[2]


def git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=REPO, capture_output=True, text=True, check=True).stdout.strip()


def checked_out(commit: str | None, folder: Path) -> tuple[str, Path]:
    """The commit's name, and a folder with its files; this working tree for None."""
    if commit is None:
        changed = " and uncommitted changes" if git("status", "--porcelain", "--", "ssm_lm") else ""
        return git("rev-parse", "--short", "HEAD") + changed, REPO
    git("worktree", "add", "--detach", "--force", str(folder), commit)
    return git("rev-parse", "--short", commit), folder


def record(tree: Path, output: Path, cases: list[str]) -> dict[str, dict[str, str]]:
    """What the code in `tree` computes: case -> quantity -> its digest."""
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    script = Path(__file__).with_name("record.py")
    subprocess.run([sys.executable, str(script), str(output), *cases], cwd=output.parent, env=environment, check=True)
    return json.loads(output.read_text())


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.identity", description=__doc__.splitlines()[0])
    parser.add_argument("before", help="a commit")
    parser.add_argument("after", nargs="?", help="a commit; left out: this working tree")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        results = []
        try:
            for side, commit in (("before", args.before), ("after", args.after)):
                name, tree = checked_out(commit, Path(scratch) / f"{side}-tree")
                (Path(scratch) / side).mkdir()
                results.append((name, record(tree, Path(scratch) / side / "record.json", args.cases)))
        finally:
            for tree in Path(scratch).glob("*-tree"):
                git("worktree", "remove", "--force", str(tree))
    (before_name, before), (after_name, after) = results
    print(f"\n{before_name} against {after_name}\n")
    different = 0
    for case in args.cases:
        quantities = sorted(before[case].keys() | after[case].keys())
        wrong = [name for name in quantities if before[case].get(name) != after[case].get(name)]
        different += bool(wrong)
        print(f"{case:18}  {'DIFFERENT: ' + ', '.join(wrong) if wrong else 'equal: ' + ', '.join(quantities)}")
    print(f"\n{'all rows are equal' if not different else f'{different} differ'}")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
