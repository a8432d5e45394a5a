"""S4D: diagonal state matrices.

    x' = A x + B u,   y = 2 Re(C x) + D u          A = diag(Lambda)

Source: Gu, Gupta, Goel, Re, "On the Parameterization and Initialization of Diagonal State Space Models" (2022).
"""

import torch

from .chunked import ChunkOperators
from .discrete import DiscreteDiagonal
from .ops import diagonal_operators, vandermonde
from .real_form import complex_product, powers
from .siso import SingleInputSingleOutput


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


class S4D(SingleInputSingleOutput):
    """S4D: A = diag(Lambda), zero-order hold or bilinear."""

    name = "s4d"
    fft_is_faster_below = 2048

    def discretize(self, reverse=False) -> DiscreteDiagonal:
        """In float64, see `discretize_diagonal`."""
        dtype = self.log_dt.dtype
        dt = self.log_dt.double().exp()[:, None]
        a = -dt * self._per_channel(self.Lambda_log_re.double().exp())
        b = dt * self._per_channel(self.Lambda_im.double())
        log, factor = discretize_diagonal(self.discretization, dt, a, b)
        B_bar = complex_product(factor, self._per_channel(self.B.double()).chunk(2, -1))
        CB = [part.to(dtype) for part in complex_product(self._C(reverse).double().chunk(2, -1), B_bar)]
        Lambda_bar = torch.cat(powers(*log, torch.ones((), device=dt.device)), -1).to(dtype)
        return DiscreteDiagonal(*log, *CB, Lambda_bar, 2 * torch.cat([CB[0], -CB[1]], -1))

    def transition(self, length):
        """(H, N)"""
        discrete = self.discretize()
        exponent = torch.tensor(length, device=discrete.log_re.device)
        return torch.cat(powers(discrete.log_re, discrete.log_im, exponent), -1).to(self.log_dt.dtype)

    def operators(self, length: int, reverse: bool = False) -> ChunkOperators:
        return diagonal_operators(self.discretize(reverse), length, setting=self.kernels)

    def kernel(self, length: int, reverse: bool = False) -> torch.Tensor:
        discrete = self.discretize(reverse)
        return vandermonde(discrete.CB_re, discrete.CB_im, discrete.log_re, discrete.log_im, length, self.kernels)
