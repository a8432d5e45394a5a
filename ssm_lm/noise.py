"""Lines that libraries write to a terminal on which nobody called them, and that nobody there can act on.

transformers imports torchao wherever it is installed, and DeepSpeed when it saves a model. What these say about
themselves while they are imported would stand above a newcomer's first text. A line is dropped by its logger and its
words; whatever else a library has to say still arrives.
"""

import logging
import os
import re

# (logger, words of the line, why it concerns no user of a verb, the newest version that was seen to write it)
LINES = (
    ("torchao", r"^Failed to load .*\.so", "CUDA operators that no verb calls, on a machine without CUDA", "0.18.0"),
    ("torch.utils._pytree", r"is an Enum subclass and is now natively supported", "torchao's own code", "0.18.0"),
    ("transformers.trainer_utils", r"^Warning: The following arguments do not match", "the config wins", "5.23.0"),
    ("transformers.trainer", r"^There were missing keys .*: \['lm_head.weight'\]", "it is tied", "5.23.0"),
    ("DeepSpeed", r"^Setting accelerator to CPU", "there is no GPU; `ssm-lm train` says where it runs", "0.19.8"),
)


class KnownLines(logging.Filter):
    """Drops the records whose message matches the pattern."""

    def __init__(self, pattern: str):
        super().__init__()
        self.pattern = re.compile(pattern)

    def filter(self, record: logging.LogRecord) -> bool:
        return not self.pattern.search(record.getMessage())


_FILTERS = {logger: KnownLines(pattern) for logger, pattern, _, _ in LINES}


def drop_known_lines() -> None:
    """Keep the lines above from the terminal, in this process. It may be called again, and imports nothing.

    torch's profiler, which samples the share of communication, writes "USDT: ... profiler_start" from C++, at a level
    above its errors. Who wants to see those sets KINETO_LOG_LEVEL.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    for name, known in _FILTERS.items():
        logging.getLogger(name).addFilter(known)
