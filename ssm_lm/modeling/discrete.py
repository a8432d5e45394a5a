"""The discrete systems that the layers come down to, and one token of each in plain PyTorch.

Every class holds what a layer derives from its parameters for single steps, all in real form:

    step(u, state)     y (B, H) without D u, and the next state. It is what runs on a CPU and wherever a gradient is
                       needed, and what the kernels of triton_step.py are checked against
    coefficients()     the same system as those kernels read it

Shapes: B batch, H channels, N states a channel; S5 has P states for all channels.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .real_form import apply_diagonal, powers

NORM_EPSILON = 1e-5  # of the norm of an SSD's b and c


def norm_vectors(x, b_scale, b_bias, c_scale, c_bias) -> tuple[torch.Tensor, torch.Tensor]:
    """What an SSD makes of x (..., 2N), [b | c]: rms_norm(b) scale + bias, and c alike, (..., N) each, in the dtype of
    the parameters (N,); x may be bfloat16. The twin of triton_ssd_system.py.
    """
    b, c = x.to(b_scale.dtype).chunk(2, -1)
    return (
        F.rms_norm(b, b_scale.shape, b_scale, NORM_EPSILON) + b_bias,
        F.rms_norm(c, c_scale.shape, c_scale, NORM_EPSILON) + c_bias,
    )


def per_channel(shared: torch.Tensor, channels: int) -> torch.Tensor:
    """(..., n_ssm, k) -> (..., channels, k): channel h takes copy h mod n_ssm."""
    n_ssm = shared.shape[-2]
    if n_ssm == channels:
        return shared
    if n_ssm == 1:
        return shared.expand(*shared.shape[:-2], channels, -1)
    return shared.repeat(*[1] * (shared.dim() - 2), channels // n_ssm, 1)


def step_of_token(raw: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """The step that a token's raw number chooses: softplus(raw + softplus^-1(dt)), float64."""
    return F.softplus(raw.double() + inverse)


class DiscreteDPLR(NamedTuple):
    """S4. The bilinear transform of a diagonal plus low-rank system is one again:

        h_t = (R(E) - F G^T) h_{t-1} + B_bar u_t,   y_t = C_row h_t      R(E): complex product by E, in real form

    E (H, N), B_bar (H, N), C_row (H, N), F and G (H, N, rank). A state is (B, H, N).
    """

    E: torch.Tensor
    F: torch.Tensor
    G: torch.Tensor
    B_bar: torch.Tensor
    C_row: torch.Tensor

    def step(self, u: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        low_rank = torch.einsum("hnr,bhr->bhn", self.F, torch.einsum("hnr,bhn->bhr", self.G, state))
        state = apply_diagonal(self.E, state) - low_rank + self.B_bar * u[..., None]
        return (state * self.C_row).sum(-1), state

    def coefficients(self) -> tuple[torch.Tensor, ...]:
        """[E, C_row, B_bar, F_1, G_1, ...], (3 + 2 rank, H, N)."""
        pairs = [x[..., r] for r in range(self.F.shape[-1]) for x in (self.F, self.G)]
        return (torch.stack([self.E, self.C_row, self.B_bar, *pairs]),)


class DiscreteDiagonal(NamedTuple):
    """S4D. x_t = Lambda_bar x_{t-1} + u_t,  y_t = 2 Re(CB x_t): B_bar is folded into C, so that u drives the state.

    log_re, log_im: log Lambda_bar, float64; CB_re, CB_im: C B_bar. All (H, N/2).
    Lambda_bar, row: the same as real vectors (H, N) for one step. A state is (B, H, N).
    """

    log_re: torch.Tensor
    log_im: torch.Tensor
    CB_re: torch.Tensor
    CB_im: torch.Tensor
    Lambda_bar: torch.Tensor
    row: torch.Tensor

    def step(self, u: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        state = apply_diagonal(self.Lambda_bar, state)
        half = state.shape[-1] // 2
        state = torch.cat([state[..., :half] + u[..., None], state[..., half:]], -1)
        return (state * self.row).sum(-1), state

    def coefficients(self) -> tuple[torch.Tensor, ...]:
        """[Lambda_bar, row], (2, H, N)."""
        return (torch.stack([self.Lambda_bar, self.row]),)


class DiscreteMIMO(NamedTuple):
    """S5. x_t = Lambda_bar x_{t-1} + u_t B_bar,  y_t = x_t C_row.

    log_re, log_im: log Lambda_bar, float64, (P/2,). Lambda_bar (P,), B_bar (H, P), C_row (P, H). A state is (B, 1, P).
    """

    log_re: torch.Tensor
    log_im: torch.Tensor
    Lambda_bar: torch.Tensor
    B_bar: torch.Tensor
    C_row: torch.Tensor

    def step(self, u: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        state = apply_diagonal(self.Lambda_bar, state) + (u @ self.B_bar)[:, None]
        return state[:, 0] @ self.C_row, state

    def coefficients(self) -> tuple[torch.Tensor, ...]:
        """Lambda_bar (P,), what drives (P, H), what reads (H, P)."""
        return self.Lambda_bar, self.B_bar.T.contiguous(), self.C_row.T.contiguous()


class DiscreteSSD(NamedTuple):
    """SSD. S_t = a_t R(dt_t omega) S_(t-1) + dt_t b_t v_t^T,  y_t = S_t^T c_t; see ssd.py.

    dt, decay (E,) and omega (E, N/2): float64, a head's step, rate and frequencies. scale, bias: (2, N), of b and c.
    inverse: softplus^-1(dt) (E,), to which the token's raw step is added; None: dt is that of every token, and
    Lambda_bar (E, N) the transition over it. A state is (B, H, N), channel after channel of the heads.
    """

    dt: torch.Tensor
    decay: torch.Tensor
    omega: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor
    inverse: torch.Tensor | None
    Lambda_bar: torch.Tensor | None

    def read(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """x (..., H + 2N (+ E)) -> v (..., H), b and c (..., N), dt float64, (E,) or (..., E). v and what b and c are
        made of may be bfloat16; b and c are in the dtype of the parameters.
        """
        N, raw = self.scale.shape[-1], 0 if self.inverse is None else len(self.dt)
        v, vectors, raw = x.split([x.shape[-1] - 2 * N - raw, 2 * N, raw], -1)
        b, c = norm_vectors(vectors, self.scale[0], self.bias[0], self.scale[1], self.bias[1])
        return v, b, c, self.dt if self.inverse is None else step_of_token(raw, self.inverse)

    def over(self, dt: torch.Tensor) -> torch.Tensor:
        """The transition over times dt (..., E), float64: (..., E, N)."""
        return torch.cat(powers(-self.decay[:, None], self.omega, dt[..., None]), -1)

    def step(self, u: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        v, b, c, dt = self.read(u)
        transition = self.over(dt).to(u.dtype) if self.Lambda_bar is None else self.Lambda_bar
        heads = state.unflatten(1, (len(self.dt), -1))  # (B, E, P, N)
        drive = v.unflatten(1, heads.shape[1:3]) * dt.to(u.dtype)[..., None]
        heads = apply_diagonal(transition[..., None, :], heads) + drive[..., None] * b[:, None, None]
        return (heads @ c[:, None, :, None]).flatten(1), heads.flatten(1, 2)

    def coefficients(self) -> tuple[torch.Tensor, ...]:
        """Float32: Lambda_bar (E, N) and dt (E,), or with steps of the tokens' own the rates [-decay | omega] and
        softplus^-1(dt); the scales of b and c, then their biases (4, N).
        """
        norms = torch.cat([self.scale, self.bias]).float()
        if self.inverse is None:
            return self.Lambda_bar.float(), self.dt.float(), norms
        rates = torch.cat([-self.decay[:, None].expand_as(self.omega), self.omega], -1)
        return rates.float(), self.inverse.float(), norms

    def in_double(self) -> "DiscreteSSD":
        """The same system, for a twin in float64."""
        return DiscreteSSD(*(part if part is None else part.double() for part in self))


Discrete = DiscreteDPLR | DiscreteDiagonal | DiscreteMIMO | DiscreteSSD
