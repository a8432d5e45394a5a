"""The discretisation of diagonal state matrices in plain PyTorch: the twin of triton_diagonal_discretization.py.

    x' = Lambda x + B u      ->      x_t = Lambda_bar x_{t-1} + B_bar u_t

Source: Gu, Gupta, Goel, Re, "On the Parameterization and Initialization of Diagonal State Space Models" (2022).
"""

import torch

from .discrete import per_channel
from .real_form import complex_product


def discretize_diagonal(method: str, dt: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> tuple[tuple, tuple]:
    """(log Lambda_bar, B_bar / B), a pair (re, im) each, for dt Lambda = a + i b.

    zoh:       Lambda_bar = exp(dt Lambda),                           B_bar = (Lambda_bar - 1) / Lambda B
    bilinear:  Lambda_bar = (1 + dt Lambda/2) / (1 - dt Lambda/2),    B_bar = dt / (1 - dt Lambda/2) B

    All in float64: the angle dt Im(Lambda) is many turns, and what is left of it after them must keep its digits.
    """
    if method == "zoh":
        log = (a, b)
        # (exp(z) - 1) / Lambda with z = a + i b, free of cancellation for small z:
        # exp(z) - 1 = expm1(a) cos b + (cos b - 1) + i exp(a) sin b, and cos b - 1 = -2 sin^2(b/2)
        numerator = (torch.expm1(a) * torch.cos(b) - 2 * torch.sin(b / 2) ** 2, torch.exp(a) * torch.sin(b))
        denominator = (a / dt, b / dt)
    else:
        plus, minus = 1 + a / 2, 1 - a / 2
        # at a = -2, b = 0 Lambda_bar is zero; the floor stands for its logarithm
        modulus = (plus**2 + (b / 2) ** 2).clamp(min=1e-300) / (minus**2 + (b / 2) ** 2)
        log = (0.5 * modulus.log(), torch.atan2(b / 2, plus) + torch.atan2(b / 2, minus))
        numerator, denominator = (dt, torch.zeros_like(b)), (minus, -b / 2)
    scale = 1 / (denominator[0] ** 2 + denominator[1] ** 2)
    return log, complex_product(numerator, (denominator[0] * scale, -denominator[1] * scale))


def diagonal_system(
    log_dt: torch.Tensor,
    Lambda_log_re: torch.Tensor,
    Lambda_im: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    method: str = "zoh",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The first four of a `DiscreteDiagonal` (H, N/2) of the parameters of S4D: log Lambda_bar as (re, im), float64,
    and C B_bar as (re, im), in the dtype of the parameters. S systems, channel h takes system h mod S.

    log_dt: (H,). Lambda_log_re, Lambda_im: (S, N/2). B: (S, N). C: (H, N).
    """
    H, dt = len(log_dt), log_dt.double().exp()[:, None]
    a = -dt * per_channel(Lambda_log_re.double().exp(), H)
    b = dt * per_channel(Lambda_im.double(), H)
    log, factor = discretize_diagonal(method, dt, a, b)
    B_bar = complex_product(factor, per_channel(B.double(), H).chunk(2, -1))
    CB_re, CB_im = (part.to(log_dt.dtype) for part in complex_product(C.double().chunk(2, -1), B_bar))
    return *log, CB_re, CB_im
