"""What a config changes about a run that has begun: listed, allowed by a word, recorded with the step."""

from dataclasses import dataclass

from ..data.phases import gone_on, until
from ..errors import UserError
from .identity import CHANGEABLE
from .schedule import curve


@dataclass(frozen=True)
class Change:
    """A key with another value from `step` on, the number of steps that were taken with the old one.

    jump: what it does to the learning rate, in words, where it is max_steps; free: it is the run that would have been
    with the new value from the start, and needs no word.
    """

    step: int
    key: str
    old: object
    new: object
    jump: str = ""
    free: bool = False

    def __str__(self):
        return f"{self.key} {self.old} -> {self.new}{self.jump}"

    def record(self) -> dict:
        """As the run file has it."""
        return {"step": self.step, "key": self.key, "from": self.old, "to": self.new}


def changes(recorded: dict, identity: dict, step: int) -> list[Change]:
    """What another identity changes about the run that `recorded` is the identity of, from `step` on.

    A key that an older version did not record is taken to be as it is now. Raises UserError for a schedule that cannot
    be.
    """
    known = [key for key in CHANGEABLE if key in recorded and key in identity]
    found = []
    for key in known:
        if not _differs(key, recorded, identity, step):
            continue
        about = {}
        if key == "max_steps":
            about = _about_max_steps(recorded, identity["max_steps"], step)
        elif key == "data_schedule":
            about = {"free": until(recorded[key], step) == until(identity[key], step)}
        found.append(Change(step, key, recorded[key], identity[key], **about))
    return found


def _differs(key: str, recorded: dict, identity: dict, step: int) -> bool:
    if key == "data_schedule":  # what it says about steps that were taken is not asked
        return gone_on(recorded[key], identity[key], step) != recorded[key]
    if key == "ssm_learning_rate" and recorded[key] != identity[key]:  # None: that of the rest, said or not
        return (recorded[key] or recorded["learning_rate"]) != (identity[key] or identity["learning_rate"])
    return recorded[key] != identity[key]


def _about_max_steps(recorded: dict, new: int, step: int) -> dict:
    """Whether the steps that were taken would have had the same rates; if not, how the rate jumps."""
    if not all(
        key in recorded for key in ("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps")
    ):
        return {}
    before, after = curve(recorded), curve(recorded | {"max_steps": new})
    if all(before(taken) == after(taken) for taken in range(step)):
        return {"free": True}
    at, rate = step, recorded["learning_rate"]
    return {"jump": f" (the rate of step {at} goes from {rate * before(at):.1e} to {rate * after(at):.1e})"}


def allowed_names(given: str | list[str] | None, where: str) -> set[str]:
    """The keys that `allow_changes` names. Raises UserError for one that no run can change."""
    names = given.split(",") if isinstance(given, str) else given or []
    names = {str(name).strip() for name in names}
    for name in sorted(names - set(CHANGEABLE)):
        raise UserError(
            f"{where}: allow_changes: {name!r} is not among what a run may change ({', '.join(CHANGEABLE)}); another "
            "value of anything else is another run: choose another output_dir"
        )
    return names


def check_allowed(found: list[Change], allowed: set[str], run: str) -> None:
    """Raise UserError unless every change is free or allowed."""
    refused = [change for change in found if not change.free and change.key not in allowed]
    if refused:
        keys = ",".join(change.key for change in found if not change.free)
        raise UserError(
            f"{run} was trained with other settings: {', '.join(map(str, refused))}; `--allow_changes {keys}` goes on "
            f"with the new ones from step {refused[0].step}, and the config that it began with as before"
            + _way_out(refused)
        )


def _way_out(refused: list[Change]) -> str:
    if not any(change.key == "max_steps" for change in refused):
        return ""
    return "; lr_scheduler_type warmup_stable_decay is made longer without a jump, from before its decay"
