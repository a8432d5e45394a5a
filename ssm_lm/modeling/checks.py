"""The ranges of a state space's keys, checked once for the layers and for S4Config, whose keys have other names."""

from .hippo import INITIALIZATIONS

DISCRETIZATIONS = {  # [0]: the default
    "s4": ("bilinear",),
    "s4d": ("zoh", "bilinear"),
    "s5": ("zoh", "bilinear"),
    "ssd": ("exponential-euler",),  # zero-order hold of A alone: what enters is multiplied by dt
}


def check_one_of(key: str, value, known) -> None:
    """Raise ValueError for a value that is not one of `known`."""
    if value not in known:
        raise ValueError(f"{key} is one of {', '.join(known)}, not {value!r}")


def check_positive(**values) -> None:
    """Raise ValueError for a number that is not above 0; None passes."""
    for key, value in values.items():
        if value is not None and not value > 0:
            raise ValueError(f"{key} must be positive, not {value}")


def check_system(
    ssm: str,
    *,
    init: str,
    discretization: str,
    state_size: int,
    dt_min: float,
    dt_max: float,
    chunk_size: int,
    init_key: str,
    discretization_key: str,
) -> None:
    """Raise ValueError for what makes no state space of the kind `ssm`. init_key, discretization_key: their names."""
    check_one_of(init_key, init, INITIALIZATIONS[ssm])
    check_one_of(discretization_key, discretization, DISCRETIZATIONS[ssm])
    check_positive(chunk_size=chunk_size)
    if state_size < 2 or state_size % 2:
        raise ValueError(
            f"state_size must be even and at least 2, not {state_size}: it counts real states in conjugate pairs"
        )
    if not 0 < dt_min <= dt_max:
        raise ValueError(f"0 < dt_min <= dt_max is needed, not dt_min={dt_min}, dt_max={dt_max}")


def check_sharing(hidden_size: int, n_ssm: int, b_clip: float | None) -> None:
    """Of a layer whose channels have systems of their own, n_ssm different ones."""
    if n_ssm < 1 or hidden_size % n_ssm:
        raise ValueError(f"n_ssm must divide hidden_size ({hidden_size}), and {n_ssm} does not")
    check_positive(b_clip=b_clip)


def check_heads(channels: int, head_dim: int, key: str) -> None:
    """Of channels in heads, those of `key`: how many a head has."""
    if head_dim < 1 or channels % head_dim:
        raise ValueError(f"head_dim must divide {key} ({channels}), and {head_dim} does not")


def check_blocks(state_size: int, blocks: int, key: str = "blocks") -> None:
    """Of S5: how many copies of the initial spectrum make the state."""
    if blocks < 1 or state_size % (2 * blocks):
        raise ValueError(f"{key} must cut state_size ({state_size}) into even parts, and {blocks} does not")
