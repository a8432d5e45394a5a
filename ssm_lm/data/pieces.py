"""Cut a long text into pieces that a tokenizer reads as it would read the whole."""

import re
from collections.abc import Iterable, Iterator

# A tokenizer holds some hundred bytes for each token of one text, so a document of 100 MB must not reach it whole.
PIECE_CHARACTERS = 1 << 20

# Line ends at which byte-level BPE begins a new pre-token in any case: `\n` before " word", where the space goes with
# the word, and `\n` alone between two words. Elsewhere a run of white space would be split differently.
_LINE_CUT = re.compile(r"\n(?= \S)|(?<=\S)\n(?=\S)")


def pieces(text: str, size: int = PIECE_CHARACTERS) -> Iterator[str]:
    """Yield `text` in pieces of at most `size` characters; their concatenation is `text`.

    A cut falls behind a line end where there is one, else before a space, so that byte-level BPE and word-level
    tokenizers give the same tokens as for the whole. Only a single word longer than `size` is cut inside.
    """
    start = 0
    while len(text) - start > size:
        cut = _cut_of(text, start, size)
        yield text[start:cut]
        start = cut
    if start < len(text):
        yield text[start:]


def pieces_of(marked: Iterable[tuple[bool, str]], size: int = PIECE_CHARACTERS) -> Iterator[tuple[str, bool]]:
    """(piece, last): the documents of a text in the pieces that `pieces` gives of each; `last` ends a document.

    marked: the text in order, in parts of any length, none empty, each with whether a document begins with it. No more
    is held than a piece and a part, however long a document is.
    """
    parts, held, start = [], 0, 0  # the text of parts from `start` on is not yet given out
    for begins, text in marked:
        if begins and parts:
            yield "".join(parts)[start:], True
            parts, held, start = [], 0, 0
        parts.append(text)
        held += len(text)
        if held - start > size:
            whole = "".join(parts)
            while len(whole) - start > size:
                cut = _cut_of(whole, start, size)
                yield whole[start:cut], False
                start = cut
            # the character before a piece has a say in where the next cut falls
            parts = [whole[start - 1 :]]
            held, start = len(parts[0]), 1
    if parts:
        yield "".join(parts)[start:], True


def _cut_of(text: str, start: int, size: int) -> int:
    """Where the piece that begins at `start` ends."""
    end = start + size
    cuts = [match.end() for match in _LINE_CUT.finditer(text, start, end)]
    cut = cuts[-1] if cuts else text.rfind(" ", start, end)
    return end if cut <= start else cut
