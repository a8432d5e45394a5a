"""The process that training runs in: a device, a process group, and DeepSpeed's traps on a machine without a GPU."""

import logging
import os
import socket


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
    if not uses_deepspeed:
        return
    if "RANK" not in os.environ:
        # without these DeepSpeed looks for MPI
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(alone | {"MASTER_PORT": str(_free_port())})
    logging.getLogger("DeepSpeed").setLevel(os.environ.get("DEEPSPEED_LOG_LEVEL", "WARNING").upper())
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


def is_main_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0
