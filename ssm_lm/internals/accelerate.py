"""What reaches into accelerate's state, which is one for the whole process."""

from accelerate import PartialState
from accelerate.state import AcceleratorState

from . import Part


def forget_pretended_ranks() -> None:
    """Let accelerate know one process again, after a dry run that told it of many."""
    if PartialState._shared_state:  # without it there is no state yet, and asking for one would make it
        PartialState().num_processes = 1


def forget_engine() -> None:
    """Let go of the DeepSpeed config and engine that accelerate holds, for another trainer in this process."""
    AcceleratorState._reset_state()


PARTS = (
    Part(
        "accelerate.PartialState._shared_state",
        "read, to know whether the process has a state",
        "PartialState() makes one, and with it a process group",
        "accelerate says publicly whether there is a state",
    ),
    Part(
        "accelerate.state.AcceleratorState._reset_state",
        "called between two trainers",
        "accelerate knows one DeepSpeed config at a time, and keeps the engine of the last one alive",
        "Accelerator.free_memory lets go of the DeepSpeed plugin too",
    ),
)
