"""Train a byte-level BPE tokenizer, in the manner of GPT-2's."""

from collections.abc import Iterable, Sequence
from itertools import chain

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ..errors import UserError
from .pieces import pieces

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"


def train_bpe(
    documents: Iterable[str],
    vocab_size: int,
    special_tokens: Sequence[str] = (END_OF_TEXT,),
    *,
    min_frequency: int = 2,
    show_progress: bool = False,
) -> PreTrainedTokenizerFast:
    """Train on `documents` and return a tokenizer of at most `vocab_size` tokens; the same input gives the same one.

    Every byte is a token, so no text is unknown and `decode` gives back what `encode` took. Ids: the special tokens,
    `<|pad|>`, the 256 bytes, then the merges, most frequent first. The first special token ends and begins a text.
    A small corpus may have fewer than `vocab_size` tokens to give.
    Raises UserError when `vocab_size` has no room for the bytes, or there is no text.
    """
    specials = list(dict.fromkeys((*special_tokens, PAD)))
    if not special_tokens:
        raise UserError("train_bpe: special_tokens is empty; give at least the token that ends a text")
    smallest = 256 + len(specials)
    if vocab_size < smallest:
        raise UserError(
            f"vocabulary size {vocab_size}: too small for the 256 bytes and {len(specials)} special tokens; "
            f"give {smallest} or more"
        )
    texts = (piece for document in documents for piece in pieces(document))
    first = next(texts, None)
    if first is None:
        raise UserError("a tokenizer cannot be trained: the corpus holds no text")

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in specials],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=show_progress,
    )
    backend.train_from_iterator(chain([first], texts), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=specials[0],
        eos_token=specials[0],
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )
