"""The `builtin` corpus: English prose that every installation of this package has on its disk.

It is made of the Python language topics behind `help()`, the docstrings of the standard library and of the packages
that ssm_lm itself needs, and those packages' long descriptions. It asks for no network, so it serves tests, first
steps and machines behind a wall. The same versions give the same text; another version of a package gives a slightly
different one, so numbers on it compare only within one environment.

Source files are parsed, never imported.
"""

import ast
import functools
import hashlib
import importlib.metadata
import inspect
import os
import platform
import re
import warnings
from collections.abc import Iterator
from pathlib import Path, PurePath

# Only what ssm_lm installs: the text must not depend on what else a user has.
DISTRIBUTIONS = (
    "accelerate",
    "datasets",
    "deepspeed",
    "filelock",
    "fsspec",
    "huggingface_hub",
    "jinja2",
    "markdown-it-py",
    "numpy",
    "packaging",
    "pyarrow",
    "pygments",
    "pyyaml",
    "rich",
    "safetensors",
    "tensorboard",
    "tokenizers",
    "torch",
    "tqdm",
    "transformers",
)
MINIMUM_CHARACTERS = 400
# Tests hold fixtures, not prose. transformers/models is hundreds of near copies of one another, which would put
# sentences of the training split into the test split; the insides of torch are long to parse for little prose.
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_SKIPPED_TREES = ("transformers/models/", "torch/_", "torch/testing/")
_LETTER = re.compile(r"[^\W\d_]")
_NOT_WHITE = re.compile(r"\S")


def documents(split: str) -> Iterator[str]:
    """Yield the documents of "train", "validation" or "test"; a document's own hash decides where it goes."""
    return iter(_splits()[split])


def identity() -> dict[str, str]:
    """The versions that the text depends on."""
    found = {name: distribution.version for name, distribution in _installed().items()}
    return {"python": platform.python_version(), **found}


@functools.cache
def _splits() -> dict[str, tuple[str, ...]]:
    splits = {"train": [], "validation": [], "test": []}
    for document, digest in _distinct_documents():
        share = int.from_bytes(digest[:8], "big") % 100
        splits["train" if share < 92 else "validation" if share < 96 else "test"].append(document)
    return {split: tuple(group) for split, group in splits.items()}


def _distinct_documents() -> Iterator[tuple[str, bytes]]:
    seen = set()
    for text in _candidates():
        document = text.strip() + "\n"
        if len(document) < MINIMUM_CHARACTERS or not _is_prose(document):
            continue
        digest = hashlib.sha256(document.encode("utf-8")).digest()
        if digest not in seen:
            seen.add(digest)
            yield document, digest


def _candidates() -> Iterator[str]:
    from pydoc_data import topics

    for name in sorted(topics.topics):
        yield topics.topics[name]
    library = Path(os.__file__).parent
    for path in sorted(library.rglob("*.py")):
        if _is_wanted(path.relative_to(library)):
            yield from _docstrings(path)
    for distribution in _installed().values():
        yield distribution.metadata.get_payload() or distribution.metadata["Description"] or ""
        for file in sorted(distribution.files or ()):
            if file.suffix == ".py" and _is_wanted(file):
                yield from _docstrings(Path(distribution.locate_file(file)))


def _installed() -> dict[str, importlib.metadata.Distribution]:
    found = {}
    for name in DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _is_wanted(path: PurePath) -> bool:
    # ".." leads to scripts outside the package; _sysconfigdata is written by the build of each interpreter
    return (
        not _SKIPPED_FOLDERS.intersection(path.parts)
        and ".." not in path.parts
        and not path.as_posix().startswith(_SKIPPED_TREES)
        and not path.name.startswith("_sysconfigdata")
    )


def _docstrings(path: Path) -> Iterator[str]:
    """The docstrings of one source file, in the order of the file; none if it is not valid Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SyntaxWarning of somebody else's escapes
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return
    pending = [tree]
    while pending:
        node = pending.pop()
        text = _raw_docstring(node)
        if len(text) >= MINIMUM_CHARACTERS:
            yield inspect.cleandoc(text)
        # only the bodies of modules and classes: `ast.walk` would visit every expression, at twice the time
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            inner = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            pending.extend(child for child in reversed(node.body) if isinstance(child, inner))


def _raw_docstring(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    match node.body:
        case [ast.Expr(value=ast.Constant(value=str(text))), *_]:
            return text
    return ""


def _is_prose(text: str) -> bool:
    """Whether the text is letters for the most part, unlike tables and drawings, without control characters."""
    if not text.replace("\n", "").replace("\t", "").isprintable():
        return False
    marks = len(_NOT_WHITE.findall(text))
    return len(_LETTER.findall(text)) >= 0.7 * marks
