"""Contrastive search: of the k likeliest tokens, the one that is likely and unlike what is there already.

    x_t = argmax over v in top-k of  (1 - alpha) p(v | x_<t)  -  alpha max_{j<t} cos(h_v, h_j)

h_j is the last hidden state at position j, h_v the one that the candidate v would get: all k are run in one forward,
each on its own copy of the states.

Source: Su, Lan, Wang, Yogatama, Kong, Collier, "A Contrastive Framework for Neural Text Generation" (2022).
"""

import torch
import torch.nn.functional as F

from .decoding_common import Collected, cache_of, check_not_sharded, check_one_beam, check_settings


def contrastive_search(
    model,
    input_ids: torch.LongTensor,
    logits_processor,
    stopping_criteria,
    generation_config,
    penalty_alpha: float | None = None,
    top_k: int | None = None,
    streamer=None,
    tokenizer=None,
    synced_gpus: bool = False,
    **model_kwargs,
):
    """For `generate(custom_generate=...)`. penalty_alpha in [0, 1] (default 0.6), 0 is greedy search; top_k at least 1
    (default 4), 1 is greedy search; a generation_config with a penalty_alpha stands in for both. Batches may be
    left-padded: what is masked is not compared with. A token that a logits processor forbids is left out.

    Returns what generate() returns. Raises ValueError for other values, and for a cache that holds tokens already,
    whose hidden states are gone.
    """
    name = "contrastive search"
    check_settings(name, generation_config, model_kwargs)
    check_not_sharded(name, synced_gpus)
    check_one_beam(name, generation_config)
    settled = generation_config.penalty_alpha is not None
    if penalty_alpha is None:
        penalty_alpha = generation_config.penalty_alpha if settled else 0.6
    if top_k is None:
        top_k = generation_config.top_k if settled and generation_config.top_k else 4
    if not 0 <= penalty_alpha <= 1:
        raise ValueError(f"penalty_alpha must be from 0 to 1, not {penalty_alpha}")
    if not 1 <= top_k <= model.config.vocab_size:
        raise ValueError(f"top_k must be from 1 to the vocabulary's {model.config.vocab_size}, not {top_k}")
    cache = cache_of(model_kwargs)
    if cache.get_seq_length() > 0:
        raise ValueError(f"{name} compares with the hidden states of the whole prompt: give it no past_key_values")
    # every step also runs the token that it has chosen; a cache that the caller keeps ends before the last of them, as
    # it does in other modes
    cache_lives_on = generation_config.return_dict_in_generate or getattr(cache, "_is_user_defined", False)
    if cache_lives_on:
        cache.activate_past_recording()

    def run(**inputs):
        return model.model(**inputs, past_key_values=cache, use_cache=True).last_hidden_state

    mask, embeds = model_kwargs.get("attention_mask"), model_kwargs.get("inputs_embeds")
    hidden = run(attention_mask=mask, **({"input_ids": input_ids} if embeds is None else {"inputs_embeds": embeds}))
    B = len(hidden)
    rows = torch.arange(B, device=hidden.device)
    context = F.normalize(hidden.float(), dim=-1)  # (B, positions, H)
    compared = context.new_ones(context.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
    hidden = hidden[:, -1:]
    pad_token_id = generation_config._pad_token_tensor
    unfinished = torch.ones(B, dtype=torch.bool, device=input_ids.device)
    collected = Collected(generation_config)
    while unfinished.any():
        logits = model.lm_head(hidden)[:, -1].float()
        scores = logits_processor(input_ids, logits)
        probability, candidates = scores.softmax(-1).topk(top_k)  # (B, k)
        cache.batch_repeat_interleave(top_k)
        hidden = run(input_ids=candidates.view(-1, 1))  # (B k, 1, H)
        vectors = F.normalize(hidden.float(), dim=-1).view(B, top_k, -1)
        similarity = (vectors @ context.transpose(1, 2)).masked_fill(~compared[:, None], -1).amax(-1)
        value = (1 - penalty_alpha) * probability - penalty_alpha * similarity
        chosen = value.masked_fill(probability == 0, -torch.inf).argmax(-1)
        cache.batch_select_indices(rows * top_k + chosen)
        hidden = hidden[rows * top_k + chosen]
        context = torch.cat([context, vectors[rows, chosen][:, None]], 1)
        compared = F.pad(compared, (0, 1), value=True)

        tokens = candidates[rows, chosen].to(input_ids.device)
        if pad_token_id is not None:
            tokens = torch.where(unfinished, tokens, pad_token_id.to(tokens.device))
        input_ids = torch.cat([input_ids, tokens[:, None]], 1)
        collected.add(scores, logits)
        if streamer is not None:
            streamer.put(tokens.cpu())
        unfinished = unfinished & ~stopping_criteria(input_ids, collected.scores).to(unfinished.device)
        if cache_lives_on:
            cache.crop(0 if unfinished.any() else -1)
    if streamer is not None:
        streamer.end()
    return collected.output(input_ids, cache)
