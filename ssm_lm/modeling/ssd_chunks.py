"""The chunk scan of an SSD in plain PyTorch: attention with a decay for a mask within a chunk, a recurrence over them.

Shapes: B batch, K chunks of T tokens, E heads of P channels, N states; "1 or B" where constant steps are shared by all
rows. The equations stand in ssd.py.
"""

import torch

from .discrete import DiscreteSSD
from .real_form import apply_diagonal


def scan_chunks(
    system: DiscreteSSD,
    x: torch.Tensor,
    state: torch.Tensor | None,
    begins: torch.Tensor | None,
    T: int,
    has_output=True,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """x (B, L, H + 2N (+ E)) in the dtype of the parameters -> y (B, L, H) without D v, the final state (B, H, N).

    state: (B, H, N) or None for zero. begins: (B, L) bool, tokens before which the state becomes zero, or None.
    """
    L = x.shape[1]
    whole = L // T * T
    if 0 < whole < L:  # what is left is a chunk of its own length
        first, rest = (None, None) if begins is None else (begins[:, :whole], begins[:, whole:])
        y, state = scan_chunks(system, x[:, :whole], state, first, T, has_output)
        y_rest, state = scan_chunks(system, x[:, whole:], state, rest, T, has_output)
        return (torch.cat([y, y_rest], 1) if has_output else None), state
    return _scan_whole_chunks(system, x, state, begins, min(T, L), has_output)


def _scan_whole_chunks(system, x, state, begins, T, has_output):
    B, L, _ = x.shape
    v, b, c, dt = system.read(x)
    E, N, dtype = dt.shape[-1], b.shape[-1], x.dtype
    P = v.shape[-1] // E
    v = v.view(B, -1, T, E, P).transpose(2, 3)  # (B, K, E, T, P)
    b, c = (part.view(B, -1, 1, T, N) for part in (b, c))
    # dt (E,) is that of every token and chunk: (1, 1, E, T); or (B, L, E)
    dt = dt[:, None].expand(E, T)[None, None] if dt.dim() == 1 else dt.view(B, -1, T, E).transpose(2, 3)
    since_start = dt.cumsum(-1)
    angle = since_start[..., None] * system.omega  # float64: many turns, of which the rest must keep its digits
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)  # (1 or B, 1 or K, E, T, N / 2)
    turn_back = torch.cat([cos, -sin], -1)
    b, c = apply_diagonal(turn_back, b), apply_diagonal(turn_back, c) if has_output else None  # (B, K, E, T, N)
    decay = (since_start * system.decay[:, None]).to(dtype)
    dt = dt.to(dtype)

    together, from_start, to_end, keeps = _reach(begins, B, T, x.device)
    to_the_end = torch.exp(decay - decay[..., -1:]) * dt * to_end
    end = torch.cat([cos, sin], -1)[..., -1:, :]  # the turn over a whole chunk
    injected = apply_diagonal(end, (v * to_the_end[..., None]).mT @ b)  # (B, K, E, P, N)
    carry = end * torch.exp(-decay[..., -1:, None]) * keeps
    starts, state = _over_chunks(injected, carry, state)
    if not has_output:
        return None, state.flatten(1, 2)

    apart = (decay[..., None] - decay[..., None, :]).masked_fill(~together, torch.inf)
    y = (c @ b.mT * (torch.exp(-apart) * dt[..., None, :])) @ v
    if starts is not None:
        y = y + (torch.exp(-decay) * from_start)[..., None] * (c @ starts.mT)
    return y.transpose(2, 3).reshape(B, L, -1), state.flatten(1, 2)


def _reach(begins, B, T, device):
    """Which tokens of a chunk reach which: (i, j) is j <= i, of one document; are reached from its start; reach its
    end; whether the start reaches the end. Each as a factor or mask that broadcasts over (B, K, E, ...).
    """
    causal = torch.ones(T, T, dtype=torch.bool, device=device).tril()
    if begins is None:
        return causal, 1, 1, 1
    number = begins.view(B, -1, 1, T).cumsum(-1)  # of the document, in its chunk; 0 goes on from the one before
    last = number[..., -1:]
    return (
        causal & (number[..., None] == number[..., None, :]),
        number == 0,
        number == last,
        (last == 0)[..., None],
    )


def _over_chunks(injected, carry, state):
    """h_(k+1) = carry_k h_k + injected_k -> the states (B, K, E, P, N) before every chunk, or None where all are zero;
    the one after the last.
    """
    B, K, E, P, N = injected.shape
    carry = carry.expand(-1, K, -1, -1, -1)
    state = None if state is None else state.view(B, E, P, N)
    starts = []
    for k in range(K):
        starts.append(state)
        state = injected[:, k] if state is None else apply_diagonal(carry[:, k], state) + injected[:, k]
    if starts[0] is None:
        if K == 1:
            return None, state
        starts[0] = torch.zeros_like(starts[1])
    return torch.stack(starts, 1), state
