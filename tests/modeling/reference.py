"""An independent S4: dense complex matrices of the full order N, scipy-free linear solves, and a loop over time."""

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


def run(layer, u, initial_state=None):
    """y (B, L, H) and the complex states after every token (B, L, H, N), by the recurrence alone, in complex128."""
    A_bar, B_bar, C, D = discretized(layer)
    x = torch.zeros(u.shape[0], *B_bar.shape, dtype=A_bar.dtype) if initial_state is None else initial_state
    outputs, states = [], []
    for u_t in u.double().unbind(1):
        x = torch.einsum("hij,bhj->bhi", A_bar, x) + B_bar * u_t[..., None]
        outputs.append(torch.einsum("hi,bhi->bh", C, x).real + D * u_t)
        states.append(x)
    return torch.stack(outputs, 1), torch.stack(states, 1)


def complex_state(layer, state):
    """The layer's real state (B, H, N) as the full complex one of `run`."""
    half = layer.state_size // 2
    x = torch.complex(state[..., :half], state[..., half:])
    x = torch.cat([x, x.conj()], -1)
    if hasattr(layer, "P"):
        return x
    return x * discretized(layer)[1]  # S4D drives its state by u and keeps B_bar in C
