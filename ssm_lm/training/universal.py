"""Checkpoints that go on with another number of ranks, another ZeRO stage, or without DeepSpeed.

DeepSpeed writes what each rank holds: slices of flat buffers, which another number of ranks or another stage cannot
take. Its converter turns them into one file a parameter and state (weights, exp_avg, exp_avg_sq), and the functions
here put those where the engine at hand keeps them. DeepSpeed's own way back (`load_universal`) is not used: it cannot
change the stage, and at stage 3 with several parameter groups it gives all of them the first one's learning rate and
counts Adam's steps once a group.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from ..errors import UserError
from ..internals.deepspeed import ADAM, convert_to_universal, engine_folder, known_objects, placer
from .checkpoints import PARTIAL

UNIVERSAL = "universal"  # the converted form, a folder within the checkpoint

# a parameter's name -> {"fp32": weights, "exp_avg": ..., "exp_avg_sq": ...}, float32, of any shape
Reader = Callable[[str], dict[str, torch.Tensor]]


def engine_name(zero_stage: int | None) -> str:
    """How a checkpoint's mark calls what wrote it."""
    return "torch" if zero_stage is None else f"zero{zero_stage}"


def written_by(checkpoint: Path, mark: dict) -> str:
    if "engine" in mark:
        return mark["engine"]
    # a mark from before it said so
    if not any(checkpoint.glob("global_step*")):
        return "torch"
    return "zero3" if any(checkpoint.glob("global_step*/zero_pp_rank_*_model_states.pt")) else "zero2"


def is_native(checkpoint: Path, mark: dict, engine: str, world_size: int) -> bool:
    """Whether the engine takes the checkpoint up as it is."""
    whole = engine in ("torch", "zero0")  # every rank holds all of it
    return written_by(checkpoint, mark) == engine and (whole or int(mark["world_size"]) == world_size)


def needs_conversion(checkpoint: Path, mark: dict) -> bool:
    """Whether the checkpoint is in shards, and not yet converted."""
    return written_by(checkpoint, mark) not in ("torch", "zero0") and not (checkpoint / UNIVERSAL).is_dir()


def convert(checkpoint: Path, mark: dict) -> None:
    """Make the converted form of a sharded checkpoint, if it is not there. One rank calls it; the others wait."""
    if not needs_conversion(checkpoint, mark):
        return
    partial = checkpoint / f"{PARTIAL}-{UNIVERSAL}"
    shutil.rmtree(partial, ignore_errors=True)
    with known_objects(checkpoint):
        convert_to_universal(engine_folder(checkpoint), partial)
    os.rename(partial, checkpoint / UNIVERSAL)


def open_reader(checkpoint: Path, mark: dict, names: list[str]) -> Reader:
    """What reads one parameter's weights and Adam states from a checkpoint that `convert` has seen.

    names: of the parameters that are trained, in the order of the optimizer's groups. Raises UserError for states that
    are not Adam's.
    """
    writer = written_by(checkpoint, mark)
    if writer not in ("torch", "zero0"):
        folder = checkpoint / UNIVERSAL / "zero"

        def read(name):
            files = {key: folder / name / f"{key}.pt" for key in ("fp32", *ADAM)}
            values = {key: _load(path) for key, path in files.items() if path.is_file()}
            # from stages 1 and 2 the tensors come in a dict, from stage 3 they come alone
            return {key: value["param"] if isinstance(value, dict) else value for key, value in values.items()}

        return read

    if writer == "torch":
        from safetensors.torch import load_file

        weights, optimizer = load_file(checkpoint / "model.safetensors"), _load(checkpoint / "optimizer.pt")
    else:
        states = _load(engine_folder(checkpoint) / "mp_rank_00_model_states.pt")
        weights, optimizer = states["module"], states["optimizer"]
    numbers = {name: number for number, name in enumerate(names)}

    def read(name):
        state = optimizer["state"].get(numbers[name], {}) if name in numbers else {}
        return {"fp32": weights[name]} | {key: state[key] for key in ADAM if key in state}

    return read


def put(module: torch.nn.Module, optimizer, read: Reader, steps: int) -> None:
    """Give a module and its optimizer the weights and Adam states of `read`, and Adam `steps` steps behind it.

    optimizer: torch's, for stage 0 and without DeepSpeed, or a ZeRO optimizer. Every rank calls it.
    """
    place = placer(optimizer, steps)
    for name, parameter in module.named_parameters():
        values = read(name)
        missing = [key for key in ("fp32", *ADAM) if key not in values and (key == "fp32" or parameter.requires_grad)]
        if missing:
            raise UserError(
                f"the checkpoint has no {', '.join(missing)} of {name}; only AdamW's states can be resharded"
            )
        place(parameter, {key: value.flatten() for key, value in values.items()})


def adam_steps(optimizer) -> int:
    """Steps that Adam has taken; steps that were skipped are none."""
    optimizer = getattr(optimizer, "optimizer", optimizer)
    return int(max((float(state["step"]) for state in optimizer.state.values() if "step" in state), default=0))


def _load(path: Path):
    # mapped: of a tensor of which a rank takes a part, no more than that part is read
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
