"""Find, train and apply the tokenizer that an argument names."""

import contextlib
import functools
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer

from ..errors import UserError, first_line
from ..hub_access import asking_the_hub
from .hub import one_line_errors

# Texts go to the tokenizer's threads in batches of about so many characters.
BATCH_CHARACTERS = 1 << 21


def obtain_tokenizer(name: str, texts: Iterable[str]):
    """The tokenizer that `name` speaks of, trained or loaded.

    `bpe:SIZE`, `words`, `words:SIZE` are trained on `texts`; anything else is a folder or a Hub name.
    Raises UserError when it cannot be trained or loaded, or has no end-of-text token.
    """
    kind, _, size = name.partition(":")
    if kind == "bpe":
        from .bpe import train_bpe

        return train_bpe(texts, _size(name, size))
    if kind == "words":
        from .words import train_words

        return train_words(texts, _size(name, size) if ":" in name else None)
    return load_tokenizer(name)


@functools.lru_cache(maxsize=1)
def load_tokenizer(name: str):
    """Load a tokenizer from a folder or from the Hub; UserError in one line when that fails or it does not serve."""
    from transformers import AutoTokenizer

    path = Path(name).expanduser()
    looks_like_path = name.startswith((".", "~")) or path.is_absolute() or len(path.parts) > 2 or bool(path.suffix)
    if path.is_file() or (looks_like_path and not path.is_dir()):
        what = "is a file" if path.is_file() else "no such folder"
        raise UserError(
            f"--tokenizer {name}: {what}; give the folder of a saved tokenizer, a Hub name, bpe:SIZE or words"
        )
    try:
        with one_line_errors(), contextlib.nullcontext() if path.is_dir() else asking_the_hub():
            tokenizer = AutoTokenizer.from_pretrained(path if path.is_dir() else name, trust_remote_code=False)
    except Exception as error:  # of the Hub's client, of JSON, of the tokenizer's own class
        is_empty = path.is_dir() and not (path / "tokenizer.json").exists()
        reason = "there is no tokenizer.json in it" if is_empty else first_line(error)
        raise UserError(
            f"--tokenizer {name}: cannot be loaded ({reason}); "
            "give the folder of a saved tokenizer, a Hub name, bpe:SIZE or words"
        ) from error
    if not tokenizer.is_fast:
        raise UserError(f"--tokenizer {name}: has no tokenizer.json; convert it to a fast tokenizer first")
    if tokenizer.eos_token_id is None:
        raise UserError(f"--tokenizer {name}: has no eos token to end a document with; set eos_token in its folder")
    return tokenizer


def is_trained_here(name: str) -> bool:
    """Whether `name` asks for a tokenizer of the corpus's own."""
    return name.partition(":")[0] in ("bpe", "words")


def tokenizer_hash(tokenizer) -> str:
    """The sha256 of a tokenizer's whole definition, the same before and after saving it."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode("utf-8")).hexdigest()


def vocabulary_size(tokenizer) -> int:
    """The rows that an embedding needs: one more than the largest id, added tokens included."""
    return max(tokenizer.get_vocab().values()) + 1


def save_new(tokenizer, output: Path) -> None:
    """Save a tokenizer into a folder that is new or empty; UserError for any other, and when it cannot be written."""
    if os.path.lexists(output) and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"--output {output}: exists already; choose another folder")
    try:
        tokenizer.save_pretrained(output)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written: {error.strerror or error}") from error


class Encoder:
    """Turns pieces of documents into token ids, each document followed by the end-of-text token.

    The text is taken as text: "<|endoftext|>" written in a document does not become the token of that name.
    Where a line end is the end-of-text token, as at word level, a document that ends its last line gets no other.
    definition: the JSON of a tokenizer.json.
    """

    def __init__(self, definition: str, eos_token_id: int):
        self._backend = Tokenizer.from_str(definition)
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True
        self._eos = eos_token_id
        self._line_end_is_eos = self._backend.encode("\n", add_special_tokens=False).ids == [self._eos]

    @classmethod
    def of(cls, tokenizer) -> "Encoder":
        """The encoder of a transformers tokenizer."""
        return cls(tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token_id)

    def encode(self, batch: list[tuple[str, bool]]) -> list[list[int]]:
        """The ids of each piece of a batch of (piece, whether it ends a document)."""
        encodings = self._backend.encode_batch_fast([text for text, _ in batch], add_special_tokens=False)
        found = []
        for (_, last), encoding in zip(batch, encodings, strict=True):
            ids = encoding.ids
            if last and not (self._line_end_is_eos and ids[-1:] == [self._eos]):
                ids.append(self._eos)
            found.append(ids)
        return found


def _size(name: str, size: str) -> int:
    if not size.isascii() or not size.isdigit():
        raise UserError(
            f"--tokenizer {name}: the size is not a number; write for example {name.partition(':')[0]}:4096"
        )
    return int(size)
