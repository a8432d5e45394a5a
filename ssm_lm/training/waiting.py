"""Ranks that wait for the first one for longer than a collective may take."""

import sys
import threading
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from .environment import is_main_process

BEAT = 5.0  # seconds between two signs of life
SAY_EVERY = 60.0  # seconds between two lines


def first_rank_works(work: Callable[[], None], what: str, device: torch.device) -> None:
    """Let the first rank do what takes its time while the others wait for it, however long. All ranks call it.

    No collective lasts much longer than BEAT, so that ddp_timeout, which is for ranks that are gone, ends none of them.
    what: the beginning of the lines that say how long it has taken. Raises on the first rank what `work` raises.
    """
    failures, begin, next_line = [], time.monotonic(), SAY_EVERY
    out = sys.stdout  # the work may silence it
    worker = threading.Thread(target=_collect_failure, args=(work, failures), daemon=True)
    if is_main_process():
        worker.start()
    while True:
        if is_main_process():
            worker.join(BEAT)
        working = torch.tensor(float(worker.is_alive()), device=device)
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(working)
        if not working > 0:
            break
        seconds = time.monotonic() - begin
        if is_main_process() and seconds > next_line:
            print(f"{what}, {seconds:.0f} s so far", file=out, flush=True)
            next_line += SAY_EVERY
    if failures:
        raise failures[0]


def _collect_failure(work: Callable[[], None], failures: list[Exception]) -> None:
    try:
        work()
    except Exception as error:
        failures.append(error)
