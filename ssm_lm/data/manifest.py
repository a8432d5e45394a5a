"""The manifest of a folder of tokens: what is in it, and what it was made of."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from ..errors import UserError, first_line

MANIFEST_FILE = "manifest.json"
FORMAT_VERSION = 1
# On disk the tokens are little endian whatever the machine.
DTYPES = {"uint16": "<u2", "uint32": "<u4"}


@dataclass(frozen=True)
class SplitInfo:
    """What one split holds. words: by `str.split()`; lines: `\\n`s; bytes: the text's in UTF-8; sha256: the file's."""

    tokens: int
    documents: int
    words: int
    lines: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What `ssm-lm prepare` wrote. tokenizer_sha256: of tokenizer/tokenizer.json; request: what it was asked for."""

    format_version: int
    dataset: str
    description: str
    tokenizer: str
    tokenizer_sha256: str
    vocab_size: int
    eos_token_id: int
    dtype: str
    splits: dict[str, SplitInfo]
    request: dict

    def write(self, folder: Path) -> None:
        """Write the manifest into `folder`."""
        (folder / MANIFEST_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: str | Path) -> "Manifest":
        """Read and check the manifest of `folder`; UserError names the file and what is wrong with it."""
        path = Path(folder) / MANIFEST_FILE
        again = "make the folder by `ssm-lm prepare`"
        if not path.is_file():
            raise UserError(f"{path}: no such file; {again}")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: not readable ({first_line(error)}); {again} again") from error
        version = values.get("format_version") if isinstance(values, dict) else None
        if version != FORMAT_VERSION:
            raise UserError(f"{path}: format version {version}, this program reads {FORMAT_VERSION}; {again} again")
        values = _checked(cls, values, path, "")
        if values["dtype"] not in DTYPES:
            raise UserError(f"{path}: dtype {values['dtype']!r} is none of {', '.join(DTYPES)}; {again} again")
        values["splits"] = {
            name: SplitInfo(**_checked(SplitInfo, split, path, f"splits.{name}."))
            for name, split in values["splits"].items()
        }
        return cls(**values)


def _checked(kind: type, values: object, path: Path, prefix: str) -> dict:
    """The values of the fields of `kind`, each of its type; keys of a later minor version are passed over."""
    if not isinstance(values, dict):
        raise UserError(f"{path}: {prefix.rstrip('.')} is not an object; make the folder by `ssm-lm prepare` again")
    for field in fields(kind):
        expected = field.type if isinstance(field.type, type) and field.type in (int, str) else dict
        if not isinstance(values.get(field.name), expected):
            raise UserError(
                f"{path}: key {prefix}{field.name} is missing or no {expected.__name__}; "
                "make the folder by `ssm-lm prepare` again"
            )
    return {field.name: values[field.name] for field in fields(kind)}
