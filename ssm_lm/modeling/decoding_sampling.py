"""Greedy search and sampling on a CPU: the loop of generate() with little around each token.

    logits -> processors -> the likeliest token, or one that is drawn -> stopping criteria -> the step on that token

It is transformers' loop, token for token, for the settings that `serves` names; that one gets the others. A step in C
(native_step.py) is a few milliseconds, of which the positions, masks and keyword arguments that the general loop makes
anew for every token, and the decorators of two forwards, would take a fifth. Greedy search without processors, or with
those of a least length, and nobody to look at its scores, goes on in C for some tokens: processors, argmax and criteria
are a tenth to a quarter of a token of a model of 25 million parameters.
"""

import math

import torch
from transformers.generation import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
)

from .decoding_common import CACHE_FIELD, Collected
from .native_step import has_hooks
from .native_tokens import AT_ONCE, Search, TokenSteps

# of what generate() hands on, what says nothing about a token that follows on a cache
READY = {"attention_mask", "cache", "logits_to_keep", "past_key_values", "use_cache"}
# what a step goes through besides: one that was put on the model itself, as PEFT and accelerate do, is to be heard
STEPS = {"forward", "prepare_inputs_for_generation", "_update_model_kwargs_for_generation", "_compiled_call_impl"}

# processors and criteria that are rules of lengths and of tokens that end a row
RULES = {MaxLengthCriteria, EosTokenCriteria, MinLengthLogitsProcessor, MinNewTokensLengthLogitsProcessor}


def serves(model, input_ids: torch.Tensor, generation_config, synced_gpus: bool, model_kwargs: dict) -> bool:
    """Whether `sample` is what transformers' own loop would do. model_kwargs: as generate() hands them to it."""
    return (
        input_ids.device.type == "cpu"
        and not synced_gpus
        and model_kwargs.get("use_cache") is True
        and model_kwargs.keys() <= READY
        and not torch.is_tensor(model_kwargs.get("logits_to_keep"))
        and not vars(model).keys() & STEPS
        and not any(has_hooks(vars(module)) for module in (model, model.model))
        and generation_config.compile_config is None
        and not generation_config.is_assistant
        and not generation_config.output_attentions
        and not generation_config.output_hidden_states
    )


def sample(model, input_ids, logits_processor, stopping_criteria, generation_config, streamer=None, **model_kwargs):
    """What generate() returns: sequences (B, L + new tokens), or an object that holds them. input_ids: (B, L).

    The arguments are those of transformers' `_sample`.
    """
    outputs = model._prefill(input_ids, generation_config, model_kwargs)
    cache, logits = getattr(outputs, CACHE_FIELD), outputs.logits[:, -1]
    del outputs  # its logits may be those of a whole prompt
    collected = Collected(generation_config)
    # rows that have ended are filled up, where there is a token that ends them
    ends = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    fill = generation_config._pad_token_tensor if ends else None
    unfinished = torch.ones(len(input_ids), dtype=torch.long, device=input_ids.device)
    step = TokenSteps(model, cache, trust([*logits_processor, *stopping_criteria], streamer), fill)
    looks_on = generation_config.do_sample or collected.scores is not None or collected.logits is not None
    search = None if looks_on else greedy_search(logits_processor, stopping_criteria, fill)

    def choose(logits) -> torch.Tensor:
        """The next token of every row, (B, 1), by logits (B, V)."""
        logits = logits.to(torch.float32, copy=True)  # for keeps, and processors may write to them
        scores = logits_processor(input_ids, logits)
        collected.add(scores, logits)
        if generation_config.do_sample:
            tokens = scores.softmax(-1).multinomial(1).squeeze(1)
        else:
            tokens = scores.argmax(-1)
        if ends:
            tokens = tokens * unfinished + fill * (1 - unfinished)
        if streamer is not None:
            streamer.put(tokens.clone())
        return tokens[:, None]

    tokens = choose(logits)
    while True:
        input_ids = torch.cat([input_ids, tokens], -1)
        unfinished = unfinished & ~stopping_criteria(input_ids, collected.scores)
        if unfinished.max() == 0:
            break
        tokens = None if search is None else step.search(input_ids, search, unfinished, streamer)
        if tokens is None:
            tokens = choose(step(input_ids[:, -1:]))
    if streamer is not None:
        streamer.end()
    return collected.output(input_ids, cache)


def greedy_search(processors: list, criteria: list, fill: torch.Tensor | None) -> Search | None:
    """The rules of a greedy search, where there are no others than lengths and tokens that end a row."""
    parts = [*processors, *criteria]
    kinds = {type(part) for part in parts}
    ends = [part.eos_token_id.flatten().long() for part in parts if hasattr(part, "eos_token_id")]
    if not {MaxLengthCriteria} <= kinds <= RULES or any(not torch.equal(ends[0], other) for other in ends):
        return None
    if ends and EosTokenCriteria not in kinds:
        return None
    most = min(part.max_length for part in parts if type(part) is MaxLengthCriteria)
    least = 0
    for part in processors:
        is_of_text = type(part) is MinLengthLogitsProcessor
        least = max(least, part.min_length if is_of_text else part.prompt_length_to_skip + part.min_new_tokens)
    return Search(most, ends[0] if ends else torch.empty(0, dtype=torch.int64), least, 0 if fill is None else int(fill))


def trust(parts: list, streamer) -> float:
    """How many tokens may follow one another before the model is looked at again. Processors and criteria of somebody
    else's may do anything, a streamer listens: what it changes is seen some tokens later, but for hooks.
    """
    if not all(map(is_known, parts)):
        return 1
    return math.inf if streamer is None or is_known(streamer) else AT_ONCE


def is_known(part) -> bool:
    """Whether a processor, criterion or streamer is one of transformers' or ours that calls nobody else's code."""
    ours = type(part).__module__.startswith(("transformers.", "ssm_lm."))
    return ours and not isinstance(part, PrefixConstrainedLogitsProcessor)
