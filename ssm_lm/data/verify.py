"""`ssm-lm verify`: read all of a prepared folder and hold it against its manifest."""

import argparse
import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..processors import usable
from .manifest import DTYPES, Manifest, ShardInfo
from .shards import check_size, hash_file, map_file

_BLOCK = 1 << 22  # ids


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument("data", type=Path, metavar="DATA", help="a folder that `ssm-lm prepare` wrote")
    parser.add_argument("--workers", type=int, metavar="N", help="files read at a time (default: all cores)")


def run(args: argparse.Namespace) -> None:
    """Verify the folder, and print a line a split."""
    manifest = verify(args.data, workers=args.workers)
    for name, split in manifest.splits.items():
        number = len(manifest.files(name))
        print(f"{name}: {split.tokens:,} tokens in {number} file{'s' if number > 1 else ''}")
    print(f"{args.data}: as its manifest says")


def verify(folder: str | Path, *, workers: int | None = None) -> Manifest:
    """Read every token file and the tokenizer of a prepared folder, and return its manifest.

    Sizes, hashes, ids against the vocabulary, the counts of ids and, of several files, the hash of all are compared.
    Raises UserError that names the first file that is missing, cut, changed, or of another tokenizer.
    """
    folder = Path(folder).expanduser()
    if workers is not None and workers < 1:
        raise UserError(f"--workers {workers}: must be 1 or more")
    manifest = Manifest.read(folder)
    if _sha256(folder / "tokenizer" / "tokenizer.json") != manifest.tokenizer_sha256:
        raise UserError(f"{folder / 'tokenizer' / 'tokenizer.json'}: is another tokenizer than the manifest's")
    dtype = np.dtype(DTYPES[manifest.dtype])
    for split in manifest.splits:  # all sizes before any file is read
        for file in manifest.files(split):
            check_size(folder / file.file, file.tokens, dtype)
    with ThreadPoolExecutor(workers or usable()) as pool:
        for split in manifest.splits:
            _verify_split(folder, manifest, split, pool)
    return manifest


def _verify_split(folder: Path, manifest: Manifest, split: str, pool: ThreadPoolExecutor) -> None:
    info, files = manifest.splits[split], manifest.files(split)
    counts, whole = np.zeros(manifest.vocab_size, dtype=np.int64), hashlib.sha256()
    for file, found in zip(files, pool.map(lambda file: _counts(folder, manifest, file), files), strict=True):
        counts += found
        if len(files) > 1:
            hash_file(whole, folder / file.file)
    if len(files) > 1 and whole.hexdigest() != info.sha256:
        raise UserError(f"{folder}: the files of {split} are not those of its sha256, or in another order")
    if info.unigram:
        path = folder / info.unigram
        if not np.array_equal(map_file(path, manifest.vocab_size, np.dtype("<i8")), counts):
            raise UserError(f"{path}: is not how often each id occurs; make the folder again")


def _counts(folder: Path, manifest: Manifest, file: ShardInfo) -> np.ndarray:
    """How often each id occurs in one file, whose hash is that of the manifest."""
    path, dtype = folder / file.file, np.dtype(DTYPES[manifest.dtype])
    digest, counts = hashlib.sha256(), np.zeros(manifest.vocab_size, dtype=np.int64)
    tokens = map_file(path, file.tokens, dtype)
    for start in range(0, len(tokens), _BLOCK):
        ids = np.array(tokens[start : start + _BLOCK])
        digest.update(ids.tobytes())
        found = np.bincount(ids, minlength=manifest.vocab_size)
        if len(found) > manifest.vocab_size:
            raise UserError(
                f"{path}: holds the token {len(found) - 1}, its tokenizer has only {manifest.vocab_size}; make the "
                "folder again"
            )
        counts += found
    if digest.hexdigest() != file.sha256:
        raise UserError(
            f"{path}: sha256 {digest.hexdigest()[:12]}, the manifest says {file.sha256[:12]}; make the folder again"
        )
    return counts


def _sha256(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
