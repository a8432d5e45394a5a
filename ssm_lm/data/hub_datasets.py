"""Data sets of the Hugging Face Hub, streamed by `datasets`: `hub:ORG/NAME` or `hub:ORG/NAME/CONFIG`."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import UserError, first_line
from ..extras import need
from ..hub_access import asking_the_hub
from . import hub
from .documents import MANY_FILES, Documents, Marked
from .text_files import checked_text

HUB_PREFIX = "hub:"
# The row groups of so many files are looked up, one request a file; of more, a file is read as a whole.
FEW_FILES = 8 * MANY_FILES
# A part that a worker reads holds a row group at least, and there are no more than so many parts a split.
PARTS = 1 << 14


@dataclass(frozen=True)
class HubPart:
    """Some files or row groups of a split, which a worker streams by itself: `rows` is an IterableDataset."""

    name: str
    rows: Any
    text_field: str

    def __call__(self) -> Marked:
        try:
            for number, row in enumerate(self.rows, 1):
                if text := checked_text(row, self.text_field, f"{self.name}: row {number} of a part"):
                    yield True, text
        except UserError:
            raise
        except Exception as error:  # of the Hub's client, of Arrow, of whatever reads the files
            raise UserError(
                f"{self.name}: the stream broke off ({first_line(error)}); check the network and the data set"
            ) from error


def hub_splits(
    name: str, text_field: str, revision: str | None = None, only: str | None = None
) -> tuple[dict[str, Documents], dict]:
    """The splits of a data set by their names there, and what tells it from another: its name, config and commit.

    revision: a commit, tag or branch. only: the one split to take. Nothing of the text is read or kept on this disk.
    Raises UserError when the data set, the config, the split or the field is not there, or the Hub is not reached.
    """
    path, config = _parts_of(name)
    need(f"{name}: a data set of the Hub", "train", "datasets")
    try:
        with hub.one_line_errors(), asking_the_hub():
            commit = _commit(path, revision)
            streams = _streams(path, config, commit, text_field)
    except Exception as error:  # the Hub's client has a dozen kinds, of several libraries, for "not reached"
        raise UserError(
            f"--dataset {name}: could not be had from the Hub: {first_line(error)}; "
            "check the name, the network and the token (hf auth login)"
        ) from error
    if only is not None:
        if only not in streams:
            raise UserError(f"--split {only}: {name} has only {', '.join(streams)}")
        streams = {only: streams[only]}
    splits = {}
    for split, rows in streams.items():
        columns = rows.column_names
        if columns is not None and text_field not in columns:
            raise UserError(f"{name}: no field {text_field!r}, only {', '.join(columns)}; choose one by --text-field")
        splits[split] = Documents(HubPart(name, rows, text_field), _ranges(name, rows, text_field))
    identity = {"hub": path, "config": config, "revision": commit}
    return splits, identity | ({"split": only} if only else {})


def _parts_of(name: str) -> tuple[str, str | None]:
    parts = name.removeprefix(HUB_PREFIX).split("/")
    if not 2 <= len(parts) <= 3 or not all(parts):
        raise UserError(f"--dataset {name}: write hub:ORG/NAME, or hub:ORG/NAME/CONFIG")
    return "/".join(parts[:2]), parts[2] if len(parts) == 3 else None


def _commit(path: str, revision: str | None) -> str:
    from huggingface_hub import HfApi, constants

    return HfApi(endpoint=constants.ENDPOINT).dataset_info(path, revision=revision, timeout=30).sha


def _streams(path: str, config: str | None, commit: str, text_field: str) -> dict:
    """Split -> IterableDataset, of which only the text is read where the files are Parquet."""
    import datasets

    builder = datasets.load_dataset_builder(path, config, revision=commit)
    if "columns" in {field.name for field in dataclasses.fields(builder.config)}:
        columns = (builder.info.features or {}).keys()
        if not columns or text_field in columns:
            builder = datasets.load_dataset_builder(path, config, revision=commit, columns=[text_field])
    return dict(builder.as_streaming_dataset())


def _ranges(name: str, rows, text_field: str) -> Callable[[], list[HubPart]]:
    def ranges() -> list[HubPart]:
        try:
            with hub.one_line_errors(), asking_the_hub():
                fine = rows.reshard() if rows.num_shards < FEW_FILES else rows
        except Exception as error:  # see above
            raise UserError(f"{name}: its files cannot be read: {first_line(error)}; check the network") from error
        number = min(fine.num_shards, PARTS)
        return [HubPart(name, fine.shard(number, index), text_field) for index in range(number)]

    return ranges
