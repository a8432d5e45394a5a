"""S4D: diagonal state matrices.

    x' = A x + B u,   y = 2 Re(C x) + D u          A = diag(Lambda)

Source: Gu, Gupta, Goel, Re, "On the Parameterization and Initialization of Diagonal State Space Models" (2022).
"""

import torch

from .discrete import DiscreteDiagonal
from .ops import diagonal_operators, diagonal_steps, diagonal_system, vandermonde
from .real_form import powers
from .siso import SingleInputSingleOutput


class S4D(SingleInputSingleOutput):
    """S4D: A = diag(Lambda), zero-order hold or bilinear."""

    name = "s4d"
    fft_is_faster_below = 2048

    def discretize(self, reverse=False) -> DiscreteDiagonal:
        return diagonal_steps(*self._parameters_of(reverse), self.discretization, setting=self.kernels)

    def _parameters_of(self, reverse: bool) -> tuple[torch.Tensor, ...]:
        return self.log_dt, self.Lambda_log_re, self.Lambda_im, self.B, self._C(reverse)

    def _system(self, reverse):
        """The first four of `discretize`, without what a step alone needs; of a subclass, what its own says."""
        if type(self).discretize is S4D.discretize:
            return diagonal_system(*self._parameters_of(reverse), self.discretization, setting=self.kernels)
        return self.discretize(reverse)[:4]

    def transition(self, length):
        """(H, N)"""
        log_re, log_im, *_ = self._system(False)
        exponent = torch.tensor(length, device=log_re.device)
        return torch.cat(powers(log_re, log_im, exponent), -1).to(self.log_dt.dtype)

    def _operators(self, system, length, skip):
        return diagonal_operators(system, length, skip, setting=self.kernels)

    def kernel(self, length: int, reverse: bool = False) -> torch.Tensor:
        log_re, log_im, *CB = self._system(reverse)
        return vandermonde(*CB, log_re, log_im, length, self.kernels)
