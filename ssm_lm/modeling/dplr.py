"""S4: diagonal plus low-rank state matrices, discretised by the bilinear transform.

    x' = A x + B u,   y = 2 Re(C x) + D u          A = diag(Lambda) - P P^*

The discrete A_bar is diagonal plus low rank again, and everything here follows from that: a step in O(N), and
the kernel of a whole sequence by Cauchy products.

Source: Gu, Goel, Re, "Efficiently Modeling Long Sequences with Structured State Spaces" (2022).
"""

import torch

from .discrete import DiscreteDPLR
from .dplr_discretization import small_inverse
from .dplr_operators import for_powers
from .hippo import INITIALIZATIONS
from .ops import cauchy_products, dplr_discretization, dplr_operators
from .real_form import real_form
from .siso import SingleInputSingleOutput


class S4(SingleInputSingleOutput):
    """S4: A = diag(Lambda) - P P^*, bilinear. P = Q and Re Lambda < 0 by construction, so that A + A^* < 0 and the
    discrete system is stable whatever training does (Goel et al., "It's Raw!", 2022).
    """

    name = "s4"
    has_dense_carry = True

    @property
    def rank(self) -> int:
        return len(INITIALIZATIONS[self.name][self.init](2).P)

    def _further_shapes(self):
        return {"P": (self.rank, self.n_ssm, self.state_size)}

    def initial_values(self):
        P = torch.from_numpy(INITIALIZATIONS[self.name][self.init](self.state_size).P)
        return super().initial_values() | {"P": real_form(P)[:, None].expand(-1, self.n_ssm, -1)}

    def discretize(self, reverse=False) -> DiscreteDPLR:
        """See `bilinear_dplr`."""
        parameters = self.log_dt, self.Lambda_log_re, self.Lambda_im, self.P, self.B, self._C(reverse)
        return dplr_discretization(*parameters, setting=self.kernels)

    def transition(self, length):
        """(H, N, N), from the binary digits of the length, which is at least 1."""
        square, product = for_powers(self.discretize())[0], None
        while length:
            if length & 1:
                product = square if product is None else square @ product
            length >>= 1
            if length:
                square = square @ square
        return product.to(self.log_dt.dtype)

    def carry_over(self, transition, state):
        return torch.einsum("hnm,bhm->bhn", transition, state)

    def _operators(self, system, length, skip):
        return dplr_operators(system, length, skip, setting=self.kernels)

    def kernel(self, length: int, reverse: bool = False) -> torch.Tensor:
        """K (H, L) by the Cauchy kernel: the truncated generating function of the taps at the L-th roots of unity.

        At z = exp(-2 pi i k / L):  2/(1+z) = 1 + i t  and  2 (1-z)/(1+z) = 2 i t  with  t = tan(pi k / L), so
            K^(z) = (1 + i t) C~ (2 i t - dt A)^-1 dt B,    C~ = C (I - A_bar^L)
        and Woodbury turns the inverse into Cauchy products. t is computed in float64 (powers of a float32 root of
        unity lose two digits at L = 8192); at Nyquist, where t is infinite, K^ = dt C~ B / 2.
        """
        dt = self.log_dt.exp()
        C_tilde = self._truncated_C(length, reverse)
        C_re, C_im = C_tilde[..., : self.state_size // 2] / 2, -C_tilde[..., self.state_size // 2 :] / 2
        k = torch.arange((length + 1) // 2, device=dt.device)  # without Nyquist
        t = torch.tan(torch.pi * k.double() / length).to(dt.dtype)
        # rows [C~; P^*] times columns [B, P]
        r = cauchy_products(
            torch.cat([C_re, C_im], -1),
            self.B,
            self.P,
            -self.Lambda_log_re.exp(),
            self.Lambda_im,
            dt,
            2 * t,
            setting=self.kernels,
        )
        dt = dt[:, None]
        r00, r01, r10, r11 = r[:, 0, 0], r[:, 0, 1:], r[:, 1:, 0], r[:, 1:, 1:]
        if self.rank == 1:
            correction = dt * (r01 * r10)[:, 0] / (1 + dt * r11[:, 0, 0])
        else:
            eye = torch.eye(self.rank, dtype=r.dtype, device=r.device)
            M = small_inverse(eye + dt[..., None, None] * r11.permute(0, 3, 1, 2))
            correction = dt * torch.einsum("hrl,hlrs,hsl->hl", r01, M, r10)
        spectrum = torch.complex(torch.ones_like(t), t) * dt * (r00 - correction)
        if length % 2 == 0:
            # sum over the conjugate pairs: 2 Re
            B_re, B_im = self._per_channel(self.B).chunk(2, -1)
            nyquist = dt * (C_re * B_re - C_im * B_im).sum(-1, keepdim=True)
            spectrum = torch.cat([spectrum, nyquist.to(spectrum.dtype)], -1)
        return torch.fft.irfft(spectrum, n=length)

    def _truncated_C(self, length: int, reverse: bool) -> torch.Tensor:
        """C (I - A_bar^L) as a row on the real state, (H, N): makes the generating function end after L taps."""
        power, _, C_row = for_powers(self.discretize(reverse))
        row, remaining = C_row[:, None], length
        while remaining:
            if remaining & 1:
                row = row @ power
            remaining >>= 1
            if remaining:
                power = power @ power
        return (C_row - row.squeeze(1)).to(self.log_dt.dtype)
