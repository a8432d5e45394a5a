"""Several documents in one row: where each begins, and how to lay them out so that no state crosses a border.

The documents of a row are moved apart so that each fills whole chunks of its own, with zeros in front of its first
token: zeros drive nothing and a document starts from a zero state, so the padding changes nothing, and the state
after a document's last token is the state at the end of its last chunk. Before a document's first chunk the state is
set to zero. Nothing is multiplied by a mask: what a document computes never touches another one's numbers.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F


class Documents(NamedTuple):
    """The documents of a batch (B, L), found once and used by every layer.

    seq_idx:    (B, L), negative where a token is padding
    begins:     (B, L) bool, the first token of every document but the row's first
    continues:  (B, L) bool, tokens of the row's first document, which goes on from an initial state if there is one
    chunk_size, chunks: the padded layout is (B, chunks * chunk_size)
    slot:       (B * L,) where a token is in the padded layout, flattened
    keep:       (B, chunks) bool, False where a chunk is the first of a document
    rows, longest, row_slot: the layout (rows, longest) with a document a row, left-aligned, for the FFT
    """

    seq_idx: torch.Tensor
    begins: torch.Tensor
    continues: torch.Tensor
    chunk_size: int
    chunks: int
    slot: torch.Tensor
    keep: torch.Tensor
    rows: int
    longest: int
    row_slot: torch.Tensor


def find_documents(seq_idx: torch.Tensor, chunk_size: int) -> Documents:
    """seq_idx (B, L): the number of each token's document. A document is a run of equal numbers; a negative number is
    padding, which drives no state and ends the document before it.

    The size of the layout depends on the numbers: this waits for the device once, so a model calls it once a forward,
    not once a layer. Raises ValueError for another shape.
    """
    if seq_idx.dim() != 2 or seq_idx.is_floating_point():
        raise ValueError(f"seq_idx must be integers (batch, length), not {seq_idx.dtype} {tuple(seq_idx.shape)}")
    B, L = seq_idx.shape
    chunk_size = min(chunk_size, L)
    index = torch.arange(L, device=seq_idx.device)
    border = seq_idx[:, 1:] != seq_idx[:, :-1]
    is_first, is_last = F.pad(border, (1, 0), value=True), F.pad(border, (0, 1), value=True)
    begin = torch.where(is_first, index, 0).cummax(1).values
    end = torch.where(is_last, index, L).flip(1).cummin(1).values.flip(1)
    needed = (end - begin) // chunk_size + 1  # chunks of the token's document
    from_here = torch.where(is_last, needed, 0).flip(1).cumsum(1).flip(1)  # of it and of those after it
    chunks, longest, rows = torch.stack([from_here.max(), (end - begin).max() + 1, is_first.sum()]).tolist()

    row = torch.arange(B, device=seq_idx.device)[:, None]
    last_chunk = chunks - (from_here - needed)  # one past the document's last chunk
    slot = row * (chunks * chunk_size) + last_chunk * chunk_size - 1 - (end - index)
    keep = torch.ones(B, chunks, dtype=torch.bool, device=seq_idx.device).scatter(1, last_chunk - needed, False)
    document = is_first.flatten().cumsum(0) - 1
    row_slot = document * longest + (index - begin).flatten()
    return Documents(
        seq_idx,
        F.pad(border, (1, 0), value=False),
        begin == 0,
        chunk_size,
        chunks,
        slot.flatten(),
        keep,
        rows,
        longest,
        row_slot,
    )


def from_position_ids(position_ids: torch.Tensor, attention_mask: torch.Tensor | None, batch_size: int) -> torch.Tensor:
    """seq_idx (B, L) from positions (B or 1, L) that start again at 0 with every document. Where the mask is 0, the
    positions say nothing (often they are all 0): that is padding.
    """
    seq_idx = (position_ids == 0).cumsum(-1).expand(batch_size, -1)
    if attention_mask is None or attention_mask.dim() != 2:
        return seq_idx
    return seq_idx.masked_fill(attention_mask[:, -seq_idx.shape[1] :] == 0, -1)


def from_starts(starts: torch.Tensor, batch_size: int, length: int) -> torch.Tensor:
    """seq_idx (1, length) from where each document of the row begins, and behind the last, where it ends. What comes
    after that is one more. ValueError for several rows.
    """
    if batch_size != 1:
        raise ValueError(f"cu_seq_lens_q is for documents in one row, not in {batch_size}: seq_idx is (batch, length)")
    index = torch.arange(length, device=starts.device)
    return torch.bucketize(index, starts.to(index.dtype), right=True)[None]


def move_apart(sequence: torch.Tensor, slot: torch.Tensor, rows: int, length: int) -> torch.Tensor:
    """(B, L, C) -> (rows, length, C) with token i at slot[i] and zeros elsewhere."""
    padded = sequence.new_zeros(rows * length, sequence.shape[-1])
    return padded.index_copy(0, slot, sequence.flatten(0, 1)).view(rows, length, -1)


def move_together(padded: torch.Tensor, slot: torch.Tensor, batch_size: int) -> torch.Tensor:
    """The inverse of `move_apart`: (rows, length, C) -> (B, L, C)."""
    return padded.flatten(0, 1).index_select(0, slot).view(batch_size, -1, padded.shape[-1])
