"""The model that a training config says, ours or a baseline: its config and, of that, a fresh model."""

from ..baselines import baseline_classes, is_baseline, longest_sequence
from ..errors import UserError, one_line


def model_config(keys: dict, where: str):
    """S4Config, or with a `type` the config of a baseline, from the keys of a config.

    Raises UserError that says which of them makes no model.
    """
    from huggingface_hub.errors import StrictDataclassError

    from ..modeling.configuration_s4 import S4Config

    try:
        return baseline_config(keys) if "type" in keys else S4Config(**keys)
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise UserError(f"{where}: model: {one_line(error.__cause__ or error)}") from error


def baseline_config(keys: dict):
    """The config of a baseline, of which a model can be made. Raises what its classes do."""
    import torch

    config_class, model_class = baseline_classes(keys["type"])
    keys = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")) | keys  # their defaults are of other tokens
    own = {config_class.attribute_map.get(key, key): value for key, value in keys.items() if key != "type"}
    config = config_class(**own)
    with torch.device("meta"):
        model_class(config)  # some of its values are held against one another here alone
    return config


def new_language_model(config):
    """A fresh model of a config."""
    if is_baseline(config):
        return baseline_classes(config.model_type)[1](config)
    from ..modeling.modeling_s4 import S4ForCausalLM

    return S4ForCausalLM(config)


def check_baseline(config, values: dict, length: int, where: str) -> None:
    """Raise UserError for what a training config asks of a baseline, and it cannot do."""
    if not is_baseline(config):
        return
    for key, off in (("carry_state", False), ("sequence_parallel_size", 1)):
        if values.get(key, off) != off:
            raise UserError(f"{where}: {key} is for models of this package, not for {config.model_type}; leave it out")
    longest = longest_sequence(config)
    if longest is not None and length > longest:
        raise UserError(f"{where}: sequence_length {length} is more than the model's n_positions {longest}; raise that")


def describe(config) -> str:
    """What a model is made of, in one line."""
    if is_baseline(config):
        layers, size = config.num_hidden_layers, config.hidden_size
        return f"{config.model_type} of transformers, {layers} layers, hidden_size {size}"
    return (
        f"{config.num_hidden_layers} x [{', '.join(config.sublayers)}], {config.ssm}, hidden_size "
        f"{config.hidden_size}, state_size {config.state_size}"
    )
