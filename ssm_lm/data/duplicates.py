"""Which documents of a split are exact copies of an earlier one, found in memory that does not grow with the split."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .encoding import ROW

# Documents whose hashes are compared at a time, 24 bytes each and as much again for sorting.
BUCKET = 1 << 22
_FOUND = np.dtype([("key", "<u8", 2), ("place", "<i8")])


def first_of_each(rows: Sequence[Path], number: int, folder: Path, bucket: int | None = None) -> np.ndarray:
    """(number,) bool: whether a document is the first of its kind, in the order of the documents.

    rows: files of ROW, in order, of `number` documents in all. folder: for files that are gone afterwards; keys are
    spread over them by their first bits, so that about `bucket` (BUCKET) of them are compared at a time.
    """
    buckets = 1
    while number > buckets * (bucket or BUCKET):
        buckets *= 2
    keep = np.ones(number, dtype=bool)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        places = [Path(temporary) / str(index) for index in range(buckets)]
        start = 0
        for path in rows:
            keys = np.fromfile(path, dtype=ROW)["key"]
            found = np.empty(len(keys), dtype=_FOUND)
            found["key"], found["place"] = keys, np.arange(start, start + len(keys))
            start += len(keys)
            found = found[keys.any(axis=1)]  # a key of 0: stays in any case
            of_bucket = found["key"][:, 0] % np.uint64(buckets)
            for index in np.unique(of_bucket):
                with open(places[index], "ab") as file:
                    file.write(found[of_bucket == index].tobytes())
        for path in places:
            if path.exists():
                found = np.fromfile(path, dtype=_FOUND)
                keep[found["place"]] = False
                _, first = np.unique(found["key"], axis=0, return_index=True)
                keep[found["place"][first]] = True
    return keep
