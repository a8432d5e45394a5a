"""The tokenizer beside a model."""

import contextlib
import json
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError

from ..errors import UserError, one_line
from ..hub_access import asking_the_hub
from .folder import CHECKPOINT, CONFIG, quiet, resolve


def load_tokenizer(path: str | Path, needs_model: bool = True):
    """The tokenizer beside a model; for a checkpoint without one, that of the training run's output folder.

    needs_model: False takes a folder that holds a tokenizer alone.
    Raises UserError when there is none or it cannot be read.
    """
    from transformers import AutoTokenizer

    is_folder = not needs_model and Path(path).expanduser().is_dir()
    source = Path(path).expanduser() if is_folder else resolve(path)
    if isinstance(source, Path):
        source = _tokenizer_folder(source)
    with quiet(), contextlib.nullcontext() if isinstance(source, Path) else asking_the_hub():
        try:
            return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        except BaseException as error:  # of JSON, of the tokenizer's class, of its Rust part, of the Hub's client
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # Rust's
                raise
            if isinstance(error, StrictDataclassError):  # transformers looks at the model's config first
                reason = one_line(error.__cause__ or error)
                raise UserError(f"{source}/{CONFIG}: describes no model ({reason})") from error
            raise UserError(f"{path}: the tokenizer cannot be loaded ({one_line(error)})") from error


def has_tokenizer(path: str | Path) -> bool:
    """Whether `load_tokenizer` has something to load; a Hub id is taken to have one."""
    source = resolve(path)
    if not isinstance(source, Path):
        return True
    try:
        return bool(_tokenizer_folder(source))
    except UserError:
        return False


def is_tokenizer_of(path: str | Path, tokenizer) -> bool:
    """Whether `tokenizer` gives a text the ids that the one of `path` does; a model without one is believed."""
    return not has_tokenizer(path) or _definition(tokenizer) == _definition(load_tokenizer(path))


def _definition(tokenizer) -> dict:
    """What decides on the ids of a text; how batches are padded and cut does not."""
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    return {key: value for key, value in definition.items() if key not in ("padding", "truncation")}


def check_vocabulary_fits(tokenizer, model, path: str | Path) -> None:
    """UserError when the tokenizer of `path` has token ids that the model's embedding lacks."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= model.config.vocab_size:
        raise UserError(
            f"{path}: the tokenizer has token ids up to {largest}, the model a vocabulary of "
            f"{model.config.vocab_size}; give the tokenizer that the model was trained with"
        )


def _tokenizer_folder(folder: Path) -> Path:
    candidates = [folder, folder.parent] if CHECKPOINT.fullmatch(folder.resolve().name) else [folder]
    for candidate in candidates:
        if (candidate / "tokenizer.json").is_file():
            return candidate
    raise UserError(f"{folder / 'tokenizer.json'}: no such file; copy the tokenizer's files into the folder")
