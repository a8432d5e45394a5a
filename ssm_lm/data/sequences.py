"""Sequence classification tasks: digits, Fashion-MNIST and IMDB bytes, ListOps.

A task is three splits of examples and what a model must know of them. Continuous ones (pixels) come as `inputs_embeds`
(L, 1), symbolic ones as `input_ids` (L,); examples of unequal length are padded on the right, with an attention mask.
"""

import gzip
import importlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from ..errors import UserError
from .listops import NUM_LABELS, PAD, SPLITS, VOCAB_SIZE, read_split
from .recall import RECALL_TASKS, Recall


@dataclass(frozen=True)
class SequenceTask:
    """splits: train, validation and test. input_size is set for continuous inputs, vocab_size for symbolic ones."""

    name: str
    splits: dict[str, Dataset] = field(repr=False)
    num_labels: int
    input_size: int | None = None
    vocab_size: int | None = None
    pad_token_id: int | None = None

    def model_keys(self) -> dict:
        """The keys of S4Config that follow from the task."""
        keys = {"num_labels": self.num_labels}
        if self.input_size is not None:
            return keys | {"input_size": self.input_size}
        return keys | {"vocab_size": self.vocab_size, "pad_token_id": self.pad_token_id}

    def collate(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        """A batch, padded on the right to its longest example."""
        labels = torch.tensor([example["labels"] for example in examples])
        key = "inputs_embeds" if self.input_size is not None else "input_ids"
        rows = [torch.as_tensor(example[key]) for example in examples]
        if len({len(row) for row in rows}) == 1:
            return {key: torch.stack(rows), "labels": labels}
        lengths = torch.tensor([len(row) for row in rows])
        value = 0.0 if self.pad_token_id is None else self.pad_token_id
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
        mask = (torch.arange(padded.shape[1]) < lengths[:, None]).long()
        return {key: padded, "attention_mask": mask, "labels": labels}


class Examples(Dataset):
    """Sequences and labels by index; `read` makes the sequence of an item."""

    def __init__(self, key: str, items, labels, read: Callable = lambda item: item):
        self.key, self.items, self.labels, self.read = key, items, labels, read

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return {self.key: self.read(self.items[index]), "labels": int(self.labels[index])}


def load_task(name: str) -> SequenceTask | Recall:
    """A task by name: `digits`, one of recall.py's, or `fashion-mnist:FOLDER`, `imdb:FOLDER`, `listops:FOLDER` with the
    data in a folder.

    Raises UserError for an unknown name, a missing folder or file, data of another form.
    """
    if name in RECALL_TASKS:
        return RECALL_TASKS[name]
    kind, _, folder = name.partition(":")
    if kind not in TASKS:
        raise UserError(f"task {name!r} is unknown; there are {', '.join([*TASKS, *RECALL_TASKS])}")
    load, needs_folder = TASKS[kind]
    if not needs_folder:
        return load()
    if not folder:
        raise UserError(f"task {kind!r} needs the folder of its data: {kind}:FOLDER")
    if not Path(folder).is_dir():
        raise UserError(f"task {name!r}: no such folder {folder}")
    return load(Path(folder))


def _pixels(name: str, splits: dict[str, tuple[np.ndarray, np.ndarray]], largest: float, num_labels: int):
    """Images as sequences of their pixels, row by row, one number in 0 .. 1 each. splits: (count, H, W) and labels."""

    def examples(images, labels):
        flat = torch.from_numpy(images.reshape(len(images), -1, 1).astype(np.float32) / largest)
        return Examples("inputs_embeds", flat, labels)

    return SequenceTask(name, {key: examples(*pair) for key, pair in splits.items()}, num_labels, input_size=1)


def _cut(images, labels, order, *sizes):
    """Consecutive parts of the given sizes from the examples in `order`, as (images, labels) pairs."""
    bounds = np.cumsum([0, *sizes])
    parts = [order[a:b] for a, b in itertools.pairwise(bounds)]
    return [(images[part], labels[part]) for part in parts]


def digits() -> SequenceTask:
    """scikit-learn's 1,797 handwritten digits of 8 x 8: sequences of 64 pixels. 1,257 / 180 / 360 examples."""
    try:
        datasets = importlib.import_module("sklearn.datasets")
    except ImportError as error:
        raise UserError("task 'digits' comes with scikit-learn: pip install scikit-learn") from error
    data = datasets.load_digits()
    order = np.argsort(np.random.PCG64(0).random_raw(len(data.target)), kind="stable")
    train, validation, test = _cut(data.images, data.target, order, 1257, 180, 360)
    return _pixels("digits", {"train": train, "validation": validation, "test": test}, 16.0, 10)


def fashion_mnist(folder: Path) -> SequenceTask:
    """Fashion-MNIST from its idx files, gzipped or not: 784 pixels. 55,000 / 5,000 / 10,000 examples."""
    images, labels = read_idx(folder, "train-images-idx3-ubyte"), read_idx(folder, "train-labels-idx1-ubyte")
    held_out = len(images) // 12
    train, validation = _cut(images, labels, np.arange(len(images)), len(images) - held_out, held_out)
    test = read_idx(folder, "t10k-images-idx3-ubyte"), read_idx(folder, "t10k-labels-idx1-ubyte")
    return _pixels("fashion-mnist", {"train": train, "validation": validation, "test": test}, 255.0, 10)


def read_idx(folder: Path, name: str) -> np.ndarray:
    """An array of bytes in the idx format: two zero bytes, 8, the number of dimensions, each dimension big-endian."""
    for path, opener in ((folder / name, open), (folder / f"{name}.gz", gzip.open)):
        if path.is_file():
            with opener(path, "rb") as file:
                content = file.read()
            break
    else:
        raise UserError(f"{folder / name}: no such file, nor {name}.gz")
    dimensions = content[3] if content[:3] == b"\0\0\x08" and len(content) > 3 else 0
    shape = np.frombuffer(content[4 : 4 + 4 * dimensions], ">u4").astype(int)
    if not dimensions or len(shape) != dimensions or len(content) != 4 + 4 * dimensions + np.prod(shape):
        raise UserError(f"{path}: is no idx file of bytes, or truncated")
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


IMDB_LENGTH = 4096  # bytes; the Long Range Arena cuts reviews at 4,000 characters


def imdb(folder: Path) -> SequenceTask:
    """IMDB reviews as bytes, 1 to 256, padded with 0: from train/pos, train/neg, test/pos, test/neg.

    The last tenth of each training class, by file name, is the validation split.
    """

    def files(split, label):
        found = sorted((folder / split / label).glob("*.txt"))
        if not found:
            raise UserError(f"{folder / split / label}: no .txt files; give the folder above train/ and test/")
        return found

    def read(path: Path):
        return torch.from_numpy(np.frombuffer(path.read_bytes()[:IMDB_LENGTH], np.uint8).astype(np.int64) + 1)

    def examples(by_label):
        items = [(path, label) for label, paths in enumerate(by_label) for path in paths]
        return Examples("input_ids", [path for path, _ in items], [label for _, label in items], read)

    train = [files("train", label) for label in ("neg", "pos")]
    cuts = [len(paths) - max(1, len(paths) // 10) for paths in train]
    splits = {
        "train": examples([paths[:cut] for paths, cut in zip(train, cuts, strict=True)]),
        "validation": examples([paths[cut:] for paths, cut in zip(train, cuts, strict=True)]),
        "test": examples([files("test", label) for label in ("neg", "pos")]),
    }
    return SequenceTask("imdb", splits, 2, vocab_size=257, pad_token_id=0)


def listops(folder: Path) -> SequenceTask:
    """ListOps from the .tsv files of the Long Range Arena or of `python -m ssm_lm.data.listops`, padded with 0."""

    def examples(name):
        sequences, labels = read_split(folder / name)
        return Examples("input_ids", sequences, labels, lambda ids: torch.from_numpy(ids.astype(np.int64)))

    splits = {split: examples(name) for split, (name, _) in SPLITS.items()}
    return SequenceTask("listops", splits, NUM_LABELS, vocab_size=VOCAB_SIZE, pad_token_id=PAD)


# name -> (loader, whether it needs a folder)
TASKS: dict[str, tuple[Callable, bool]] = {
    "digits": (digits, False),
    "fashion-mnist": (fashion_mnist, True),
    "imdb": (imdb, True),
    "listops": (listops, True),
}
