"""Data sets of the Hugging Face Hub, streamed by `datasets`: `hub:ORG/NAME` or `hub:ORG/NAME/CONFIG`."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..errors import UserError, first_line
from ..extras import need
from ..hub_access import asking_the_hub
from . import hub
from .documents import Documents, Marked, documents_of
from .remote import RemoteFile
from .text_files import checked_text

HUB_PREFIX = "hub:"
# Of Parquet files, what a worker reads at a time: each begins with a look at the file's end.
RANGE_BYTES = 1 << 26


@dataclass(frozen=True)
class HubPart:
    """Some files of a split, which a worker streams by itself: `rows` is an IterableDataset."""

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
    path, config = _path_and_config(name)
    need(f"{name}: a data set of the Hub", "train", "datasets")
    try:
        with hub.one_line_errors(), asking_the_hub():
            commit = _commit(path, revision)
            builder = _builder(path, config, commit)
            streams = builder.as_streaming_dataset()
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
        files = [str(file) for file in (builder.config.data_files or {}).get(split, [])]
        if files and all(file.endswith(".parquet") for file in files):
            # of which the text's column alone is read, from any row group on
            splits[split] = documents_of([RemoteFile(file) for file in files], "auto", text_field, RANGE_BYTES)
        else:
            splits[split] = Documents(HubPart(name, rows, text_field), partial(_parts, name, rows, text_field))
    identity = {"hub": path, "config": config, "revision": commit}
    return splits, identity | ({"split": only} if only else {})


def _path_and_config(name: str) -> tuple[str, str | None]:
    parts = name.removeprefix(HUB_PREFIX).split("/")
    if not 2 <= len(parts) <= 3 or not all(parts):
        raise UserError(f"--dataset {name}: write hub:ORG/NAME, or hub:ORG/NAME/CONFIG")
    return "/".join(parts[:2]), parts[2] if len(parts) == 3 else None


def _commit(path: str, revision: str | None) -> str:
    from huggingface_hub import HfApi, constants

    return HfApi(endpoint=constants.ENDPOINT).dataset_info(path, revision=revision, timeout=30).sha


def _builder(path: str, config: str | None, commit: str):
    import datasets

    return datasets.load_dataset_builder(path, config, revision=commit)


def _parts(name: str, rows, text_field: str) -> Iterator[HubPart]:
    """A part a file."""
    number = rows.num_shards
    return (HubPart(name, rows.shard(number, index), text_field) for index in range(number))
