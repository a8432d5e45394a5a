"""From the parts of all units to the token files of each split, of one size, and the manifest that lists them."""

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..files import new_file, write_json
from .duplicates import first_of_each
from .encoding import COUNTS, ROW, part_path
from .manifest import DTYPES, FORMAT_VERSION, Manifest, ShardInfo, SplitInfo
from .shards import hash_file
from .work_folder import Plan, WorkFolder

_BLOCK = 1 << 22  # ids


class NoText(UserError):
    """A split has no text: nothing of what was done can be used."""


@dataclass(frozen=True)
class Run:
    """Ids of a part that stand behind one another in a split: `count` from `start` on."""

    path: Path
    start: int
    count: int


def assemble(work: WorkFolder, plan: Plan, shard_tokens: int, workers: int) -> Manifest:
    """Write the token files of every split, the counts of their ids and the manifest into the work folder.

    A file that an earlier call has written stays. Raises UserError when a part is missing or of another request, NoText
    for a split that holds none.
    """
    number = work.units()
    parts = [work.counts(unit, plan.digest) for unit in range(number or 0)]
    missing = [unit for unit, counts in enumerate(parts) if counts is None]
    if number is None or missing:
        raise UserError(
            f"{work.folder}: {f'{len(missing)} of {number} parts are' if number else 'parts are'} not done yet"
            f"{f' (the first is {missing[0]})' if missing else ''}; let every `--shard` end, or call again without it"
        )
    splits = {}
    for split in plan.splits:
        splits[split] = _split(work, plan, split, parts, shard_tokens, workers)
    with open(work.tokenizer / "tokenizer.json", "rb") as file:
        tokenizer_sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        dataset=plan.dataset,
        description=plan.description,
        tokenizer=plan.tokenizer,
        tokenizer_sha256=tokenizer_sha256,
        vocab_size=plan.vocab_size,
        eos_token_id=plan.eos_token_id,
        dtype=plan.dtype,
        splits=splits,
        request=plan.request,
        ids_checked=True,
    )
    manifest.write(work.folder)
    return manifest


def _split(work: WorkFolder, plan: Plan, split: str, parts: list[dict], shard_tokens: int, workers: int) -> SplitInfo:
    """Write one split."""
    runs, totals = _runs(work, plan, split, parts)
    if not totals["words"]:  # line ends alone are none
        advice = "give --hold-out a larger share" if plan.divided else "give it some, or leave its file out"
        raise NoText(f"{plan.dataset}: the {split} split holds no text; {advice}")
    work.shards.mkdir(exist_ok=True)
    shards = list(shards_of(runs, shard_tokens))
    names = [f"{split}.bin"] if len(shards) == 1 else [f"{split}/{number:05}.bin" for number in range(len(shards))]
    (work.folder / names[0]).parent.mkdir(exist_ok=True)

    def write(place: tuple[str, list[Run]]) -> tuple[ShardInfo, np.ndarray]:
        return _write_shard(work, plan, *place)

    unigram, digest, infos = np.zeros(plan.vocab_size, dtype="<i8"), hashlib.sha256(), []
    with ThreadPoolExecutor(workers) as pool:
        for info, counts in pool.map(write, zip(names, shards, strict=True)):
            unigram += counts
            infos.append(info)
            if len(names) > 1:
                hash_file(digest, work.folder / info.file)
    name = f"{split}.unigram"
    _write_bytes(work.folder / name, unigram.tobytes())
    sha256 = infos[0].sha256 if len(infos) == 1 else digest.hexdigest()
    return SplitInfo(**totals, sha256=sha256, shards=tuple(infos), unigram=name)


def _runs(work: WorkFolder, plan: Plan, split: str, parts: list[dict]) -> tuple[list[Run], dict[str, int]]:
    """Where the ids of a split lie, in order, and its counts; without what is a copy of an earlier document."""
    numbers = [number for number, splits in enumerate(parts) if splits.get(split, {}).get("tokens")]
    totals = {name: sum(parts[number][split][name] for number in numbers) for name in COUNTS}
    if not plan.request.get("drop_duplicates"):
        return [Run(part_path(work.parts, n, split), 0, parts[n][split]["tokens"]) for n in numbers], totals
    rows = [part_path(work.parts, number, f"{split}.rows") for number in numbers]
    sizes = [path.stat().st_size // ROW.itemsize for path in rows]
    keep, runs, first = first_of_each(rows, sum(sizes), work.folder), [], 0
    for number, path, size in zip(numbers, rows, sizes, strict=True):
        table, kept = np.fromfile(path, dtype=ROW), keep[first : first + size]
        first += size
        for name in COUNTS:
            totals[name] -= int(table[name][~kept].sum())
        ends = np.cumsum(table["tokens"])
        for start, stop in _stretches(kept):
            begin = int(ends[start] - table["tokens"][start])
            runs.append(Run(part_path(work.parts, number, split), begin, int(ends[stop - 1]) - begin))
    return runs, totals


def _stretches(kept: np.ndarray) -> Iterator[tuple[int, int]]:
    """(start, stop) of each stretch of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], kept, [False]]).astype(np.int8)))
    return zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)


def shards_of(runs: list[Run], shard_tokens: int) -> Iterator[list[Run]]:
    """The runs of each token file: `shard_tokens` ids, the last one less."""
    shard, left = [], shard_tokens
    for run in runs:
        start, count = run.start, run.count
        while count:
            taken = min(count, left)
            shard.append(Run(run.path, start, taken))
            start, count, left = start + taken, count - taken, left - taken
            if not left:
                yield shard
                shard, left = [], shard_tokens
    if shard:
        yield shard


def _write_shard(work: WorkFolder, plan: Plan, name: str, runs: list[Run]) -> tuple[ShardInfo, np.ndarray]:
    """Write one token file under another name, check its ids, and rename it; give what it is and the counts of its ids.

    Beside the parts stands what a later call needs to know of a file that is done.
    """
    path, tokens, dtype = work.folder / name, sum(run.count for run in runs), np.dtype(DTYPES[plan.dtype])
    note, counted = (work.shards / f"{name.replace('/', '-')}.{kind}" for kind in ("json", "unigram"))
    if note.exists() and path.is_file() and path.stat().st_size == tokens * dtype.itemsize:
        return ShardInfo(**json.loads(note.read_text(encoding="utf-8"))), np.fromfile(counted, dtype="<i8")
    digest, counts = hashlib.sha256(), np.zeros(plan.vocab_size, dtype="<i8")

    def blocks() -> Iterator[bytes]:
        for run in runs:
            for start in range(run.start, run.start + run.count, _BLOCK):
                count = min(_BLOCK, run.start + run.count - start)
                ids = np.fromfile(run.path, dtype=dtype, count=count, offset=start * dtype.itemsize)
                if len(ids) != count:
                    raise UserError(f"{run.path}: is cut short; remove its .json beside it, and call again")
                found = np.bincount(ids, minlength=plan.vocab_size)
                if len(found) > plan.vocab_size:
                    raise UserError(
                        f"{run.path}: holds the id {len(found) - 1}, the vocabulary has {plan.vocab_size}; remove its "
                        ".json beside it, and call again"
                    )
                counts[:] += found
                data = ids.tobytes()
                digest.update(data)
                yield data

    _write_bytes(path, blocks())
    info = ShardInfo(name, tokens, digest.hexdigest())
    _write_bytes(counted, counts.tobytes())
    write_json(note, asdict(info))
    return info, counts


def _write_bytes(path: Path, blocks: bytes | Iterator[bytes]) -> None:
    """Write a file under another name, bring it to the disk, and rename it."""
    with new_file(path) as partial, open(partial, "wb") as file:
        for block in [blocks] if isinstance(blocks, bytes) else blocks:
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
