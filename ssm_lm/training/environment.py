"""The process that training runs in: a device, a process group, and DeepSpeed's traps on a machine without a GPU."""

import contextlib
import gc
import logging
import os
import socket
import sys
import warnings
from collections.abc import Callable
from typing import TypeVar

from ..errors import UserError, first_line
from ..internals.python import leave

T = TypeVar("T")


def on_cpu() -> bool:
    """True where there is no accelerator to train on."""
    import torch

    return not torch.accelerator.is_available()


def prepare_process(uses_deepspeed: bool) -> None:
    """Set what DeepSpeed reads from the environment, before anything imports it.

    One process without a launcher becomes a group of one, so that the same command runs with and without torchrun.
    """
    if on_cpu():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # of reading and writing weights; training has its own
    if not uses_deepspeed:
        return
    if "RANK" not in os.environ:
        # without these DeepSpeed looks for MPI
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(alone | {"MASTER_PORT": str(_free_port())})
    logging.getLogger("DeepSpeed").setLevel(os.environ.get("DEEPSPEED_LOG_LEVEL", "WARNING").upper())
    # DeepSpeed calls them every step, and nothing that a user does can change that
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        warnings.filterwarnings("ignore", message=f".*{name}", category=FutureWarning)
    if on_cpu():
        from ..internals.deepspeed import leave_out_shared_memory_all_reduce

        leave_out_shared_memory_all_reduce()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


_pretended_ranks: int | None = None  # of a dry run


def world_size() -> int:
    return _pretended_ranks or int(os.environ.get("WORLD_SIZE", "1"))


@contextlib.contextmanager
def dry_run():
    """Within the block this process joins no others, and `world_size()` is what the launcher said nevertheless."""
    global _pretended_ranks
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
    _pretended_ranks = world_size()
    given = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        _pretended_ranks = None
        from ..internals.accelerate import forget_pretended_ranks

        forget_pretended_ranks()  # something else may follow in this process
        for name in names:
            os.environ.pop(name, None)
        os.environ.update(given)


def is_main_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def agree(problem: str | None, facts: dict | None = None) -> None:
    """Stop every rank in the same way. A collective: all ranks call it.

    problem: what is wrong on this rank, or None. facts: what must be the same on all ranks.
    Raises UserError on every rank if one has a problem or a fact differs; it names the rank and the key.
    """
    import torch.distributed as dist

    everyone = [(problem, facts)]
    if dist.is_initialized() and dist.get_world_size() > 1:
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (problem, facts))
    for rank, (problem, theirs) in enumerate(everyone):
        if problem:
            raise UserError(problem if len(everyone) == 1 else f"rank {rank}: {problem}")
        first = everyone[0][1]
        for key in sorted({*(first or {}), *(theirs or {})}):
            mine, other = (first or {}).get(key), (theirs or {}).get(key)
            if mine != other:
                raise UserError(
                    f"rank {rank} was started with {key} {other!r} and rank 0 with {mine!r}; all ranks need the same "
                    "config and the same data"
                )


def told(look: Callable[[], T]) -> T:
    """What the first rank finds when it looks, on every rank; its UserError too. A collective: all ranks call it.

    A file system that many ranks share is asked once, and the ranks cannot see different things in it.
    """
    import torch.distributed as dist

    found, problem = None, None
    if is_main_process():
        try:
            found = look()
        except UserError as error:
            problem = str(error)
    if dist.is_initialized() and dist.get_world_size() > 1:
        said = [found, problem]
        dist.broadcast_object_list(said, src=0)
        found, problem = said
    if problem is not None:
        raise UserError(problem)
    return found


@contextlib.contextmanager
def named_timeouts(args):
    """Within the block, a collective that failed because another rank is gone or hung says so in one line."""
    try:
        yield
    except RuntimeError as error:
        words = ("timed out", "timeout", "connection closed", "connection reset", "connection refused", "socket error")
        said = str(error).lower()
        if world_size() == 1 or not any(word in said for word in words):
            raise
        print(
            f"ssm-lm: rank {args.process_index}: another rank is gone, or hung for more than ddp_timeout = "
            f"{args.ddp_timeout} s; start again, and the run goes on from the last complete checkpoint "
            f"({first_line(error)})",
            file=sys.stderr,
            flush=True,
        )
        leave(1)  # what is left of the process group would wait for that rank once more


def release_trainer() -> None:
    """Let go of what a trainer held, for another one in the same process: engines and models hang in cycles of
    references, and accelerate knows one DeepSpeed config at a time.
    """
    import torch

    from ..internals.accelerate import forget_engine

    forget_engine()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def set_threads() -> None:
    """Share the cores among the ranks of this machine; more threads than cores slow every rank down."""
    import torch

    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")))
    if ranks > 1 or "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))


@contextlib.contextmanager
def default_environment(name: str, value: str):
    """Within the block the variable has this value unless it already had one. Yields the value it has."""
    given = os.environ.get(name)
    os.environ.setdefault(name, value)
    try:
        yield os.environ[name]
    finally:
        if given is None:
            del os.environ[name]
