"""What every access to the Hugging Face Hub has in common."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Silence what the libraries warn of on the way to the user's one line, ours: each retry of the Hub's client, and
    that a tokenizer's folder holds a model's config whose code is not run.
    """
    loggers = [logging.getLogger(name) for name in ("huggingface_hub", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
