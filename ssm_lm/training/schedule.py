"""The learning rate as a function of the step and of the config, whether a run was resumed or not."""

import math
from collections.abc import Callable

from ..errors import UserError, one_line

# these follow what was measured
NOT_OF_THE_STEP = ("reduce_lr_on_plateau", "greedy")


def curve(settings: dict) -> Callable[[int], float]:
    """The factor that every learning rate of a run is multiplied by in a step, counted from 0.

    settings: lr_scheduler_type, lr_scheduler_kwargs, warmup_steps (below 1: a share of max_steps), max_steps and
    learning_rate, as an identity has them. Raises UserError for a schedule that cannot be made of these.
    """
    import torch
    from transformers import get_scheduler

    kind, steps = settings["lr_scheduler_type"], settings["max_steps"]
    if kind in NOT_OF_THE_STEP:
        raise UserError(f"lr_scheduler_type {kind} is no function of the step; choose another, as cosine")
    warmup = warmup_steps(settings)
    # as torch's own scheduler has them, of an optimizer that is never used
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=settings["learning_rate"])
    kwargs = settings["lr_scheduler_kwargs"] or {}
    try:
        schedule = get_scheduler(kind, optimizer, warmup, steps, kwargs)
        factor = schedule.lr_lambdas[0]
        for step in (0, warmup, max(0, steps - 1)):
            float(factor(step))
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"lr_scheduler_type {kind} with lr_scheduler_kwargs {kwargs}: {one_line(error)}") from error
    if kind == "warmup_stable_decay":
        parts = warmup + kwargs.get("num_decay_steps", 0) + kwargs.get("num_stable_steps", 0)
        if parts > steps:
            raise UserError(
                f"lr_scheduler_type {kind}: its steps, {parts} with warmup_steps, are more than max_steps, {steps}"
            )
    return factor


def warmup_steps(settings: dict) -> int:
    """Steps of the warm-up, as TrainingArguments.get_warmup_steps has them."""
    given = settings["warmup_steps"]
    return int(given) if given >= 1 else math.ceil(settings["max_steps"] * given)


def schedule_settings(args) -> dict:
    """What `curve` asks for, from S4TrainingArguments."""
    keys = ("learning_rate", "lr_scheduler_kwargs", "warmup_steps", "max_steps")
    return {key: getattr(args, key) for key in keys} | {"lr_scheduler_type": str(args.lr_scheduler_type.value)}


def rate(step: int, settings: dict) -> float:
    """The learning rate of step `step`, counted from 0. settings, errors: see `curve`."""
    return settings["learning_rate"] * curve(settings)(step)
