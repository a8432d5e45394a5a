"""The prepared folders that a run reads, in which shares, and from which step on.

They are the keys `data` and `data_schedule` of a config:

    data:                       one folder, or a list: folders of weight 1, or `folder: weight`
      - data/web: 7
      - data/code: 2
      - data/books: 1
    data_schedule:              from these steps on, other weights, in the order of the list
      5000: [2, 6, 2]
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch.utils.data import ConcatDataset, Dataset

from ..errors import UserError
from .manifest import Manifest
from .mixture import Mixture, parts_of
from .phases import Phases, without_repeats
from .stream import TokenStream
from .windows import TokenWindows, WindowSampler


@dataclass(frozen=True)
class Sources:
    """folders: as the config names them; names: short ones, each another; phases: the shares, as whole parts."""

    folders: list[str]
    names: list[str]
    phases: Phases

    @property
    def are_several(self) -> bool:
        return len(self.folders) > 1


def read_sources(data: str | list, schedule: dict | None, where: str) -> Sources:
    """The sources that the two keys name. Nothing is opened. Raises UserError for what makes no mixture."""
    folders, weights = [], []
    for item in data if isinstance(data, list) else [data]:
        folder, weight = next(iter(item.items())) if isinstance(item, dict) and len(item) == 1 else (item, 1)
        if not isinstance(folder, str):
            raise UserError(f"{where}: data: {item!r} is neither a folder nor `folder: weight`")
        if Path(folder).expanduser().resolve() in [Path(other).expanduser().resolve() for other in folders]:
            raise UserError(f"{where}: data: {folder} is listed twice; list it once, with the sum of the weights")
        folders.append(folder)
        weights.append(weight)
    if not folders:
        raise UserError(f"{where}: the key 'data' is needed")
    if schedule and len(folders) == 1:
        raise UserError(f"{where}: data_schedule is for several folders, and `data` names one; leave it out")
    phases = [[0, _parts(weights, f"{where}: data")]]
    for step, weights in (schedule or {}).items():
        what = f"{where}: data_schedule: {step}"
        if type(step) is not int or step < 1:
            raise UserError(f"{what} is no step from which other weights may hold; the first weights stand in `data`")
        if not isinstance(weights, list) or len(weights) != len(folders):
            raise UserError(f"{what}: {weights!r} is not a list of {len(folders)} weights, one a folder of `data`")
        phases.append([step, _parts(weights, what)])
    return Sources(folders, _names(folders), without_repeats(sorted(phases)))


def _parts(weights: list, what: str) -> list[int]:
    for weight in weights:
        if type(weight) not in (int, float):
            raise UserError(f"{what}: the weight {weight!r} is not a number")
    try:
        return list(parts_of(weights))
    except ValueError as error:
        raise UserError(f"{what}: {error}") from error


def _names(folders: list[str]) -> list[str]:
    last = [Path(folder).expanduser().resolve().name for folder in folders]
    return last if len(set(last)) == len(last) else folders


# ---- weights over the steps


# ---- what is read


class SourceWindows:
    """The windows of one source or of several, as one dataset with one order.

    windows: `TokenWindows` a source; phases, names: as `Sources` has them. dataset: what `order` gives numbers of.
    """

    def __init__(self, windows: list[TokenWindows], phases: Phases, names: list[str] = ()):
        self.windows, self.phases, self.names = windows, phases, names
        self.dataset: Dataset = windows[0] if len(windows) == 1 else ConcatDataset(windows)

    def order(self, seed: int, tables: bool, windows_per_step: int) -> WindowSampler | Mixture:
        """The order of a run, whose phases begin at whole steps; seed, tables: as in `WindowSampler`."""
        if len(self.windows) == 1:
            return WindowSampler(self.windows[0], seed, tables)
        orders = [WindowSampler(windows, seed, tables, number) for number, windows in enumerate(self.windows)]
        offsets = np.cumsum([0, *(len(windows) for windows in self.windows)])[:-1].tolist()
        return Mixture(orders, offsets, [(step * windows_per_step, parts) for step, parts in self.phases])

    def __len__(self) -> int:
        """Windows that are all the sources once."""
        return sum(len(WindowSampler(windows)) for windows in self.windows)


def open_sources(folders: list[str]) -> list[TokenStream]:
    """The train split of each folder, whose files are not looked at: see `check_sources`.

    Raises UserError where a manifest is not whole, or of another tokenizer than the first.
    """
    streams = [TokenStream.open(folder, "train", check_files=False) for folder in folders]
    first = streams[0].manifest
    for stream in streams[1:]:
        if stream.manifest.tokenizer_sha256 != first.tokenizer_sha256:
            raise UserError(
                f"{stream.folder}: was prepared with another tokenizer ({stream.manifest.tokenizer}) than "
                f"{streams[0].folder} ({first.tokenizer}); prepare it with `--tokenizer {streams[0].folder}/tokenizer`"
            )
    return streams


def check_sources(streams: list[TokenStream], vocab_size: int) -> None:
    """Raise UserError unless every file of the streams is there, of its size, and every id below `vocab_size`.

    A folder whose manifest vouches for its ids is not read; one from before manifests did is read whole.
    """
    for stream in streams:
        TokenStream.open(stream.folder, stream.split).check_vocabulary(vocab_size)


def validation_windows(folders: list[str], sequence_length: int, pack_documents: bool = False) -> list[TokenWindows]:
    """Those of every source that has a validation split. Raises UserError where none has."""
    streams = [TokenStream.open(folder, "validation") for folder in folders if has_split(folder, "validation")]
    if not streams:
        streams = [TokenStream.open(folders[0], "validation")]  # which says what is missing
    return [TokenWindows(stream, sequence_length, pack_documents) for stream in streams]


def has_split(folder: str, split: str) -> bool:
    """Whether a prepared folder has a split of that name."""
    return split in Manifest.read(Path(folder).expanduser()).splits
