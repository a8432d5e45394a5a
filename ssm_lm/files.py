"""Files that are there whole or not at all."""

import json
import os
import secrets
from pathlib import Path


def write_json(path: Path, value: dict) -> None:
    """Write a JSON file under another name and rename it. Raises OSError; nothing is left behind then."""
    partial = path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")
    try:
        partial.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
