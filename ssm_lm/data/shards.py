"""The token files of a split, read as one array."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np

from ..errors import UserError


class ShardedTokens:
    """Files of ids, one behind the other, as a read-only array (n,) of which slices and single ids are taken.

    A file is mapped when something of it is first asked for, so what is opened does not depend on how many there are.
    A slice within one file is a view of its map, one over several a copy. `numpy.asarray` makes an array of all.
    """

    ndim = 1

    def __init__(self, paths: Sequence[Path], counts: Sequence[int], dtype: np.dtype):
        self._paths, self._counts, self.dtype = list(paths), list(counts), np.dtype(dtype)
        self._ends = list(accumulate(counts))
        self._starts = [0, *self._ends]
        self._maps: dict[int, np.memmap] = {}

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def shape(self) -> tuple[int]:
        """(n,), as an array has it."""
        return (len(self),)

    def __getitem__(self, place: int | slice) -> np.ndarray | np.integer:
        if not isinstance(place, slice):
            place = range(len(self))[place]
            number = bisect_right(self._ends, place)
            return self._file(number)[place - self._starts[number]]
        start, stop, step = place.indices(len(self))
        if step != 1:
            raise ValueError(f"slices of a token stream have step 1, not {step}")
        parts, number = [], bisect_right(self._ends, start)
        while start < stop:
            end = min(stop, self._ends[number])
            parts.append(self._file(number)[start - self._starts[number] : end - self._starts[number]])
            start, number = end, number + 1
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.empty(0, self.dtype)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        if copy is False:
            raise ValueError("the token files of a split are no one array without a copy")
        return self[:].astype(dtype or self.dtype)

    def tolist(self) -> list[int]:
        """All ids, for small splits."""
        return self[:].tolist()

    def _file(self, number: int) -> np.memmap:
        if number not in self._maps:
            self._maps[number] = map_file(self._paths[number], self._counts[number], self.dtype)
        return self._maps[number]


def map_file(path: Path, count: int, dtype: np.dtype) -> np.memmap:
    """The `count` ids of one file, mapped read-only; UserError where it is not there or has another size."""
    check_size(path, count, dtype)
    try:
        return np.memmap(path, dtype=dtype, mode="r")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def check_size(path: Path, count: int, dtype: np.dtype) -> None:
    """UserError unless the file is there with the bytes of `count` ids."""
    expected = count * np.dtype(dtype).itemsize
    try:
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: no such file, though the manifest names it; make the folder again") from error
    if size != expected or count == 0:
        raise UserError(
            f"{path}: {size} bytes, where the manifest's {count} tokens are {expected}; make the folder again"
        )


def hash_file(digest, path: Path) -> None:
    """Add the bytes of a file to a hash of hashlib, some at a time."""
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
