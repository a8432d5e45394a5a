"""Windows of a token stream, in an order that is a pure function of (seed, epoch).

The dataset is indexed by the position of a window's first token, and the sampler yields such positions. Splitting them
among processes is left to what loads the data, so the order is the same for any number of them.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from ..errors import UserError
from .permutation import ROUNDS, Permutation
from .stream import TokenStream

TABLE = 1 << 16


class TokenWindows(Dataset):
    """`windows[start]` is the window of `sequence_length` tokens that begins at token `start`.

    It is {"input_ids", "labels"}, two LongTensors of the same ids: the model shifts the labels. Every `start` from 0 to
    len(windows) - 1 is valid, so windows overlap; `WindowSampler` chooses ones that do not.
    pack_documents: adds "seq_idx", the number of each token's document in the window, by which a model resets its
    states. A document begins with the end-of-text token of the one before it, as a text does in evaluation: from a
    fresh state that token predicts the first one, and the last token of the one before predicts it.
    Raises UserError when the stream is shorter than one window.
    """

    def __init__(self, stream: TokenStream, sequence_length: int, pack_documents: bool = False):
        if sequence_length < 2:
            raise UserError(
                f"sequence_length {sequence_length}: must be 2 or more, for a token is predicted from others"
            )
        if len(stream) < sequence_length:
            raise UserError(
                f"{stream.folder}: the {stream.split} split has {len(stream)} tokens, sequence_length is "
                f"{sequence_length}; give more text or a shorter sequence_length"
            )
        self.stream = stream
        self.sequence_length = sequence_length
        self.pack_documents = pack_documents

    def __len__(self) -> int:
        return len(self.stream) - self.sequence_length + 1

    def __getitem__(self, start: int) -> dict[str, torch.Tensor]:
        if not 0 <= start < len(self):
            raise IndexError(f"window start {start} outside 0 .. {len(self) - 1}")
        ids = torch.from_numpy(self.stream.tokens[start : start + self.sequence_length].astype(np.int64))
        window = {"input_ids": ids, "labels": ids.clone()}
        return window | {"seq_idx": (ids == self.stream.eos_token_id).cumsum(0)} if self.pack_documents else window


class WindowSampler(Sampler):
    """Yields the starts of windows that do not overlap, shuffled, from an offset that is new in each epoch.

    Of a stream of n tokens and windows of L, every epoch has the same number of windows: as many as fit at the largest
    offset, L - 1 (one at least). The moving offset lets each token stand at each place of a window in its turn, and
    shifts which tokens the ends leave out.

    Up to TABLE windows are shuffled in a table, half a megabyte at most; more by `permutation.py`, which holds none, so
    that the first window, and any later one, of any number costs the same. tables: shuffle any number in a table, as
    runs did that began before there was another way. source: the number of the stream among several, so that two of
    one size go different ways; None for one alone.
    """

    def __init__(self, windows: TokenWindows, seed: int = 0, tables: bool = False, source: int | None = None):
        if seed < 0:
            raise UserError(f"seed {seed}: must not be negative")
        length, tokens = windows.sequence_length, len(windows.stream)
        self.sequence_length = length
        self.seed = [seed] if source is None else [seed, source]
        self.epoch = 0
        self._count = max(1, (tokens - (length - 1)) // length)
        self._offsets = min(length, tokens - self._count * length + 1)
        self._has_table = tables or self._count <= TABLE
        self._last = (None, None)  # an epoch and its order

    def __len__(self) -> int:
        return self._count

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration is of."""
        self.epoch = epoch

    def at(self, places: np.ndarray) -> np.ndarray:
        """The starts of the windows at these places, int64, of a run that goes through epoch after epoch."""
        epochs, inside = np.divmod(places, self._count)
        starts = np.empty_like(inside)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            offset, order = self._order(epoch)
            starts[here] = offset + order(inside[here]) * self.sequence_length
        return starts

    def _order(self, epoch: int) -> tuple[int, Callable[[np.ndarray], np.ndarray]]:
        """(the offset of an epoch, where its places land)."""
        if self._last[0] != epoch:
            # raw bits: their sequence is promised to stay the same in later releases of NumPy, unlike `permutation`'s
            bits = np.random.PCG64([*self.seed, epoch])
            offset = int(bits.random_raw()) % self._offsets
            if self._has_table:
                order = np.argsort(bits.random_raw(self._count), kind="stable").__getitem__
            else:
                order = Permutation(self._count, bits.random_raw(ROUNDS))
            self._last = (epoch, (offset, order))
        return self._last[1]

    def starts(self, epoch: int) -> np.ndarray:
        """The starts of all windows of `epoch`, in order."""
        return self.at(np.arange(epoch * self._count, (epoch + 1) * self._count))

    def __iter__(self) -> Iterator[int]:
        return iter(self.starts(self.epoch).tolist())
