"""The negative log-likelihood of a token stream under a model.

The stream is read after one end-of-text token, as a document is in training, so every token of it is scored exactly
once and the sum belongs to the split, whatever the window: two models with one tokenizer are compared by it, and
divided by words or bytes it compares models with different tokenizers.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from transformers import DynamicCache

# called with (number of the first token, NLL of it and of those after it, float64 on the CPU) after each step
Observer = Callable[[int, np.ndarray], None]
# logits at a time, in elements: 128 MiB in float32, 667 positions of GPT-2's vocabulary
SLICE_ELEMENTS = 1 << 25


@torch.inference_mode()
def full_context_nll(
    model,
    tokens: np.ndarray,
    eos_token_id: int,
    window: int = 4096,
    progress: Callable[[int], None] | None = None,
    observe: Observer | None = None,
) -> float:
    """The summed NLL (natural log) of `tokens` (n,), each one predicted from all before it.

    The model's state is carried from window to window, so the result does not depend on `window`, which only bounds
    the memory. progress is called with the number of tokens that each step has scored, observe with their NLLs.
    """
    cache, total = DynamicCache(config=model.config), 0.0
    for start in range(0, len(tokens), window):
        inputs, targets = _slice(tokens, eos_token_id, start, start + window, model.device)
        hidden_states = model.model(inputs[None], past_key_values=cache, use_cache=True).last_hidden_state
        total += _summed_nll(model, hidden_states[0], targets, start, observe)
        if progress is not None:
            progress(len(targets))
    return total


@torch.inference_mode()
def windowed_nll(
    model,
    tokens: np.ndarray,
    eos_token_id: int,
    context: int,
    batch_size: int = 8,
    progress: Callable[[int], None] | None = None,
    observe: Observer | None = None,
) -> float:
    """The summed NLL of `tokens` (n,) in windows of `context` inputs that do not overlap, each from a zero state.

    A window's first input is the token before its first target. The last window may be shorter.
    """
    total = 0.0
    for start, rows, length in _batches(len(tokens), context, batch_size):
        inputs, targets = _slice(tokens, eos_token_id, start, start + rows * length, model.device)
        hidden_states = model.base_model(inputs.view(rows, length), use_cache=False).last_hidden_state
        total += _summed_nll(model, hidden_states.flatten(0, 1), targets, start, observe)
        if progress is not None:
            progress(len(targets))
    return total


def _batches(count: int, context: int, batch_size: int) -> Iterator[tuple[int, int, int]]:
    """(first target, rows, length of a row): whole windows in batches, then what is left as one row."""
    whole = count // context
    for first in range(0, whole, batch_size):
        yield first * context, min(batch_size, whole - first), context
    if count % context:
        yield whole * context, 1, count % context


def _slice(tokens, eos_token_id: int, start: int, end: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of the positions from `start` to `end`: the input of a position is the token before it."""
    before = [eos_token_id] if start == 0 else tokens[start - 1 : start]
    ids = np.concatenate([np.asarray(before, dtype=np.int64), tokens[start:end].astype(np.int64)])
    ids = torch.from_numpy(ids).to(device)
    return ids[:-1], ids[1:]


def _summed_nll(model, hidden_states: torch.Tensor, targets: torch.Tensor, first: int = 0, observe=None) -> float:
    """hidden_states (n, H), targets (n,) -> the sum in float64; the logits exist for a slice of positions at a time.

    first: the number of the first target, for the observer.
    """
    if getattr(model.config, "adaptive_cutoffs", None) is not None and observe is None:
        # the same numbers from the cluster of each target alone, in slices of its own
        return model.lm_head(hidden_states, targets).double().item()
    positions = max(1, SLICE_ELEMENTS // model.config.vocab_size)
    total = torch.zeros((), dtype=torch.float64, device=targets.device)
    for states, ids in zip(hidden_states.split(positions), targets.split(positions), strict=True):
        logits = model.lm_head(states)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        nlls = F.cross_entropy(logits, ids, reduction="none").double()
        total += nlls.sum()
        if observe is not None:
            observe(first, nlls.cpu().numpy())
            first += len(ids)
    return total.item()
