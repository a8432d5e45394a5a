"""The chunk scan of an SSD in plain PyTorch: attention with a decay for a mask within a chunk, a recurrence over them.

Shapes: B batch, K chunks of T tokens, E heads of P channels, N states; "1 or B" where constant steps are shared by all
rows. The equations stand in ssd.py.
"""

import torch
import torch.nn.functional as F

from .real_form import apply_diagonal


def scan_vectors(
    v, b, c, dt, decay, omega, skip, state, begins, T: int, has_output=True
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """The scan of what `DiscreteSSD.read` returns -> y (B, L, H), None without has_output; the final state (B, H, N).

    v (B, L, H), b and c (B, L, N); dt (E,) or (B, L, E), decay (E,), omega (E, N/2): float64; skip (H,), D. state:
    (B, H, N) or None for zero. begins: (B, L) bool, tokens before which the state becomes zero, or None.
    """
    L = v.shape[1]
    whole = L // T * T
    ys = []
    for part, size in ((slice(whole), T), (slice(whole, L), L - whole)):  # what is left is a chunk of its own length
        vectors = [x[:, part] for x in (v, b, c)]
        if vectors[0].shape[1] == 0:
            continue
        step = dt if dt.dim() == 1 else dt[:, part]
        first = None if begins is None else begins[:, part]
        y, state = _scan_whole_chunks(*vectors, step, decay, omega, state, first, size, has_output)
        ys.append(y)
    if not has_output:
        return None, state
    return torch.addcmul(torch.cat(ys, 1) if len(ys) > 1 else ys[0], v, skip), state


def since_start_of_chunks(dt, decay, omega, L: int, T: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Angles, decays and steps of a kernel's chunks of T <= L tokens, since each one's start, in float64, for many
    turns are to keep their digits: (E, T, N/2), (E, T), (E, T); of steps (B, L, E) with (B, chunks) before, the last
    chunk filled with 0.
    """
    if dt.dim() == 1:
        dt = dt[:, None].expand(-1, T)
    else:
        chunks = -(-L // T)
        dt = F.pad(dt, (0, 0, 0, chunks * T - L)).view(len(dt), chunks, T, -1).transpose(2, 3)
    since_start = dt.cumsum(-1)
    return since_start[..., None] * omega[:, None], since_start * decay[:, None], dt


def scan_by(run, v, b, c, dt, decay, omega, skip, state, begins, T, has_output=True, makes_turns=False):
    """`scan_vectors` by a kernel. run: takes what `run_forward` of triton_ssd_scan.py does, and returns y and the final
    state first. makes_turns: where steps are constant it takes omega, decay and dt as they are.
    """
    T = min(T, v.shape[1])
    as_they_are = makes_turns and dt.dim() == 1
    system = (omega, decay, dt) if as_they_are else since_start_of_chunks(dt, decay, omega, v.shape[1], T)
    inputs = v, b, c, *system, skip, state
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    y, final, *_ = run(*inputs, begins, T, has_output, save)
    return y if has_output else None, final


def turns_of_chunks(angle, decay, step) -> tuple[torch.Tensor, ...]:
    """What a kernel reads, of `since_start_of_chunks` in float32: cosines, sines, decays, steps."""
    return tuple(x.float().contiguous() for x in (angle.cos(), angle.sin(), decay, step))


def heads_of(step) -> int:
    """Of what `scan_by` gives to a kernel that makes turns: steps (E,), or those of chunks (B, chunks, E, T)."""
    return step.shape[0 if step.dim() == 1 else -2]


def numbers_of_documents(begins, T: int) -> torch.Tensor | None:
    """The number of each token's document in its chunk of T, (B, chunks, T), where 0 goes on from the one before; None
    without begins (B, L).
    """
    if begins is None:
        return None
    whole = F.pad(begins, (0, -begins.shape[1] % T)).view(len(begins), -1, T)
    return whole.cumsum(-1, dtype=torch.int32)


def sum_up_gradients(of_heads, of_operators, of_skip, is_shared: bool) -> tuple[torch.Tensor, ...]:
    """The gradients of b, c, angles, decays, steps and D, of what a kernel's backward writes in float32:

    of_heads (2, B, L, E, N), those of b and c by head, which may be in the dtype of the tokens; of_operators
    (B, chunks, E, T, N/2), or (B, chunks, E, N/2), and twice (B, chunks, E, T); of_skip (B, chunks, E, P). is_shared:
    steps are those of all rows and chunks, and so are these of the results.
    """
    if is_shared:
        of_operators = (x.sum((0, 1), dtype=torch.float64) for x in of_operators)
    return *(part.sum(2, dtype=torch.float32) for part in of_heads), *of_operators, of_skip.sum((0, 1)).view(-1)


def _scan_whole_chunks(v, b, c, dt, rate, omega, state, begins, T, has_output):
    B, L, _ = v.shape
    E, N, dtype = dt.shape[-1], b.shape[-1], v.dtype
    P = v.shape[-1] // E
    v = v.reshape(B, -1, T, E, P).transpose(2, 3)  # (B, K, E, T, P)
    b, c = (part.reshape(B, -1, 1, T, N) for part in (b, c))
    # dt (E,) is that of every token and chunk: (1, 1, E, T); or (B, L, E)
    dt = dt[:, None].expand(E, T)[None, None] if dt.dim() == 1 else dt.reshape(B, -1, T, E).transpose(2, 3)
    since_start = dt.cumsum(-1)
    angle = since_start[..., None] * omega[:, None]  # float64: many turns, of which the rest must keep its digits
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)  # (1 or B, 1 or K, E, T, N / 2)
    turn_back = torch.cat([cos, -sin], -1)
    b, c = apply_diagonal(turn_back, b), apply_diagonal(turn_back, c) if has_output else None  # (B, K, E, T, N)
    decay = (since_start * rate[:, None]).to(dtype)
    dt = dt.to(dtype)

    together, from_start, to_end, keeps = _reach(begins, B, T, v.device)
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
    number = begins.reshape(B, -1, 1, T).cumsum(-1)  # of the document, in its chunk; 0 goes on from the one before
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
