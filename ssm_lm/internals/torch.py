"""What reaches into torch."""

import datetime
from collections.abc import Callable
from types import MethodType

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed import distributed_c10d
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from . import Part

__all__ = [
    "FakeTensorMode",
    "TorchDispatchMode",
    "bf16_instructions",
    "events_of",
    "guard_step",
    "limit_waiting",
    "operator_name",
    "spin",
    "storage_key",
    "tree_leaves",
]


def limit_waiting(seconds: float) -> None:
    """Let no collective of any process group wait longer than this.

    ddp_timeout reaches the group that transformers makes. DeepSpeed makes its own groups beside it, without a
    timeout, which is torch's default of 30 minutes (10 with NCCL): there a pulled cable is waited for.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        for group in list(distributed_c10d._world.pg_map):
            distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=seconds), group)


def guard_step(optimizer: torch.optim.Optimizer, may_step: Callable[[], bool]) -> None:
    """Make `optimizer.step` do nothing where `may_step` says no. Every engine, DeepSpeed's too, calls it last."""
    take = optimizer.step

    def step(self, closure=None):
        return take(closure) if may_step() else None

    optimizer.step = MethodType(step, optimizer)


def events_of(profiler: torch.profiler.profile) -> list[tuple[str, int, int]]:
    """(name, start, end) of what a stopped profiler recorded, in nanoseconds."""
    events = profiler.profiler.kineto_results.events()
    return [(event.name(), event.start_ns(), event.start_ns() + event.duration_ns()) for event in events]


def operator_name(function) -> str:
    """The name of an operator, without its namespace and its overload: "empty" of aten::empty.memory_format."""
    return function._opname


def storage_key(storage: torch.UntypedStorage) -> int:
    """The same number for all tensors that share a storage, and another for each storage that is alive."""
    return storage._cdata


def spin(cycles: int) -> None:
    """Keep the GPU busy for so many cycles, and return before it is done."""
    torch.cuda._sleep(cycles)


def bf16_instructions() -> list[str]:
    """The names of the instructions for bfloat16 that this processor has."""
    flags = {"AVX512-BF16": "_is_avx512_bf16_supported", "AMX": "_is_amx_tile_supported"}
    return [name for name, flag in flags.items() if getattr(torch.cpu, flag, bool)()]


PARTS = (
    Part(
        "torch.distributed.distributed_c10d._world",
        "read, for the list of process groups",
        "DeepSpeed makes groups without a timeout, and torch lists its groups nowhere else",
        "DeepSpeed passes a timeout to the groups that it makes",
    ),
    Part(
        "torch.distributed.distributed_c10d._set_pg_timeout",
        "called for each of them",
        "a group's timeout has no public setter",
        "the same",
    ),
    Part(
        "torch.optim.Optimizer.step",
        "replaced on one optimizer, by a step that may be left out",
        "a hook of torch can look at a step, but cannot prevent it; DeepSpeed's engines call the method itself",
        "register_step_pre_hook may skip the step",
    ),
    Part(
        "torch.autograd.profiler.profile.kineto_results",
        "read, for names and times of a profiled step",
        "profiler.events() builds a tree of Python objects first, which takes longer than the step",
        "torch has a public list of raw events",
    ),
    Part(
        "torch._subclasses.fake_tensor.FakeTensorMode",
        "used, for tensors with a shape and without data",
        "the count of memory follows the real code; the meta device knows no devices' rules and no data-dependent ops",
        "it has a public name",
    ),
    Part(
        "torch.utils._python_dispatch.TorchDispatchMode",
        "inherited from, to see each operator's tensors",
        "there is no other place where all operators pass",
        "it has a public name (documented as an extension point in torch 2.13, under the private one)",
    ),
    Part("torch.utils._pytree.tree_leaves", "called, for tensors in arguments", "operators nest them", "as above"),
    Part(
        "torch._ops.OpOverload._opname",
        "read, to leave out operators that touch no data",
        "str(function) would have to be taken apart",
        "an operator says its name publicly",
    ),
    Part(
        "torch.UntypedStorage._cdata",
        "read, to know a storage again",
        "data_ptr() is 0 for every tensor without data",
        "storages can be compared",
    ),
    Part(
        "torch.cuda._sleep",
        "called, before a timed call",
        "the host hands over all launches of the call meanwhile, so that the GPU's time is measured and not the host's",
        "torch has a public way to hold a stream",
    ),
    Part("torch.cpu._is_avx512_bf16_supported", "called by doctor", "it says what bf16 costs here", "it is public"),
    Part("torch.cpu._is_amx_tile_supported", "called by doctor", "it says what bf16 costs here", "it is public"),
)
