"""What reaches into DeepSpeed's engines, ZeRO optimizers and files.

DeepSpeed itself is imported where a function calls it and not before: its import probes the machine, and doctor and the
runs without it are to do without that.
"""

import ast
import contextlib
import ctypes
import gc
import importlib.util
import os
import pickle
import re
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from ..errors import UserError
from . import Part

ADAM = ("exp_avg", "exp_avg_sq")
ONLY_KNOWN = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # torch's own switch, which goes before what a caller says


# ---- the process


def leave_out_shared_memory_all_reduce() -> None:
    """Do not compile an all-reduce that is for inference: it takes two minutes at the first start of a CPU process
    group, and training never calls it.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def built_operators() -> list[str]:
    """DeepSpeed's operators that its installation holds compiled, read from the file in which its setup notes them."""
    spec = importlib.util.find_spec("deepspeed")
    if spec is None or spec.origin is None:
        return []
    try:
        text = Path(spec.origin).with_name("git_version_info_installed.py").read_text()
        for node in ast.parse(text).body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "installed_ops":
                return [name for name, built in ast.literal_eval(node.value).items() if built]
    except (OSError, ValueError, SyntaxError):
        pass
    return []


# ---- the engine


def share_master_weights(engine) -> None:
    """Let a ZeRO 3 engine keep float32 parameters once. Nothing happens under another engine.

    DeepSpeed means to: where parameters are float32 already, its master weights are to be the same memory. But it
    compares a device with a string, finds them different, and holds a second copy of every rank's part.
    """
    zero = getattr(engine, "optimizer", None)
    parameters = getattr(zero, "fp16_partitioned_groups_flat", [])  # so called, whatever their dtype
    masters = getattr(zero, "fp32_partitioned_groups_flat", [])
    for parameter, master in zip(parameters, masters, strict=True):
        # None, and elsewhere, where they are offloaded
        if parameter is not None and (parameter.dtype, parameter.device) == (master.dtype, master.device):
            master.data = parameter.data


def gradient_norm(engine) -> float | None:
    """The norm before clipping of the last step's gradient, where a ZeRO optimizer has found it, else None."""
    return getattr(getattr(engine, "optimizer", None), "_global_grad_norm", None)


def before_clipping(engine, observe: Callable[[object], None]) -> None:
    """Call observe(norm) before an engine at stage 0 clips its gradients: the norm is seen nowhere else.

    Nothing happens under an engine that does not clip in this way.
    """
    clip = getattr(engine, "clip_fp32_gradients", None)
    if clip is None:
        return

    def measure_and_clip():
        gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
        observe(torch.nn.utils.get_total_norm(gradients))
        clip()

    engine.clip_fp32_gradients = measure_and_clip


def set_steps(engine, steps: int) -> None:
    """Let an engine go on counting from `steps`."""
    engine.global_steps = steps


def keep_clipping(engine) -> None:
    """Let a ZeRO optimizer clip at what its config says, not at what the checkpoint that it has read says."""
    zero = getattr(engine, "optimizer", None)
    if hasattr(zero, "clip_grad"):
        zero.clip_grad = engine.gradient_clipping()


# ---- ZeRO 3: a model of which no rank holds all


@contextlib.contextmanager
def built_in_parts(config: dict) -> Iterator[None]:
    """Within the block a model of transformers is made with a rank's part of each parameter alone, as ZeRO 3 holds it.

    config: DeepSpeed's. One module at a time is whole: made and drawn on the CPU by every rank alike, then cut. So the
    values, and the random numbers that are drawn, are those of a model that is made whole.
    """
    import deepspeed
    from transformers import PreTrainedModel

    draw = PreTrainedModel._initialize_weights

    def draw_whole(self, module, *args, **kwargs):
        # a model's own method may name parameters of a module's children
        held = [p for one in (module, *module.children()) for p in one.parameters(recurse=False)]
        with deepspeed.zero.GatheredParameters(held, modifier_rank=0):
            places = [p.data for p in held]
            for parameter in held:
                parameter.data = parameter.data.cpu()  # whose random numbers are those of every engine
            draw(self, module, *args, **kwargs)
            for parameter, place in zip(held, places, strict=True):
                parameter.data = place.copy_(parameter.data)

    deepspeed.init_distributed(auto_mpi_discovery=False)  # else the config is checked as if there were one rank
    PreTrainedModel._initialize_weights = draw_whole
    try:
        with freed_memory_returned(), deepspeed.zero.Init(config_dict_or_path=config, tensor_overrides=[]):
            yield
    finally:
        PreTrainedModel._initialize_weights = draw
        gc.collect()  # a parameter that was replaced, as a tied one, hangs in a circle


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


@contextlib.contextmanager
def freed_memory_returned() -> Iterator[None]:
    """Within the block, what is freed of 128 KB and more is the system's again at once, where malloc is glibc's.

    Left to itself it keeps such blocks for the next ones, and modules that are whole one after the other hold two to
    four times what is left of them. Afterwards it keeps blocks of up to 32 MB, as it comes to do by itself.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda parameter, value: None)
    mallopt(M_MMAP_THRESHOLD, 1 << 17)
    try:
        yield
    finally:
        mallopt(M_MMAP_THRESHOLD, 1 << 25)
        mallopt(M_TRIM_THRESHOLD, 1 << 26)


def own_part(parameter: torch.nn.Parameter) -> slice:
    """Which of a parameter's numbers, flattened, are this rank's under ZeRO 3; the last rank's may be fewer."""
    size = parameter.ds_tensor.ds_numel
    first = size * parameter.ds_zero_partition_rank
    return slice(min(first, parameter.ds_numel), min(first + size, parameter.ds_numel))


def put_values(parameter: torch.nn.Parameter, read: Callable[[slice], torch.Tensor]) -> None:
    """Give a parameter other numbers. Every rank calls it; under ZeRO 3 it asks for its own part of them alone.

    read: what gives the numbers of a slice, of all of them flattened.
    """
    part = getattr(parameter, "ds_tensor", None)
    if part is None:
        parameter.data.copy_(read(slice(None)).view_as(parameter))
    elif part.numel() < part.ds_numel:  # it lies on NVMe
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(read(slice(None)).view_as(parameter))
    else:
        own = read(own_part(parameter))
        part.data.zero_()  # what follows the last number is padding
        part.data[: len(own)].copy_(own)
        if parameter.numel() == parameter.ds_numel:  # it lies here whole as well, and would be read as it was
            parameter.partition()


# ---- checkpoints


def engine_folder(checkpoint: Path) -> Path:
    """Where in a checkpoint the engine's own files lie."""
    return checkpoint / (checkpoint / "latest").read_text(encoding="utf-8").strip()


@contextlib.contextmanager
def known_objects(checkpoint: Path) -> Iterator[None]:
    """Within the block `torch.load` makes tensors, plain values and what DeepSpeed's files hold, whatever its caller
    asks for: DeepSpeed's own calls would run any code that a file names.

    Raises UserError for a file that holds anything else.
    """
    known = []
    if any(checkpoint.glob("global_step*")):
        from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils.tensor_fragment import fragment_address

        known = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
    given = os.environ.get(ONLY_KNOWN)
    os.environ[ONLY_KNOWN] = "1"
    try:
        with torch.serialization.safe_globals(known):
            yield
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        raise UserError(
            f"{checkpoint}: a file in it holds {named[1] if named else 'an object'}, which no checkpoint holds and "
            "which could run code; it was not run: go on from another checkpoint, or train anew"
        ) from error
    finally:
        if given is None:
            del os.environ[ONLY_KNOWN]
        else:
            os.environ[ONLY_KNOWN] = given


def convert_to_universal(source: Path, target: Path) -> None:
    """Write the universal form of an engine's folder: a file for each parameter and state. Nothing is printed."""
    from deepspeed.checkpoint import ds_to_universal

    arguments = Namespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        ds_to_universal.main(arguments)


def placer(optimizer, steps: int) -> Callable[[torch.nn.Parameter, dict[str, torch.Tensor]], None]:
    """What puts (parameter, {"fp32": ..., "exp_avg": ..., "exp_avg_sq": ...}, all flat) where the optimizer keeps them.

    optimizer: torch's, for stage 0 and without DeepSpeed, or a ZeRO optimizer; Adam is then `steps` steps old.
    """
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return PlaceZero3(optimizer, steps)
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        return PlaceZero12(optimizer, steps)
    return PlaceWhole(optimizer, steps)


class PlaceWhole:
    """Every rank has all of every parameter."""

    def __init__(self, optimizer, steps):
        self.optimizer, self.steps = optimizer, steps

    def __call__(self, parameter, values):
        parameter.data.copy_(values["fp32"].view_as(parameter))
        if parameter.requires_grad:
            state = _adam_state(self.optimizer, parameter, self.steps)
            for key in ADAM:
                state[key].copy_(values[key].view_as(parameter))


class PlaceZero12:
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


class PlaceZero3:
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
        put_values(parameter, values["fp32"].__getitem__)
        here = own_part(parameter)
        group, start, length = self.zero.grad_position[self.zero.get_param_id(parameter)]
        for key, buffer in self.buffers[group].items():
            part = values[key][here]  # the last rank's is shorter: what follows is padding
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


STAGE_12 = "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer"
STAGE_3 = "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3"
RESHARDING = "DeepSpeed's own way back (load_universal) cannot change the stage and mixes up the parameter groups"
UNTIL_UNIVERSAL = "load_universal changes the stage and keeps the groups' learning rates"

PARTS = (
    Part(
        "deepspeed.ops.__compatible_ops__",
        "written: one operator is not built",
        "accelerate's CPU process group would compile it for two minutes",
        "DeepSpeed builds it when it is called",
    ),
    Part(
        "deepspeed.git_version_info_installed.installed_ops",
        "read from the file by doctor",
        "to import DeepSpeed may start a compilation",
        "DeepSpeed says which operators are built without being imported",
    ),
    Part(
        f"{STAGE_3}.fp16_partitioned_groups_flat",
        "read, and the masters made the same memory",
        "0.19.8 compares a device with a string and keeps float32 parameters twice",
        "the comparison is mended",
    ),
    Part(f"{STAGE_3}.fp32_partitioned_groups_flat", "written, by a checkpoint", RESHARDING, UNTIL_UNIVERSAL),
    Part(f"{STAGE_3}.grad_position", "read, for a parameter's place in the buffers", RESHARDING, UNTIL_UNIVERSAL),
    Part(f"{STAGE_3}.get_param_id", "called, likewise", RESHARDING, UNTIL_UNIVERSAL),
    Part(
        "deepspeed.runtime.zero.partition_parameters.Init.ds_tensor",
        "read and written, a rank's part of a parameter; ds_numel, ds_zero_partition_rank, partition() with it",
        "to gather a parameter and cut it again, a rank would read and hold all of it",
        "a parameter under ZeRO 3 has a public method that takes a rank's part",
    ),
    Part(
        "transformers.PreTrainedModel._initialize_weights",
        "replaced while a model is made for ZeRO 3: a module's parameters are whole while they are drawn",
        "transformers' own way draws on the first rank, on the GPU: other values than those of the other engines",
        "a seed gives the same weights under zero.Init as without",
    ),
    Part(f"{STAGE_3}.swap_optimizer", "read: states on NVMe are refused", RESHARDING, UNTIL_UNIVERSAL),
    Part(f"{STAGE_12}.single_partition_of_fp32_groups", "written, by a checkpoint", RESHARDING, UNTIL_UNIVERSAL),
    Part(f"{STAGE_12}.bit16_groups", "read, for the parameters of a buffer", RESHARDING, UNTIL_UNIVERSAL),
    Part(
        "deepspeed.utils.mixed_precision_linkage._hp_mapping",
        "read from a parameter, for its place in the buffers",
        RESHARDING,
        UNTIL_UNIVERSAL,
    ),
    Part(
        "deepspeed.utils.tensor_fragment.tensor_fragment.hp_fragment_address",
        "read from that",
        RESHARDING,
        UNTIL_UNIVERSAL,
    ),
    Part(
        "deepspeed.utils.tensor_fragment.tensor_fragment.lp_fragment_address",
        "read from that",
        RESHARDING,
        UNTIL_UNIVERSAL,
    ),
    Part(
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "named as harmless to read from a checkpoint",
        "DeepSpeed pickles it into the optimizer's states, and reads them with weights_only=False",
        "DeepSpeed reads its files with weights_only",
    ),
    Part(
        "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
        "named as harmless to read from a checkpoint",
        "likewise",
        "DeepSpeed reads its files with weights_only",
    ),
    Part(
        "deepspeed.runtime.zero.config.ZeroStageEnum",
        "named as harmless to read from a checkpoint",
        "likewise",
        "DeepSpeed reads its files with weights_only",
    ),
    Part(
        "deepspeed.utils.tensor_fragment.fragment_address",
        "named as harmless to read from a checkpoint",
        "likewise",
        "DeepSpeed reads its files with weights_only",
    ),
    Part(
        "deepspeed.checkpoint.ds_to_universal.main",
        "called with the arguments of its command line",
        "the converter is a script; as a process it would import torch once more and print",
        "it is a function with a documented signature",
    ),
    Part(
        f"{STAGE_12}._global_grad_norm",
        "read, for the guard",
        "engine.get_global_grad_norm() is told after the optimizer's step, and the guard decides before it",
        "the norm is told before the step",
    ),
    Part(f"{STAGE_3}._global_grad_norm", "read, for the guard", "as above", "as above"),
    Part(
        "deepspeed.runtime.engine.DeepSpeedEngine.clip_fp32_gradients",
        "replaced on one engine, by a measure and the same",
        "at stage 0 the norm before clipping is seen nowhere else",
        "the engine tells it",
    ),
    Part(
        f"{STAGE_12}.clip_grad",
        "written, after a checkpoint",
        "stages 1 and 2 take it from the checkpoint, and a run may change max_grad_norm",
        "it is read from the config alone, as at stage 3",
    ),
    Part(
        "deepspeed.runtime.engine.DeepSpeedEngine.global_steps",
        "written, after a checkpoint that the engine did not read",
        "it names the engine's files and is shown in its lines",
        UNTIL_UNIVERSAL,
    ),
)
