"""The word-level vocabulary in which the published WikiText perplexities are measured."""

from collections import Counter
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ..errors import UserError
from .pieces import pieces

LINE_END = "<eos>"
UNKNOWN = "<unk>"


def train_words(documents: Iterable[str], vocab_size: int | None = None) -> PreTrainedTokenizerFast:
    """Count the words of `documents` and return a tokenizer with a token for each.

    Words are those of `str.split()`; each line end is `<eos>`, id 0; then come the words, most frequent first, of
    equal counts the one seen first. `<unk>` stands for every other word: where it occurs in the text, as in WikiText,
    it has the rank of its count, else the last id. `vocab_size` keeps the most frequent words alone.
    Raises UserError when there is no text or `vocab_size` is less than 2.
    """
    if vocab_size is not None and vocab_size < 2:
        raise UserError(f"vocabulary size {vocab_size}: too small for {LINE_END} and {UNKNOWN}; give 2 or more")
    counts = Counter()
    for document in documents:
        for piece in pieces(document):
            counts.update(piece.split())
    if not counts:
        raise UserError("a tokenizer cannot be trained: the corpus holds no words")
    del counts[LINE_END]
    words = [word for word, _ in counts.most_common()]
    if vocab_size is not None:
        words = words[: vocab_size - 1]
    if UNKNOWN not in words:
        words = [*words[: None if vocab_size is None else vocab_size - 2], UNKNOWN]
    vocabulary = {word: number for number, word in enumerate([LINE_END, *words])}

    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.normalizer = normalizers.Sequence(
        [
            # these four are white space to Python alone
            normalizers.Replace(Regex("[\x1c-\x1f]"), " "),
            normalizers.Replace("\n", f" {LINE_END} "),
        ]
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # words are joined by a space (no word begins with the prefix), and a line ends as WikiText's lines do
    backend.decoder = decoders.Sequence(
        [decoders.WordPiece(prefix="\x1c", cleanup=False), decoders.Replace(f" {LINE_END}", " \n")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token=UNKNOWN,
        eos_token=LINE_END,
        bos_token=LINE_END,
        # no pad token: one of its own would change the published vocabulary, and `<eos>` as one would be masked
        # `<unk>` in a text is a word among words: "x<unk>" is one word, and not in the vocabulary
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )
