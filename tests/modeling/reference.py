"""Independent state spaces: dense complex matrices of the full order N, scipy-free linear solves, a loop over time."""

import torch


def full_system(layer):
    """A (H, N, N), B (H, N), C (H, N), D, dt as complex128, both halves of every conjugate pair written out."""
    H, N = layer.hidden_size, layer.state_size
    half = N // 2

    def complex_of(real_form):
        return torch.complex(real_form[..., :half].double(), real_form[..., half:].double())

    def both(z):
        return torch.cat([z, z.conj()], -1)

    copies = [h % layer.n_ssm for h in range(H)]
    Lambda = both(torch.complex(-layer.Lambda_log_re.double().exp(), layer.Lambda_im.double()))[copies]
    A = torch.diag_embed(Lambda)
    if hasattr(layer, "P"):
        for P in both(complex_of(layer.P)):
            A = A - P[copies][:, :, None] * P[copies].conj()[:, None, :]
    B = both(complex_of(layer.B))[copies]
    C = both(complex_of(layer.C))
    return A, B, C, layer.D.double(), layer.log_dt.double().exp()


def discretized(layer):
    """A_bar (H, N, N), B_bar (H, N), by a linear solve (bilinear) or by the matrix exponential (zero-order hold)."""
    A, B, C, D, dt = full_system(layer)
    identity = torch.eye(A.shape[-1], dtype=A.dtype)
    step = dt[:, None, None].to(A.dtype)
    if layer.discretization == "bilinear":
        left = identity - step / 2 * A
        return torch.linalg.solve(left, identity + step / 2 * A), torch.linalg.solve(left, dt[:, None] * B), C, D
    # exp of [[A, B], [0, 0]] dt holds both A_bar and B_bar
    block = torch.zeros(*A.shape[:-2], A.shape[-1] + 1, A.shape[-1] + 1, dtype=A.dtype)
    block[..., :-1, :-1], block[..., :-1, -1] = A, B
    block = torch.matrix_exp(block * step)
    return block[..., :-1, :-1], block[..., :-1, -1], C, D


def mimo_discretized(layer):
    """S5: A_bar (P, P), B_bar (P, H), C (H, P), D, with a step per state on the diagonal of a matrix."""
    half = layer.state_size // 2

    def complex_of(real_form):
        return torch.complex(real_form[..., :half].double(), real_form[..., half:].double())

    def both(z):
        return torch.cat([z, z.conj()], -1)

    Lambda = both(torch.complex(-layer.Lambda_log_re.double().exp(), layer.Lambda_im.double()))
    step = layer.log_dt.double().exp().repeat(2)
    A, B = torch.diag(step * Lambda), step[:, None] * both(complex_of(layer.B)).T
    P, H = B.shape
    identity = torch.eye(P, dtype=A.dtype)
    if layer.discretization == "bilinear":
        A_bar, B_bar = torch.linalg.solve(identity - A / 2, identity + A / 2), torch.linalg.solve(identity - A / 2, B)
    else:
        block = torch.zeros(P + H, P + H, dtype=A.dtype)
        block[:P, :P], block[:P, P:] = A, B
        block = torch.matrix_exp(block)
        A_bar, B_bar = block[:P, :P], block[:P, P:]
    return A_bar, B_bar, both(complex_of(layer.C)), layer.D.double()


def mimo_run(layer, u, initial_state=None):
    A_bar, B_bar, C, D = mimo_discretized(layer)
    x = torch.zeros(len(u), len(A_bar), dtype=A_bar.dtype) if initial_state is None else initial_state
    outputs, states = [], []
    for u_t in u.double().unbind(1):
        x = x @ A_bar.T + u_t.to(A_bar.dtype) @ B_bar.T
        outputs.append((x @ C.T).real + D * u_t)
        states.append(x)
    return torch.stack(outputs, 1), torch.stack(states, 1)


def bidirectional_run(layer, u):
    """The same system once more from the end, with C_reverse and without D."""
    forward, _ = run(layer, u)
    C, D = layer.C.data.clone(), layer.D.data.clone()
    layer.C.data, layer.D.data = layer.C_reverse.data.clone(), torch.zeros_like(D)
    backward, _ = run(layer, u.flip(1))
    layer.C.data, layer.D.data = C, D
    return forward + backward.flip(1)


def run(layer, u, initial_state=None):
    """y (B, L, H) and the complex states after every token (B, L, H, N), by the recurrence alone, in complex128."""
    if layer.name == "s5":
        return mimo_run(layer, u, initial_state)
    A_bar, B_bar, C, D = discretized(layer)
    x = torch.zeros(u.shape[0], *B_bar.shape, dtype=A_bar.dtype) if initial_state is None else initial_state
    outputs, states = [], []
    for u_t in u.double().unbind(1):
        x = torch.einsum("hij,bhj->bhi", A_bar, x) + B_bar * u_t[..., None]
        outputs.append(torch.einsum("hi,bhi->bh", C, x).real + D * u_t)
        states.append(x)
    return torch.stack(outputs, 1), torch.stack(states, 1)


def complex_state(layer, state):
    """The layer's real state, (B, H, N) or for S5 (B, 1, N), as the full complex one of `run`."""
    half = layer.state_size // 2
    x = torch.complex(state[..., :half], state[..., half:])
    x = torch.cat([x, x.conj()], -1)
    if layer.name == "s5":
        return x[:, 0]
    if hasattr(layer, "P"):
        return x
    return x * discretized(layer)[1]  # S4D drives its state by u and keeps B_bar in C
