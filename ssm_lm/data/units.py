"""What is done at a time: a corpus in units, each of which one process reads, encodes and writes.

The units of a corpus follow from its text alone, and not from how many processes there are; the tokens of all, one
behind the other, are the tokens of the corpus.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count

from .corpora import Corpus
from .documents import HoldOut, Marked, Pieces, first_bytes
from .pieces import pieces_of

UNIT_CHARACTERS = 1 << 21


@dataclass(frozen=True)
class Unit:
    """A part of a corpus.

    split: where all of it belongs; None where each document's hash says. text: its pieces, or what reads it.
    continues: the split of the document that began in the unit before and goes on in this one, if there is such a one;
    inside_word: that document was cut within a word.
    """

    number: int
    split: str | None
    text: list[tuple[str, bool]] | Callable[[], Marked]
    continues: str | None = None
    inside_word: bool = False

    def pieces(self) -> Pieces:
        """The text in pieces."""
        return iter(self.text) if isinstance(self.text, list) else pieces_of(self.text())


def units_of(corpus: Corpus, max_bytes: int | None = None) -> Iterator[Unit]:
    """The units of a corpus in order, numbered from 0.

    max_bytes: of each split, only the first documents that fit into so many bytes; of a corpus without splits, of all.
    """
    numbers = count()
    sources = corpus.splits if corpus.whole is None else {None: corpus.whole}
    for split, documents in sources.items():
        ranges = documents.ranges() if max_bytes is None else None
        if ranges is not None:
            yield from (Unit(next(numbers), split, text) for text in ranges)
        else:
            text = pieces_of(first_bytes(documents.start(), max_bytes))
            yield from _grouped(text, split, corpus.hold_out, numbers)


def _grouped(text: Pieces, split: str | None, hold_out: HoldOut | None, numbers: Iterator[int]) -> Iterator[Unit]:
    """Pieces in units that end with a document, unless that alone is longer than a unit."""
    held, characters, of_document = [], 0, 0
    first, continues, inside_word = None, None, False
    for piece, last in text:
        first = first or piece
        held.append((piece, last))
        characters += len(piece)
        of_document += len(piece)
        if characters >= UNIT_CHARACTERS and (last or of_document >= UNIT_CHARACTERS):
            yield Unit(next(numbers), split, held, continues, inside_word)
            continues = None if last else split or hold_out.split_of(first)
            inside_word = not last and not piece[-1].isspace()
            held, characters = [], 0
        if last:
            first, of_document = None, 0
    if held:
        yield Unit(next(numbers), split, held, continues, inside_word)
