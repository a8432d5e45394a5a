"""How the package is built, read from its syntax trees: no circle of imports, nobody else's private parts.

`python tests/test_structure.py` prints the ten longest functions.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
PACKAGE = REPO / "ssm_lm"
INTERNALS = "internals"  # the one folder that reaches into other libraries
PUBLISHED = "modeling"  # published file by file, it keeps its own uses; tests/training/test_internals.py lists them
DOCUMENTED = {"_asdict", "_replace", "_fields", "_make", "_exit"}  # of a NamedTuple, and of os


# ---- imports


def module_name(path: Path, root: Path) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def import_graph(package: Path) -> dict[str, set[str]]:
    """Module -> the modules of the package that it imports, at its top or within a function.

    `from .x import y` is an import of x and, where y is a module, of y; of the package x alone it is none, for a file
    may import its neighbours.
    """
    root = package.parent
    files = {module_name(path, root): path for path in package.rglob("*.py")}
    graph = {}
    for name, path in files.items():
        parent = name if path.name == "__init__.py" else name.rpartition(".")[0]
        found = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    above = parent.split(".")
                    base = ".".join([*above[: len(above) - node.level + 1], *filter(None, [base])])
                found |= {f"{base}.{alias.name}" for alias in node.names} | ({base} - {parent})
        graph[name] = (found & files.keys()) - {name}
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The groups of modules that reach one another."""
    reached = {}
    for start in graph:
        known, open_ = set(), [start]
        while open_:
            for other in graph[open_.pop()] - known:
                known.add(other)
                open_.append(other)
        reached[start] = known
    groups = {frozenset(other for other in reached[name] if name in reached[other]) for name in graph}
    return sorted(sorted(group) for group in groups if group)


def test_the_imports_of_the_package_make_no_circle():
    assert circles(import_graph(PACKAGE)) == []


@pytest.mark.parametrize(
    "late", ["from .b import f", "def g():\n    from .b import f", "def g():\n    from . import b"]
)
def test_a_circle_is_found(tmp_path, late):
    package = tmp_path / "package"
    package.mkdir()
    for name, text in {"__init__": "", "a": late, "b": "import package.c", "c": "from .a import g"}.items():
        (package / f"{name}.py").write_text(text)
    assert circles(import_graph(package)) == [["package.a", "package.b", "package.c"]]


# ---- private parts


def defined(path: Path) -> set[str]:
    """The names of a file's functions, methods and classes, and of what it sets on its own objects."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names |= {node.attr} if getattr(node.value, "id", "") in ("self", "cls", "ctx") else set()
    return names


def private_uses(path: Path) -> set[str]:
    """Names with a leading underscore that a file uses of objects that are not its own; "_module" for an import from
    a module that has one.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    used, inherited = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
            own |= {node.attr} if isinstance(node.ctx, ast.Store) else set()
        elif isinstance(node, ast.Attribute):
            used.add(node.attr)
            if isinstance(node.value, ast.Call) and getattr(node.value.func, "id", "") == "super":
                inherited.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            used |= {alias.name for alias in node.names}
            used |= {"_module"} if any(part.startswith("_") for part in node.module.split(".")) else set()
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr", "setattr"):
            used |= {word.value for word in node.args[1:2] if isinstance(word, ast.Constant)}
    # an override that calls super() is of another's method too, though the file defines it
    return {
        name
        for name in used - (own - inherited) - DOCUMENTED
        if isinstance(name, str) and name.startswith("_") and not name.startswith("__")
    }


def test_nothing_outside_the_one_folder_reaches_into_another_library():
    ours = {name for path in PACKAGE.rglob("*.py") for name in defined(path)}
    reached = {
        f"{path.relative_to(PACKAGE)}: {name}"
        for path in PACKAGE.rglob("*.py")
        if path.parent.name not in (INTERNALS, PUBLISHED)
        for name in private_uses(path) - ours
    }
    assert reached == set()


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("import torch\ntorch._part()", "_part"),
        ("from torch import _part", "_part"),
        ("from torch._part import x", "_module"),
        ("getattr(x, '_part', None)", "_part"),
        ("class A(B):\n    def _part(self):\n        return super()._part()", "_part"),
    ],
)
def test_a_private_part_is_found(tmp_path, text, name):
    (tmp_path / "file.py").write_text(text)
    assert private_uses(tmp_path / "file.py") == {name}


# ---- files and functions


def test_files_are_named_by_their_subject():
    assert not list(PACKAGE.rglob("run.py"))


def functions(package: Path) -> Iterator[tuple[int, str]]:
    """(lines, where) of every function."""
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield node.end_lineno - node.lineno + 1, f"{path.relative_to(package.parent)}:{node.lineno} {node.name}"


if __name__ == "__main__":
    for length, where in sorted(functions(PACKAGE), reverse=True)[:10]:
        print(f"{length:4}  {where}")
