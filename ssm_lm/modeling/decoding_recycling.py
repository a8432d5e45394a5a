"""Token recycling: drafts from what the model has said before, verified in one forward. Exactly greedy search.

The adjacency matrix has for every token of the vocabulary the likeliest next tokens when it was last seen, by the
model's own logits. A draft follows it: M[x], M[M[x]], ... One forward over [x, draft] says what greedy search takes at
each position and how much of the draft is right; the states of the rest are cropped, and the logits of all positions,
wrong ones too, go back into the matrix. Nothing is trained, and there is no second model.

The paper verifies a tree of drafts with tree attention. A recurrent state has no attention mask to draw a tree in: it
takes one draft, or several in a batch, each on its own copy of the states. On a CPU a row of a batch costs what as many
tokens cost: with a hidden size of 512 and 4 layers of S4, 1, 4 and 11 tokens take 6.5, 11 and 19 ms, and four rows of 4
take 22 ms. So tokens are better spent on the length of the one likeliest draft, the default. Where a forward costs the
same for any few tokens, as on a GPU, num_drafts > 1 tries several first steps at once.

Source: Luo et al., "Turning Trash into Treasure: Accelerating Inference of Large Language Models with Token Recycling"
(2024).
"""

import torch

from .decoding_common import CACHE_FIELD, Collected, check_not_sharded, check_one_beam, check_settings

PROMPT_ROWS = 256  # of the prompt's last tokens, the logits are recycled; this bounds their memory


def token_recycling(
    model,
    input_ids: torch.LongTensor,
    logits_processor,
    stopping_criteria,
    generation_config,
    matrix: torch.Tensor | None = None,
    max_draft_length: int = 8,
    num_drafts: int = 1,
    streamer=None,
    tokenizer=None,
    synced_gpus: bool = False,
    **model_kwargs,
):
    """For `generate(custom_generate=...)`. One prompt at a time, greedy; logits processors apply.

    matrix: (vocab_size, at least num_drafts) integers on the CPU, -1 where nothing is known: read, and updated in
        place. Pass the same one to every call to keep what was learnt; without it every call begins with an empty one.
        It takes vocab_size x num_drafts numbers of 8 bytes: 0.4 MB for 50,000 tokens.
    max_draft_length: the longest draft. Its length follows what is accepted, from one token up to this.
    Returns what generate() returns. Raises ValueError for other values and for a batch.
    """
    name = "token recycling"
    check_settings(name, generation_config, model_kwargs)
    check_not_sharded(name, synced_gpus)
    check_one_beam(name, generation_config)
    for option, value in (("max_draft_length", max_draft_length), ("num_drafts", num_drafts)):
        if value < 1:
            raise ValueError(f"{option} must be 1 or more, not {value}")
    vocab_size = model.config.vocab_size
    if num_drafts > vocab_size:
        raise ValueError(f"num_drafts must be at most the vocabulary's {vocab_size}, not {num_drafts}")
    if matrix is None:
        matrix = torch.full((vocab_size, num_drafts), -1)
    if matrix.dim() != 2 or len(matrix) != vocab_size or not num_drafts <= matrix.shape[1] <= vocab_size:
        raise ValueError(f"matrix must be ({vocab_size}, {num_drafts} or more), not {tuple(matrix.shape)}")
    if matrix.is_floating_point() or matrix.device.type != "cpu":
        raise ValueError(f"matrix must hold integers on the CPU, not {matrix.dtype} on {matrix.device}")
    model_kwargs["logits_to_keep"] = PROMPT_ROWS
    outputs = model._prefill(input_ids, generation_config, model_kwargs)
    logits, cache = outputs.logits, outputs[CACHE_FIELD]
    if len(logits) > 1:
        raise ValueError(f"{name} takes one prompt at a time, not {len(logits)}")
    cache.activate_past_recording()
    known = min(logits.shape[1], input_ids.shape[1])  # none of a prompt that came as embeddings
    if known:
        _recycle(matrix, input_ids[:, -known:], logits[:, -known:])
    logits, drafts, length = logits[:, -1:], input_ids.new_empty(1, 0), 1
    collected = Collected(generation_config)
    while True:
        longest = None  # all agree with greedy search as far as they go: the longest one is its continuation
        for row, draft in enumerate(drafts.tolist()):
            found = _accept(input_ids, draft, logits[row], logits_processor, stopping_criteria)
            if longest is None or found[0].shape[1] > longest[0].shape[1]:
                best, longest = row, found
        sequence, scores, finished = longest
        new = sequence[0, input_ids.shape[1] :]
        for i, token in enumerate(new):
            collected.add(scores[i], logits[best, i : i + 1].float())
            if streamer is not None:
                streamer.put(token.cpu()[None])
        input_ids, accepted = sequence, len(new) - 1
        if len(drafts) > 1:
            cache.batch_select_indices(torch.tensor([best], device=logits.device))
        cache.crop(accepted - drafts.shape[1])
        if finished:
            break
        # as long as it was right and one more, or twice as long where all of it was right
        length = 2 * length if accepted == drafts.shape[1] else accepted + 1
        length = min(length, max_draft_length)
        # a draft beyond the last token but one would be of no use
        room = generation_config.max_length - input_ids.shape[1] - 1
        drafts = _draft(matrix, int(new[-1]), min(length, room), num_drafts).to(input_ids.device)
        tokens = torch.cat([new[-1].expand(len(drafts), 1), drafts], 1)
        if len(drafts) > 1:
            cache.batch_repeat_interleave(len(drafts))
        logits = model(input_ids=tokens.to(logits.device), past_key_values=cache, use_cache=True).logits
        _recycle(matrix, tokens, logits)
    if streamer is not None:
        streamer.end()
    return collected.output(input_ids, cache)


def _recycle(matrix, tokens, logits):
    """The likeliest tokens after each of `tokens` (drafts, n) go into its row; the last of several says what stays."""
    likeliest = logits.topk(matrix.shape[1]).indices.cpu().to(matrix.dtype)
    for token, row in zip(tokens.flatten().tolist(), likeliest.flatten(0, 1), strict=True):
        matrix[token] = row


def _draft(matrix, token, length, num_drafts):
    """(num_drafts, at most length): draft j begins with the j-th likeliest token, then each takes the likeliest one."""
    drafts = []
    for column in range(num_drafts):
        draft, last = [], token
        while len(draft) < length:
            last = int(matrix[last, column if not draft else 0])
            if last < 0:
                break
            draft.append(last)
        drafts.append(draft)
    longest = max(map(len, drafts))
    if longest == 0:
        return torch.empty(1, 0, dtype=torch.long)
    return torch.tensor([draft + [0] * (longest - len(draft)) for draft in drafts])  # a 0 too much is rejected


def _accept(input_ids, draft, logits, logits_processor, stopping_criteria):
    """What greedy search makes of the logits (len(draft) + 1, V) as long as it follows the draft, one token at least:
    the sequence, the scores of its new tokens, and whether it ends there.
    """
    all_scores, finished = [], False
    for i in range(len(draft) + 1):
        scores = logits_processor(input_ids, logits[i : i + 1].to(input_ids.device, torch.float32, copy=True))
        token = scores.argmax(-1)
        input_ids = torch.cat([input_ids, token[:, None]], 1)
        all_scores.append(scores)
        finished = bool(stopping_criteria(input_ids, None).all())
        if finished or i == len(draft) or int(token) != draft[i]:
            break
    return input_ids, all_scores, finished
