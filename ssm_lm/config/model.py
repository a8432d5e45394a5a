"""The config of a model from the keys that a training config says."""

from ..errors import UserError, one_line


def model_config(keys: dict, where: str):
    """S4Config from the keys of a config. Raises UserError that says which of them makes no model."""
    from huggingface_hub.errors import StrictDataclassError

    from ..modeling.configuration_s4 import S4Config

    try:
        return S4Config(**keys)
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise UserError(f"{where}: model: {one_line(error.__cause__ or error)}") from error
