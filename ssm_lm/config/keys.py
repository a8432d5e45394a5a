"""The names of the keys that a config may have, read from syntax trees.

transformers declares most of them, and takes ten seconds to import; a mistyped key is to be said at once.
"""

import ast
import functools
import importlib.util
from pathlib import Path

from ..baselines import BASELINES

PACKAGE = Path(__file__).parents[1]


def transformers_folder() -> Path:
    """Where the sources of transformers are, without importing it."""
    return Path(importlib.util.find_spec("transformers").origin).parent


def class_in(source: str, name: str) -> ast.ClassDef:
    """A class at the top of a module."""
    return next(node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == name)


def fields_of(found: ast.ClassDef) -> list[ast.AnnAssign]:
    """The annotated names of a class, as a dataclass takes its fields from them; without private ones."""
    return [node for node in found.body if isinstance(node, ast.AnnAssign) and not node.target.id.startswith("_")]


@functools.cache
def declared_in(path: Path, class_name: str) -> tuple[str, ...]:
    """The names of the fields of a class."""
    return tuple(node.target.id for node in fields_of(class_in(path.read_text(encoding="utf-8"), class_name)))


def training_keys() -> set[str]:
    """The fields of S4TrainingArguments: those of transformers' TrainingArguments and this project's."""
    theirs = declared_in(transformers_folder() / "training_args.py", "TrainingArguments")
    return {*theirs, *declared_in(PACKAGE / "config" / "arguments.py", "S4TrainingArguments")}


def model_keys(kind: str | None = None) -> list[str]:
    """The keys that a `model` may have: what S4Config declares itself, without what transformers adds.

    kind: the `type` of a baseline; the keys are then those of its class, and the general names that it answers to.
    """
    if kind is None:
        return sorted(declared_in(PACKAGE / "modeling" / "configuration_s4.py", "S4Config"))
    path = transformers_folder() / "models" / kind / f"configuration_{kind}.py"
    return sorted({"type", *declared_in(path, BASELINES[kind][0]), *general_names(path)})


@functools.cache
def general_names(path: Path) -> tuple[str, ...]:
    """What else a config's class answers to: the keys of its attribute_map, such as hidden_size for n_embd."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "attribute_map":
            return tuple(ast.literal_eval(node.value))
    return ()
