"""Files and folders that are there whole or not at all."""

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path


def write_json(path: Path, value: dict) -> None:
    """Write a JSON file whole. Raises OSError."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file under another name and rename it. Raises OSError; nothing is left behind then."""
    with new_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def new_file(place: Path) -> Iterator[Path]:
    """A name beside `place` to write a file at, which takes its place when the block ends and is removed when it fails.

    Raises OSError.
    """
    partial = place.with_name(f".{place.name}.partial-{secrets.token_hex(4)}")
    try:
        yield partial
        os.replace(partial, place)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(place: Path) -> Iterator[Path]:
    """A folder beside `place` to write into, which takes the name when the block ends and is removed when it fails.

    `place` is absent or an empty folder. Raises OSError.
    """
    place = place.resolve()
    partial = place.with_name(f"{place.name}.partial-{secrets.token_hex(4)}")
    try:
        partial.mkdir(parents=True)
        yield partial
        os.rename(partial, place)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
