"""What CONTRIBUTING.md says is there: its targets, its folders, its tests."""

import re
import subprocess
from pathlib import Path

REPO = Path(__file__).parents[1]


def test_the_make_targets_exist():
    targets = set(re.findall(r"`make ([\w-]+)", (REPO / "CONTRIBUTING.md").read_text()))
    assert len(targets) >= 5
    subprocess.run(["make", "--dry-run", *targets], cwd=REPO, check=True, capture_output=True)


def test_folders_import_what_the_tour_says():
    """And the files beside the folders, which all but modeling may."""
    tour = (REPO / "CONTRIBUTING.md").read_text().split("| it imports |")[1].split("\n\n")[0]
    folders = dict(re.findall(r"^\| `ssm_lm/(\w+)/` \|.*\| ([^|]+) \|$", tour, re.MULTILINE))
    assert set(folders) == {path.parent.name for path in (REPO / "ssm_lm").glob("*/__init__.py")}
    for folder, stated in folders.items():
        for path in (REPO / "ssm_lm" / folder).rglob("*.py"):
            depth = len(path.relative_to(REPO / "ssm_lm").parts)
            found = re.findall(rf"^ *from \.{{{depth}}}(\w+)", path.read_text(), re.MULTILINE)
            for name in set(found) & set(folders):
                assert name in re.findall(r"\w+", stated), f"{path}: {name}"


def test_the_tests_of_the_claims_are_there():
    """So that a claim that loses its test is noticed."""
    table = (REPO / "CONTRIBUTING.md").read_text().split("| claim | test |")[1].split("\n\n")[0]
    named = re.findall(r"`(tests/[\w/.]+)(?:::(\w+))?`", table)
    assert len(named) >= len(table.splitlines()) - 2
    for path, function in named:
        assert (REPO / path).exists(), path
        assert not function or f"def {function}(" in (REPO / path).read_text(), function
