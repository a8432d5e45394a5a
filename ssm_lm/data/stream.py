"""A prepared split as one long memory-mapped array of token ids."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..errors import UserError
from .manifest import DTYPES, Manifest, SplitInfo

_BLOCK = 1 << 24


@dataclass(frozen=True, eq=False)
class TokenStream:
    """The tokens of one split; open it by `TokenStream.open`.

    tokens: a read-only np.memmap of ids. manifest: of the whole folder; `info` is the split's part of it.
    """

    folder: Path
    split: str
    manifest: Manifest
    tokens: np.memmap = field(repr=False)

    @classmethod
    def open(cls, folder: str | Path, split: str) -> "TokenStream":
        """Open `split` of a folder that `ssm-lm prepare` wrote.

        Raises UserError when the folder or its manifest is not whole, the split is missing, or its file has not the
        size that the manifest says.
        """
        folder = Path(folder).expanduser()
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; make it by `ssm-lm prepare`")
        manifest = Manifest.read(folder)
        if split not in manifest.splits:
            raise UserError(f"{folder}: no split {split!r}; there are {', '.join(manifest.splits) or 'none'}")
        path, count = folder / f"{split}.bin", manifest.splits[split].tokens
        dtype = np.dtype(DTYPES[manifest.dtype])
        if not path.is_file():
            raise UserError(f"{path}: no such file, though the manifest names it; make the folder again")
        size = path.stat().st_size
        if size != count * dtype.itemsize or count == 0:
            raise UserError(
                f"{path}: {size} bytes, where the manifest's {count} tokens are {count * dtype.itemsize}; "
                "make the folder again"
            )
        try:
            tokens = np.memmap(path, dtype=dtype, mode="r")
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from error
        return cls(folder, split, manifest, tokens)

    def __len__(self) -> int:
        return len(self.tokens)

    def __reduce__(self):
        # a worker process maps the file again; pickling the array would copy it
        return TokenStream.open, (self.folder, self.split)

    @property
    def info(self) -> SplitInfo:
        """The counts of this split."""
        return self.manifest.splits[self.split]

    @property
    def vocab_size(self) -> int:
        """The size of the vocabulary that the ids come from."""
        return self.manifest.vocab_size

    @property
    def eos_token_id(self) -> int:
        """The id that ends a document (or, in a word-level vocabulary, a line)."""
        return self.manifest.eos_token_id

    @property
    def fingerprint(self) -> str:
        """The sha256 of the split's file, as the manifest has it."""
        return self.info.sha256

    def verify(self) -> None:
        """Read the whole file and compare its sha256 with the manifest's; UserError when they differ."""
        path = self.folder / f"{self.split}.bin"
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != self.fingerprint:
            raise UserError(
                f"{path}: sha256 {found[:12]}, the manifest says {self.fingerprint[:12]}; make the folder again"
            )

    def check_vocabulary(self, vocab_size: int, name: str = "the model") -> None:
        """Raise UserError unless each id is one of the `vocab_size` ids that `name` knows."""
        advice = f"prepare the text with the tokenizer of {name}"
        if self.vocab_size > vocab_size:
            raise UserError(
                f"{self.folder}: its tokenizer has {self.vocab_size} tokens, {name} only {vocab_size}; {advice}"
            )
        # an id outside the embedding is a memory fault on a GPU, so the manifest's word is not enough
        largest = max(int(self.tokens[i : i + _BLOCK].max()) for i in range(0, len(self.tokens), _BLOCK))
        if largest >= vocab_size:
            raise UserError(
                f"{self.folder / self.split}.bin: holds the token {largest}, {name} has only {vocab_size}; {advice}"
            )
