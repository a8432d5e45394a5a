"""A prepared split as one long memory-mapped array of token ids, in one file or in several."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..errors import UserError
from .manifest import DTYPES, Manifest, SplitInfo
from .shards import ShardedTokens, check_size, map_file

_BLOCK = 1 << 24


@dataclass(frozen=True, eq=False)
class TokenStream:
    """The tokens of one split; open it by `TokenStream.open`.

    tokens: the ids, read-only, (n,): an np.memmap of the one file, or a `ShardedTokens` of several. manifest: of the
    whole folder; `info` is the split's part of it.
    """

    folder: Path
    split: str
    manifest: Manifest
    tokens: np.memmap | ShardedTokens = field(repr=False)

    @classmethod
    def open(cls, folder: str | Path, split: str, check_files: bool = True) -> "TokenStream":
        """Open `split` of a folder that `ssm-lm prepare` wrote.

        check_files: look at the size of each file now; else at that of a file when it is first read, for a rank that
        was told that another one has looked.
        Raises UserError when the folder or its manifest is not whole, the split is missing, or a file has not the
        size that the manifest says.
        """
        folder = Path(folder).expanduser()
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; make it by `ssm-lm prepare`")
        manifest = Manifest.read(folder)
        if split not in manifest.splits:
            raise UserError(f"{folder}: no split {split!r}; there are {', '.join(manifest.splits) or 'none'}")
        files, dtype = manifest.files(split), np.dtype(DTYPES[manifest.dtype])
        paths, counts = [folder / file.file for file in files], [file.tokens for file in files]
        if len(files) == 1:
            return cls(folder, split, manifest, map_file(paths[0], counts[0], dtype))
        if check_files:
            for path, count in zip(paths, counts, strict=True):
                check_size(path, count, dtype)
        return cls(folder, split, manifest, ShardedTokens(paths, counts, dtype))

    def __len__(self) -> int:
        return len(self.tokens)

    def __reduce__(self):
        # a worker process maps the files again; pickling the array would copy it
        return TokenStream.open, (self.folder, self.split, False)

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
        """The sha256 of the split's ids in order, as the manifest has it: the same whatever files they lie in."""
        return self.info.sha256

    def unigram_counts(self) -> np.ndarray:
        """How often each id occurs, int64 (V,): from the folder, where prepare has counted, else by reading all."""
        if self.info.unigram:
            return np.array(map_file(self.folder / self.info.unigram, self.vocab_size, np.dtype("<i8")))
        counts = np.zeros(self.vocab_size, dtype=np.int64)
        # in blocks, for bincount turns what it is given into int64
        for start in range(0, len(self), _BLOCK):
            counts += np.bincount(self.tokens[start : start + _BLOCK], minlength=self.vocab_size)
        return counts

    def verify(self) -> None:
        """Read every file and compare its sha256 with the manifest's; UserError when they differ."""
        for file in self.manifest.files(self.split):
            path = self.folder / file.file
            check_size(path, file.tokens, self.tokens.dtype)
            with open(path, "rb") as opened:
                found = hashlib.file_digest(opened, "sha256").hexdigest()
            if found != file.sha256:
                raise UserError(
                    f"{path}: sha256 {found[:12]}, the manifest says {file.sha256[:12]}; make the folder again"
                )

    def check_vocabulary(self, vocab_size: int, name: str = "the model") -> None:
        """Raise UserError unless each id is one of the `vocab_size` ids that `name` knows.

        The ids are read only where the manifest does not say that they were checked when they were written.
        """
        advice = f"prepare the text with the tokenizer of {name}"
        if self.vocab_size > vocab_size:
            raise UserError(
                f"{self.folder}: its tokenizer has {self.vocab_size} tokens, {name} only {vocab_size}; {advice}"
            )
        if self.manifest.ids_checked:
            return
        # an id outside the embedding is a memory fault on a GPU, so the size of the vocabulary is not enough
        largest = max(int(self.tokens[i : i + _BLOCK].max()) for i in range(0, len(self.tokens), _BLOCK))
        if largest >= vocab_size:
            raise UserError(
                f"{self.folder / self.split}: holds the token {largest}, {name} has only {vocab_size}; {advice}"
            )
