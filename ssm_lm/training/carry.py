"""Truncated back-propagation through time: the state goes on from window to window, the gradient does not.

The stream is cut into as many rows as the global batch has windows, and a step takes the next window of every row, so
that each window continues the one before it in its row. The states at the windows' ends are the initial states of the
next step, and part of every checkpoint.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import Sampler
from transformers import DynamicCache

from ..errors import UserError
from .environment import world_size


class RowSampler(Sampler):
    """Starts of windows, row by row within a step: the sample at a place is a function of the place alone.

    tokens: length of the stream; rows: windows a step. Every row has `windows_per_row` windows; after the last of them
    all rows begin again, from a zero state. Set `first_step` to begin there. Raises UserError for a stream too short
    for one window a row.
    """

    def __init__(self, tokens: int, sequence_length: int, rows: int, total: int):
        self.sequence_length, self.rows, self.total = sequence_length, rows, total
        self.first_step = 0
        self.windows_per_row = tokens // (rows * sequence_length)
        if self.windows_per_row == 0:
            raise UserError(
                f"carry_state: {tokens} tokens are too few for {rows} rows of {sequence_length}; "
                "use a smaller batch or sequence_length"
            )

    def __len__(self):
        return self.total

    @property
    def samples_per_epoch(self) -> int:
        return self.rows * self.windows_per_row

    def __iter__(self):
        row_length = self.windows_per_row * self.sequence_length
        for place in range(self.first_step * self.rows, self.total):
            step, row = divmod(place, self.rows)
            yield row * row_length + step % self.windows_per_row * self.sequence_length


class CarriedState:
    """The caches that a rank carries, one for each of the batches that it accumulates in a step."""

    def __init__(self, config, windows_per_row: int, batches_per_step: int):
        self.config = config
        self.windows_per_row, self.batches_per_step = windows_per_row, batches_per_step
        self.place = 0  # batches seen by this rank since the run began
        self.caches = [DynamicCache(config=config) for _ in range(batches_per_step)]

    def next_cache(self) -> DynamicCache:
        """The cache for the next batch, holding the state that its windows continue; no gradient goes back from it."""
        step, slot = divmod(self.place, self.batches_per_step)
        self.place += 1
        if step % self.windows_per_row == 0:
            self.caches[slot] = DynamicCache(config=self.config)
        for layer in self.caches[slot].layers:
            layer.states = [state.detach() for state in layer.states]
        return self.caches[slot]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every state of this rank, and how far it is."""
        tensors = {"place": torch.tensor(self.place), "shape": torch.tensor([world_size(), self.batches_per_step])}
        for slot, cache in enumerate(self.caches):
            for number, layer in enumerate(cache.layers):
                for index, state in enumerate(layer.states):
                    tensors[f"{slot}.{number}.{index}"] = state.detach().contiguous()
        return tensors

    def take(self, tensors: dict[str, torch.Tensor]) -> None:
        """The inverse of `tensors`."""
        self.place = int(tensors["place"])
        self.caches = [DynamicCache(config=self.config) for _ in range(self.batches_per_step)]
        names = [key.split(".") for key in tensors if "." in key]
        for slot, number, index in sorted([int(part) for part in name] for name in names):
            self.caches[slot].layers[number].update_state(index, tensors[f"{slot}.{number}.{index}"], 0)

    def moment(self) -> "CarriedMoment":
        return CarriedMoment(self, {key: tensor.clone() for key, tensor in self.tensors().items()})

    def save(self, path: Path) -> None:
        """Write every state of this rank as safetensors."""
        save_file(self.tensors(), path)

    def load(self, path: Path, device) -> None:
        """Take up the states of a checkpoint. Raises UserError where it has none for this rank."""
        if not path.is_file():
            raise UserError(f"{path}: no such file; the checkpoint was not written with carry_state, or by other ranks")
        tensors = {key: tensor.to(device) for key, tensor in load_file(path).items()}
        here = [world_size(), self.batches_per_step]
        written = tensors["shape"].tolist() if "shape" in tensors else here
        if written != here:
            raise UserError(
                f"{path}: the states of {written[0]} ranks x {written[1]} batches a step; carry_state goes on with as "
                f"many, not {here[0]} x {here[1]}"
            )
        self.take(tensors)


@dataclass
class CarriedMoment:
    """The states as they were; `restore` brings them back."""

    carried: CarriedState
    tensors: dict[str, torch.Tensor]

    def restore(self) -> None:
        self.carried.take(self.tensors)
