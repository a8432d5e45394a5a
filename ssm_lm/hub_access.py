"""Asking the Hugging Face Hub, which may not be there: known in seconds, and said in one line.

Its clients try again for half a minute and more before they give up, while what was downloaded before lies beside them.
"""

import contextlib
import socket
import threading
import urllib.request
from collections.abc import Iterator
from urllib.parse import urlsplit

PATIENCE = 3.0  # seconds


@contextlib.contextmanager
def asking_the_hub() -> Iterator[None]:
    """Within the block the Hub's clients answer from the cache alone where the Hub cannot be reached, as they do where
    HF_HUB_OFFLINE is set.
    """
    from huggingface_hub import constants

    given = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = given or not is_reachable()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = given


def is_reachable() -> bool:
    """Whether a connection to the Hub opens. Behind a proxy the answer is left to the proxy."""
    from huggingface_hub import constants

    address = urlsplit(constants.ENDPOINT)
    if urllib.request.getproxies().keys() & {address.scheme, "all"}:
        return True
    return _connects(address.hostname or "", address.port or (443 if address.scheme == "https" else 80))


def _connects(host: str, port: int) -> bool:
    """Whether a connection opens within PATIENCE; in a thread, for a look-up of a name knows no time limit."""
    opened = threading.Event()

    def attempt():
        try:
            socket.create_connection((host, port), timeout=PATIENCE).close()
        except OSError:
            return
        opened.set()

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return opened.is_set()
