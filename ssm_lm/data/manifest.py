"""The manifest of a folder of tokens: what is in it, and what it was made of."""

import json
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path, PurePosixPath
from typing import get_origin

from ..errors import UserError, first_line
from ..files import write_json

MANIFEST_FILE = "manifest.json"
# Version 1 had one file a split, SPLIT.bin, and no word on whether the ids were checked.
FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)
# On disk the tokens are little endian whatever the machine.
DTYPES = {"uint16": "<u2", "uint32": "<u4"}


@dataclass(frozen=True)
class ShardInfo:
    """A file of token ids: its name in the folder, with `/`, the number of its tokens, its sha256."""

    file: str
    tokens: int
    sha256: str


@dataclass(frozen=True)
class SplitInfo:
    """What one split holds. words: by `str.split()`; lines: `\\n`s; bytes: the text's in UTF-8.

    sha256: of all token ids in order, whatever the files. shards: the files in order, all of one size but the last;
    none where the split is the one file SPLIT.bin, as in version 1. unigram: the file that says how often each id
    occurs, int64 (V,), little endian; "" where there is none.
    """

    tokens: int
    documents: int
    words: int
    lines: int
    bytes: int
    sha256: str
    shards: tuple[ShardInfo, ...] = ()
    unigram: str = ""


@dataclass(frozen=True)
class Manifest:
    """What `ssm-lm prepare` wrote. tokenizer_sha256: of tokenizer/tokenizer.json; request: what it was asked for.

    ids_checked: every id was held against vocab_size when it was written.
    """

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
    ids_checked: bool = False

    def files(self, split: str) -> tuple[ShardInfo, ...]:
        """The token files of a split, in order."""
        info = self.splits[split]
        return info.shards or (ShardInfo(f"{split}.bin", info.tokens, info.sha256),)

    def write(self, folder: Path) -> None:
        """Write the manifest into `folder`, whole or not at all."""
        write_json(folder / MANIFEST_FILE, asdict(self))

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
        if version not in READABLE_VERSIONS:
            known = " and ".join(map(str, READABLE_VERSIONS))
            raise UserError(f"{path}: format version {version}, this program reads {known}; {again} again")
        values = _checked(cls, values, path, "")
        if values["dtype"] not in DTYPES:
            raise UserError(f"{path}: dtype {values['dtype']!r} is none of {', '.join(DTYPES)}; {again} again")
        values["splits"] = {name: _split(name, split, path) for name, split in values["splits"].items()}
        return cls(**values)


def _split(name: str, values: object, path: Path) -> SplitInfo:
    """One split of a manifest, checked: its files lie in the folder, stand there once, and have its tokens."""
    values = _checked(SplitInfo, values, path, f"splits.{name}.")
    shards = [
        ShardInfo(**_checked(ShardInfo, shard, path, f"splits.{name}.shards[{number}]."))
        for number, shard in enumerate(values["shards"])
    ]
    again = "make the folder by `ssm-lm prepare` again"
    known = set()
    for file in [*(shard.file for shard in shards), *filter(None, [values["unigram"]])]:
        if file in known:
            raise UserError(f"{path}: splits.{name} lists {file} twice; {again}")
        if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
            raise UserError(f"{path}: splits.{name} lists {file}, which is not in the folder; {again}")
        known.add(file)
    total = sum(shard.tokens for shard in shards)
    if shards and total != values["tokens"]:
        raise UserError(f"{path}: the files of splits.{name} have {total} tokens, not {values['tokens']}; {again}")
    return SplitInfo(**values | {"shards": tuple(shards)})


def _checked(kind: type, values: object, path: Path, prefix: str) -> dict:
    """The values of the fields of `kind`, each of its type or the default where the key is not there; keys of a later
    minor version are passed over.
    """
    if not isinstance(values, dict):
        raise UserError(f"{path}: {prefix.rstrip('.')} is not an object; make the folder by `ssm-lm prepare` again")
    found = {}
    for field in fields(kind):
        expected = {tuple: list}.get(get_origin(field.type), get_origin(field.type)) or field.type
        if field.name not in values and field.default is not MISSING:
            found[field.name] = field.default
        elif type(values.get(field.name)) is not expected:
            raise UserError(
                f"{path}: key {prefix}{field.name} is missing or no {expected.__name__}; "
                "make the folder by `ssm-lm prepare` again"
            )
        else:
            found[field.name] = values[field.name]
    return found
