"""Checkpoints that go on with another number of ranks, another ZeRO stage, or without DeepSpeed.

DeepSpeed writes what each rank holds: slices of flat buffers, which another number of ranks or another stage cannot
take. Its converter turns them into one file a parameter and state (weights, exp_avg, exp_avg_sq), and the functions
here put those where the engine at hand keeps them. DeepSpeed's own way back (`load_universal`) is not used: it cannot
change the stage, and at stage 3 with several parameter groups it gives all of them the first one's learning rate and
counts Adam's steps once a group.
"""

import contextlib
import os
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch

from ..errors import UserError
from .checkpoints import PARTIAL

UNIVERSAL = "universal"  # the converted form, a folder within the checkpoint
ADAM = ("exp_avg", "exp_avg_sq")

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


def convert(checkpoint: Path, mark: dict) -> None:
    """Make the converted form of a sharded checkpoint, if it is not there. One rank calls it; the others wait."""
    target = checkpoint / UNIVERSAL
    if written_by(checkpoint, mark) in ("torch", "zero0") or target.is_dir():
        return
    from deepspeed.checkpoint import ds_to_universal

    partial = checkpoint / f"{PARTIAL}-{UNIVERSAL}"
    shutil.rmtree(partial, ignore_errors=True)
    arguments = Namespace(
        input_folder=str(_engine_folder(checkpoint)),
        output_folder=str(partial),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        ds_to_universal.main(arguments)
    os.rename(partial, target)


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
        states = _load(_engine_folder(checkpoint) / "mp_rank_00_model_states.pt")
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
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        place = _PlaceZero3(optimizer, steps)
    elif hasattr(optimizer, "single_partition_of_fp32_groups"):
        place = _PlaceZero12(optimizer, steps)
    else:
        place = _PlaceWhole(optimizer, steps)
    for name, parameter in module.named_parameters():
        values = read(name)
        missing = [key for key in ("fp32", *ADAM) if key not in values and (key == "fp32" or parameter.requires_grad)]
        if missing:
            raise UserError(
                f"the checkpoint has no {', '.join(missing)} of {name}; only AdamW's states can be resharded"
            )
        place(parameter, {key: value.flatten() for key, value in values.items()})


class _PlaceWhole:
    """Every rank has all of every parameter."""

    def __init__(self, optimizer, steps):
        self.optimizer, self.steps = optimizer, steps

    def __call__(self, parameter, values):
        parameter.data.copy_(values["fp32"].view_as(parameter))
        if parameter.requires_grad:
            state = _adam_state(self.optimizer, parameter, self.steps)
            for key in ADAM:
                state[key].copy_(values[key].view_as(parameter))


class _PlaceZero12:
    """A rank has a slice of each group's flat float32 buffer, and all weights in the model."""

    def __init__(self, zero, steps):
        self.buffers = {}
        for flat, parameters in zip(zero.single_partition_of_fp32_groups, zero.bit16_groups, strict=True):
            state = _adam_state(zero.optimizer, flat, steps)
            for parameter in parameters:
                self.buffers[id(parameter)] = {"fp32": flat.data, **{key: state[key] for key in ADAM}}

    def __call__(self, parameter, values):
        parameter.data.copy_(values["fp32"].view_as(parameter))
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is not None:  # some of it is in this rank's slice
            here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
            for key, buffer in self.buffers[id(parameter)].items():
                buffer.narrow(0, here.start, here.numel).copy_(values[key].narrow(0, there.start, there.numel))


class _PlaceZero3:
    """A rank has a slice of every parameter, side by side in the flat float32 buffers of sub-groups."""

    def __init__(self, zero, steps):
        if getattr(zero, "swap_optimizer", False):
            raise UserError("optimizer states on NVMe cannot be resharded; resume with as many ranks as before")
        self.zero = zero
        self.buffers = []
        for flat in zero.fp32_partitioned_groups_flat:
            state = _adam_state(zero.optimizer, flat, steps)
            self.buffers.append({"fp32": flat.data, **{key: state[key] for key in ADAM}})

    def __call__(self, parameter, values):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if torch.distributed.get_rank() == 0:
                parameter.data.copy_(values["fp32"].view_as(parameter))
        group, start, length = self.zero.grad_position[self.zero.get_param_id(parameter)]
        first = length * self.zero._get_param_partition_rank(parameter)
        for key, buffer in self.buffers[group].items():
            part = values[key][first : first + length]  # the last rank's is shorter: what follows is padding
            buffer.narrow(0, start, length).zero_()
            buffer.narrow(0, start, len(part)).copy_(part)


def _adam_state(optimizer, tensor, steps: int) -> dict:
    """The optimizer's state of a tensor, made if it has not stepped yet."""
    state = optimizer.state[tensor]
    state["step"] = torch.tensor(float(steps), device=tensor.device if _is_capturable(optimizer) else "cpu")
    for key in ADAM:
        if key not in state:
            state[key] = torch.zeros_like(tensor.data)
    return state


def _is_capturable(optimizer) -> bool:
    return any(group.get("capturable") or group.get("fused") for group in optimizer.param_groups)


def adam_steps(optimizer) -> int:
    """Steps that Adam has taken; steps that were skipped are none."""
    optimizer = getattr(optimizer, "optimizer", optimizer)
    return int(max((float(state["step"]) for state in optimizer.state.values() if "step" in state), default=0))


def _engine_folder(checkpoint: Path) -> Path:
    return checkpoint / (checkpoint / "latest").read_text(encoding="utf-8").strip()


def _load(path: Path):
    # the files are DeepSpeed's, with objects of its own in them, and come from the run's own folder
    return torch.load(path, map_location="cpu", weights_only=False)
