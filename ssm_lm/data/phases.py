"""The shares of a mixture from step to step, and what becomes of them when a run goes on with others."""

Phases = list[list]  # [step, [parts]], in order, the first at step 0: from there on so many windows of each source


def without_repeats(phases: Phases) -> Phases:
    """The same shares at every step, and no phase with those of the one before it."""
    return [phase for number, phase in enumerate(phases) if number == 0 or phase[1] != phases[number - 1][1]]


def until(phases: Phases, step: int) -> Phases:
    """What of them holds before `step`."""
    return [phase for phase in phases if phase[0] < step]


def gone_on(begun: Phases, given: Phases, step: int) -> Phases:
    """The shares of a run that began with some and goes on from `step` with others."""
    now = next(parts for first, parts in reversed(given) if first <= step)
    return without_repeats([*until(begun, step), [step, now], *(phase for phase in given if phase[0] > step)])
