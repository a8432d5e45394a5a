"""The code of a layer of one's own in an export: its file goes along, and the model's files name it.

In the package a layer is registered by whoever runs a command. An export registers it by itself: `checks.py` gets its
name and `ssm.py` an import, and the layer's own imports of `ssm_lm.modeling` become those of its neighbours.
"""

import ast
import inspect
import sys
from pathlib import Path

from ..errors import UserError
from ..modeling.checks import DISCRETIZATIONS
from ..modeling.hippo import INITIALIZATIONS
from ..modeling.ssm import BUILT_IN, LAYERS

PACKAGE = "ssm_lm"
CARRIED = ("torch", "transformers", "numpy")  # what is there wherever an export is loaded


def layer_file(name: str, taken: set[str]) -> tuple[Path, str] | None:
    """(its file, the file's text as an export holds it) of the layer `name`; None for one of the package's own.

    taken: names of the model's own files. Raises UserError for a layer whose file could not be loaded elsewhere.
    """
    if name in BUILT_IN:
        return None
    try:
        path = Path(inspect.getsourcefile(LAYERS[name]))
        text = path.read_text(encoding="utf-8")
    except (OSError, TypeError) as error:
        raise UserError(f"ssm {name}: the layer's code lies in no file; put its class into one of its own") from error
    if path.name in taken or not path.stem.isidentifier():
        raise UserError(f"{path}: an export cannot hold a file of that name beside the model's; rename it")
    lines = text.splitlines(keepends=True)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            _make_relative(path, node, lines)
    return path, "".join(lines)


def _make_relative(path: Path, node: ast.Import | ast.ImportFrom, lines: list[str]) -> None:
    """Turn an import of ssm_lm.modeling into one of a neighbour, in its line; UserError for what does not go along."""
    modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
    for module in modules:
        top, *below = module.split(".")
        if top == PACKAGE and isinstance(node, ast.ImportFrom) and not node.level:
            neighbour = below[1] if below[:1] == ["modeling"] and len(below) == 2 else None
            if [alias.name for alias in node.names] == ["register_layer"]:
                neighbour = "ssm"
            if neighbour is not None:
                line = node.lineno - 1
                lines[line] = lines[line].replace(f"from {module} ", f"from .{neighbour} ", 1)
                continue
        if (isinstance(node, ast.ImportFrom) and node.level) or (
            top not in CARRIED and top not in sys.stdlib_module_names
        ):
            raise UserError(
                f"{path}, line {node.lineno}: imports {module or 'a neighbour'}, which an export does not hold; a "
                f"layer may import {', '.join(CARRIED)}, Python's own modules, and from {PACKAGE}.modeling.NAME"
            )


def names_of(name: str) -> str:
    """What checks.py of an export says beside the package's: the choices that the layer has."""
    return (
        "\n# a layer of one's own\n"
        f"DISCRETIZATIONS[{name!r}] = {DISCRETIZATIONS[name]!r}\n"
        f"INITIALIZATIONS[{name!r}] = {dict.fromkeys(INITIALIZATIONS[name])!r}\n"
    )


def import_of(name: str, path: Path) -> str:
    """What ssm.py of an export says beside the package's."""
    cls = LAYERS[name].__name__
    return (
        "\n# a layer of one's own; it imports this file\n"
        f"from .{path.stem} import {cls}\n\n"
        f"register_layer({name!r}, {cls})\n"
    )
