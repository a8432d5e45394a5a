"""The sets of `make matrix` are the ends of the ranges that pyproject.toml claims."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

REPO = Path(__file__).parents[1]


def ranges() -> dict[str, Requirement]:
    """Of the package and of its extras, without the tools of the tests."""
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    extras = {name: lines for name, lines in project["optional-dependencies"].items() if name != "dev"}
    found = map(Requirement, [*project["dependencies"], *(line for lines in extras.values() for line in lines)])
    return {canonicalize_name(requirement.name): requirement for requirement in found}


def pins(name: str) -> dict[str, str]:
    text = (REPO / "tests" / "versions" / f"{name}.txt").read_text()
    return {canonicalize_name(package): version for package, version in re.findall(r"^(\S+)==(\S+)$", text, re.M)}


def test_the_lowest_set_is_the_lower_end_of_every_range():
    lowest = pins("lowest")
    for name, requirement in ranges().items():
        (bound,) = [part.version for part in requirement.specifier if part.operator == ">="]
        assert Version(lowest[name]) == Version(bound), name


@pytest.mark.parametrize("name", ["lowest", "highest"])
def test_a_set_is_within_the_ranges(name):
    for package, version in pins(name).items():
        requirement = ranges().get(package)
        assert requirement is None or requirement.specifier.contains(version), f"{package} {version}"


def test_what_make_installs_is_within_the_ranges():
    text = (REPO / "constraints.txt").read_text()
    pinned = {canonicalize_name(package): version for package, version in re.findall(r"^(\S+)==(\S+)$", text, re.M)}
    for name, requirement in ranges().items():
        assert requirement.specifier.contains(pinned[name]), name
