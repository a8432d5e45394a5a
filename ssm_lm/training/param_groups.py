"""Parameter groups: which learning rate and which weight decay a parameter gets."""

import torch
from torch import nn

from ..baselines import STATE_SPACES
from ..modeling.ssm import StateSpace


def state_space_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Those of every state space: ours, and of a baseline what its mixer holds itself (A_log, D, dt_bias)."""
    found = []
    for module in model.modules():
        if isinstance(module, StateSpace):
            found += module.parameters()
        elif type(module).__name__ in STATE_SPACES:
            found += module.parameters(recurse=False)
    return found


def parameter_groups(model: nn.Module, learning_rate: float, ssm_learning_rate: float, weight_decay: float) -> list:
    """Three groups for an optimizer; every trainable parameter is in one of them.

    ssm:      dt, Lambda, P, B, C, D of every state space: own learning rate, no decay. Decay would pull dt and
              Lambda towards 1, a value as good as any other to them.
    no_decay: biases and norms, all that is a vector.
    decay:    matrices and embeddings.
    """
    ssm = {id(p) for p in state_space_parameters(model)}
    groups = {
        "decay": {"params": [], "lr": learning_rate, "weight_decay": weight_decay},
        "no_decay": {"params": [], "lr": learning_rate, "weight_decay": 0.0},
        "ssm": {"params": [], "lr": ssm_learning_rate, "weight_decay": 0.0},
    }
    norms = {
        id(p)
        for module in model.modules()
        if "Norm" in type(module).__name__  # torch's, and those that a model brings
        for p in module.parameters()
    }
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in ssm:
            group = "ssm"
        # by name and module, not by dimension: under ZeRO 3 a partitioned parameter is a vector of any size
        elif id(parameter) in norms or "bias" in name.rsplit(".", 1)[-1]:
            group = "no_decay"
        else:
            group = "decay"
        groups[group]["params"].append(parameter)
    return [{"name": name, **group} for name, group in groups.items() if group["params"]]


def check_ssm_precision(model: nn.Module) -> None:
    """Raise RuntimeError if a state space parameter is held in less than float32."""
    for path, module in model.named_modules():
        if isinstance(module, StateSpace):
            for name, parameter in module.named_parameters():
                if parameter.dtype not in (torch.float32, torch.float64):
                    raise RuntimeError(f"{path}.{name} is {parameter.dtype}; state space parameters stay float32")


def check_ssm_group(model: nn.Module, optimizer, ssm_learning_rate: float) -> None:
    """Raise RuntimeError unless the optimizer, torch's or a ZeRO one, has the group `ssm` as it was made."""
    if not state_space_parameters(model):
        return
    groups = [group for group in optimizer.param_groups if group.get("name") == "ssm"]
    if not groups:
        raise RuntimeError("the engine has put the state space parameters into another group of the optimizer")
    for group in groups:
        rate = group.get("initial_lr", ssm_learning_rate)
        if group["weight_decay"] != 0 or rate != ssm_learning_rate:
            raise RuntimeError(
                f"the state space parameters have weight decay {group['weight_decay']} and learning rate {rate}; they "
                f"were given 0 and {ssm_learning_rate}"
            )
