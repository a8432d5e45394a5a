"""What the decoding strategies share: the settings that they refuse, their output, and what a cache is called there."""

from dataclasses import fields

from transformers.generation import GenerateDecoderOnlyOutput
from transformers.modeling_outputs import BaseModelOutputWithPast

# of a model's output; from transformers 5.24 on its name is `cache`, and the other one warns
CACHE_FIELD = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"


def cache_of(model_kwargs: dict):
    """The cache that generate() gives a strategy, None without one; from transformers 5.24 on its name is `cache`."""
    cache = model_kwargs.get("cache")
    return model_kwargs.get("past_key_values") if cache is None else cache


def check_not_sharded(name: str, synced_gpus: bool) -> None:
    """ValueError under ZeRO 3 and FSDP: a rank whose texts have ended would leave the others waiting for it."""
    if synced_gpus:
        raise ValueError(f"{name} does not run on sharded parameters (synced_gpus); gather them first")


def check_settings(name: str, generation_config, model_kwargs: dict) -> None:
    """ValueError for settings of generate() that the strategy `name` could only ignore."""
    if generation_config.do_sample:
        raise ValueError(f"{name} draws nothing: do_sample must be False")
    if not model_kwargs.get("use_cache") or cache_of(model_kwargs) is None:
        raise ValueError(f"{name} needs a cache: use_cache must be True")
    for option in ("output_attentions", "output_hidden_states"):
        if getattr(generation_config, option):
            raise ValueError(f"{name} has no {option}: leave it out")


def check_one_beam(name: str, generation_config) -> None:
    """ValueError for beams and for several sequences of one prompt."""
    for option in ("num_beams", "num_return_sequences"):
        value = getattr(generation_config, option)
        if value > 1:
            raise ValueError(f"{name} follows one sequence: {option} must be 1, not {value}")


class Collected:
    """Scores and logits of the chosen tokens, where the caller of generate() wants them, and the output."""

    def __init__(self, generation_config):
        self.as_dict = generation_config.return_dict_in_generate
        self.scores = () if self.as_dict and generation_config.output_scores else None
        self.logits = () if self.as_dict and generation_config.output_logits else None

    def add(self, scores, logits) -> None:
        """One token's, (B, V) each."""
        if self.scores is not None:
            self.scores += (scores,)
        if self.logits is not None:
            self.logits += (logits,)

    def output(self, sequences, cache):
        """What generate() returns: the sequences, or an object that holds them."""
        if not self.as_dict:
            return sequences
        return GenerateDecoderOnlyOutput(
            sequences=sequences, scores=self.scores, logits=self.logits, **{CACHE_FIELD: cache}
        )
