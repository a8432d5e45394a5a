"""The process that training runs in: a device, a process group, and DeepSpeed's traps on a machine without a GPU."""

import contextlib
import logging
import os
import socket
import warnings


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
    # DeepSpeed calls it every step, and nothing that a user does can change that
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor", category=FutureWarning)
    import deepspeed

    if on_cpu():
        # a shared-memory all-reduce for inference, compiled for two minutes at the first start of a CPU process group
        # and never called in training
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def leave_launcher() -> None:
    """Forget the variables of a launcher: this process is then one of its own."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)


def is_main_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


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
