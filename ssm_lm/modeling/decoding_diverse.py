"""Diverse beam search: groups of beams, each pushed away from what the groups before it take at the same position.

In group g a token v at position t counts as  log p(v | ...) - penalty * (beams of the groups before g that take v at
t), and the sum of these is what the beams of a group are ranked by: Hamming diversity. Groups are searched one after
the other at every position, all from one forward; the best sequences of all groups are returned.

Source: Vijayakumar et al., "Diverse Beam Search: Decoding Diverse Solutions from Neural Sequence Models" (2016), as in
the group beam search that transformers had.
"""

import torch
from transformers.generation import GenerateBeamDecoderOnlyOutput

from .decoding_common import CACHE_FIELD, cache_of, check_not_sharded, check_settings


def diverse_beam_search(
    model,
    input_ids: torch.LongTensor,
    logits_processor,
    stopping_criteria,
    generation_config,
    num_beam_groups: int | None = None,
    diversity_penalty: float | None = None,
    tokenizer=None,
    synced_gpus: bool = False,
    **model_kwargs,
):
    """For `generate(custom_generate=..., num_beams=...)`. num_beams is the number of beams of all groups together, a
    multiple of num_beam_groups (default: as many as beams); diversity_penalty (default 1) is above 0; generation_config
    stands in for what is not given. With one group it is beam search. Logits processors come before the penalty. A
    group that has ended no longer counts.

    Returns what generate() returns; with return_dict_in_generate and output_scores also sequences_scores, the penalty
    included. Raises ValueError for other values.
    """
    name = "diverse beam search"
    check_settings(name, generation_config, model_kwargs)
    check_not_sharded(name, synced_gpus)
    num_beams = generation_config.num_beams
    # where generation_config does not have them either, it holds 1 and 0
    groups, penalty = num_beam_groups, diversity_penalty
    if groups is None:
        groups = generation_config.num_beam_groups if (generation_config.num_beam_groups or 1) > 1 else num_beams
    if penalty is None:
        penalty = generation_config.diversity_penalty or 1.0
    if groups < 1 or num_beams % groups:
        raise ValueError(f"num_beams must be a multiple of num_beam_groups: {num_beams} beams, {groups} groups")
    if penalty <= 0:
        raise ValueError(f"diversity_penalty must be above 0, not {penalty}")
    size, rows = num_beams // groups, len(input_ids)
    found = [
        _Group(model, input_ids.view(rows // num_beams, num_beams, -1)[:, g * size : (g + 1) * size], generation_config)
        for g in range(groups)
    ]
    outputs = model._prefill(input_ids, generation_config, model_kwargs)
    while True:
        model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
        log_probs = outputs.logits[:, -1].to(input_ids.device, torch.float32, copy=True).log_softmax(-1)
        log_probs = logits_processor(input_ids, log_probs).view(rows // num_beams, num_beams, -1)
        taken = log_probs.new_zeros(log_probs.shape[0], log_probs.shape[-1])  # how many beams have taken a token
        for g, group in enumerate(found):
            ended = group.has_ended()
            tokens = group.step(log_probs[:, g * size : (g + 1) * size] - penalty * taken[:, None], stopping_criteria)
            taken.scatter_add_(1, tokens, (~ended).to(taken.dtype).expand_as(tokens))
        input_ids = torch.cat([group.running() for group in found], 1).flatten(0, 1)
        if not any(group.can_improve() for group in found):
            break
        item = torch.arange(rows // num_beams, device=input_ids.device)[:, None] * num_beams
        origin = torch.cat([item + g * size + group.origin for g, group in enumerate(found)], 1).flatten()
        cache_of(model_kwargs).reorder_cache(origin)
        inputs = model.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **model_kwargs)
        outputs = model(**inputs, return_dict=True)

    scores = torch.cat([group.scores for group in found], 1)
    sequences = torch.cat([group.sequences for group in found], 1)
    lengths = torch.cat([group.lengths() for group in found], 1)
    scores, best = scores.topk(generation_config.num_return_sequences)
    sequences = sequences.gather(1, best[..., None].expand(-1, -1, sequences.shape[-1])).flatten(0, 1)
    sequences = sequences[:, : lengths.gather(1, best).max()]
    if not generation_config.return_dict_in_generate:
        return sequences
    return GenerateBeamDecoderOnlyOutput(
        sequences=sequences,
        sequences_scores=scores.flatten() if generation_config.output_scores else None,
        **{CACHE_FIELD: cache_of(model_kwargs)},
    )


class _Group:
    """The beams of one group, for each of B prompts: those that run on, and the best that have ended. It is the state
    of transformers' own beam search, whose steps it calls, so that one group is that search.

    prompt: (B, size, length).
    """

    def __init__(self, model, prompt, config):
        self.model, self.config = model, config
        self.batch, self.size, self.prompt_length = prompt.shape
        self.length = self.prompt_length
        ends = config._eos_token_tensor
        fill = config._pad_token_tensor or ends[0] if ends is not None else -1
        per_beam = {"device": prompt.device, "size": (self.batch, self.size)}
        self.kept = max(2, 1 + (0 if ends is None else len(ends))) * self.size  # enough where many end at once
        self.in_top = torch.arange(self.kept, device=prompt.device) < self.size
        self.running_sequences = prompt.new_full((self.batch, self.size, config.max_length), int(fill))
        self.running_sequences[..., : self.length] = prompt
        self.sequences = self.running_sequences.clone()
        # the beams begin equal: only the first one counts
        self.running_scores = torch.zeros(**per_beam)
        self.running_scores[:, 1:] = -1e9
        self.scores = torch.full(fill_value=-1e9, **per_beam)
        self.is_finished = torch.zeros(dtype=torch.bool, **per_beam)
        self.promising = torch.ones(self.batch, 1, dtype=torch.bool, device=prompt.device)
        shape = (self.batch, self.size, config.max_length - self.length)
        self.running_indices = torch.full(shape, -1, dtype=torch.int32, device=prompt.device)
        self.indices = self.running_indices.clone()

    def step(self, log_probs, stopping_criteria):
        """log_probs (B, size, V) of the next token -> the tokens that go on (B, size); `origin` (B, size) is where each
        beam came from.
        """
        model, config = self.model, self.config
        at = self.length - self.prompt_length
        shared = {"cur_len": self.length, "decoder_prompt_len": self.prompt_length, "num_beams": self.size}
        top_scores, top_sequences, top_indices = model._get_top_k_continuations(
            accumulated_log_probs=(log_probs + self.running_scores[..., None]).flatten(1),
            running_sequences=self.running_sequences,
            running_beam_indices=self.running_indices,
            do_sample=False,
            beams_to_keep=self.kept,
            batch_size=self.batch,
            vocab_size=log_probs.shape[-1],  # older versions of transformers ask for it
            **shared,
        )
        ends = stopping_criteria(top_sequences[..., : self.length + 1].flatten(0, 1), None)
        self.ends = ends.view(self.batch, self.kept)
        self.running_sequences, self.running_scores, self.running_indices = model._get_running_beams_for_next_iteration(
            topk_log_probs=top_scores,
            topk_running_sequences=top_sequences,
            topk_running_beam_indices=top_indices,
            next_token_hits_stopping_criteria=self.ends,
            num_beams=self.size,
        )
        self.sequences, self.scores, self.indices, self.is_finished = model._update_finished_beams(
            sequences=self.sequences,
            topk_running_sequences=top_sequences,
            beam_scores=self.scores,
            topk_log_probs=top_scores,
            beam_indices=self.indices,
            topk_running_beam_indices=top_indices,
            is_early_stop_heuristic_unsatisfied=self.promising,
            is_sent_finished=self.is_finished,
            next_token_hits_stopping_criteria=self.ends,
            top_num_beam_mask=self.in_top,
            length_penalty=config.length_penalty,
            early_stopping=config.early_stopping,
            **shared,
        )
        item = torch.arange(self.batch, device=log_probs.device)[:, None] * self.size
        self.origin = self.running_indices[..., at].long() - item
        # the beams that go on; at the greatest length none does, and their scores are as good as lost
        tokens = top_sequences[..., self.length]
        if self.config._eos_token_tensor is not None:
            is_end = torch.isin(tokens, self.config._eos_token_tensor.to(tokens.device))
            top_scores = top_scores.masked_fill(is_end, -torch.inf)
        tokens = tokens.gather(1, top_scores.topk(self.size).indices)
        self.length += 1
        self.promising = model._check_early_stop_heuristic(
            is_early_stop_heuristic_unsatisfied=self.promising,
            running_beam_scores=self.running_scores,
            beam_scores=self.scores,
            is_sent_finished=self.is_finished,
            cur_len=self.length,
            max_length=config.max_length,
            decoder_prompt_len=self.prompt_length,
            early_stopping=config.early_stopping,
            length_penalty=config.length_penalty,
        )
        return tokens

    def running(self):
        """(B, size, length so far)"""
        return self.running_sequences[..., : self.length]

    def has_ended(self):
        """(B, 1): whether nothing that runs on can be returned."""
        full = self.is_finished.all(1, keepdim=True) & (self.config.early_stopping is True)
        return full | ~self.promising

    def can_improve(self) -> bool:
        """Whether the search goes on for any prompt, as beam search decides it."""
        return bool(
            self.model._beam_search_has_unfinished_sequences(
                self.promising, self.is_finished, self.ends, self.config.early_stopping
            )
        )

    def lengths(self):
        """(B, size): of the sequences that have ended, prompt included."""
        return self.prompt_length + (self.indices >= 0).sum(-1)
