"""How many forwards make a step."""

from ..errors import UserError


def accumulation_steps(values: dict, at_once: int, ranks: int, where: str) -> int:
    """gradient_accumulation_steps, from `train_batch_size_total` where that is given.

    at_once: sequences that all ranks see in a forward. Raises UserError that begins with `where`.
    """
    total, own = values.get("train_batch_size_total"), values.get("gradient_accumulation_steps", 1)
    if total is None:
        return own
    if own != 1:
        raise UserError(
            f"{where}: gradient_accumulation_steps follows from train_batch_size_total; leave one of them out"
        )
    if total < 1 or total % at_once:
        raise UserError(
            f"{where}: train_batch_size_total {total} is no multiple of the {at_once} sequences that {ranks} "
            "ranks see at once; choose another per_device_train_batch_size or another number of ranks"
        )
    return total // at_once
