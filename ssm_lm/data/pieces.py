"""Cut a long text into pieces that a tokenizer reads as it would read the whole."""

import re
from collections.abc import Iterator

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
        end = start + size
        cuts = [match.end() for match in _LINE_CUT.finditer(text, start, end)]
        cut = cuts[-1] if cuts else text.rfind(" ", start, end)
        if cut <= start:
            cut = end
        yield text[start:cut]
        start = cut
    if start < len(text):
        yield text[start:]
