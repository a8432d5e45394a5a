"""S4: diagonal plus low-rank state matrices, discretised by the bilinear transform.

    x' = A x + B u,   y = 2 Re(C x) + D u          A = diag(Lambda) - P P^*

The discrete A_bar is diagonal plus low rank again, and everything here follows from that: a step in O(N), the
operators of a chunk without a squaring of dense matrices, and the kernel of a whole sequence by Cauchy products.

Source: Gu, Goel, Re, "Efficiently Modeling Long Sequences with Structured State Spaces" (2022).
"""

from typing import NamedTuple

import torch

from .hippo import INITIALIZATIONS
from .ops import ChunkOperators, apply_diagonal, cauchy
from .state_space import SingleInputSingleOutput, complex_product, real_form


class DiscreteDPLR(NamedTuple):
    """The bilinear transform of a diagonal plus low-rank system is one again:

        h_t = (R(E) - F G^T) h_{t-1} + B_bar u_t,   y_t = C_row h_t      R(E): complex product by E, in real form

    E (H, N), B_bar (H, N), C_row (H, N), F and G (H, N, rank).
    """

    E: torch.Tensor
    F: torch.Tensor
    G: torch.Tensor
    B_bar: torch.Tensor
    C_row: torch.Tensor


class S4(SingleInputSingleOutput):
    """S4: A = diag(Lambda) - P P^*, bilinear. P = Q and Re Lambda < 0 by construction, so that A + A^* < 0 and the
    discrete system is stable whatever training does (Goel et al., "It's Raw!", 2022).
    """

    name = "s4"

    @property
    def rank(self) -> int:
        return len(INITIALIZATIONS[self.name][self.init](2).P)

    def _further_shapes(self):
        return {"P": (self.rank, self.n_ssm, self.state_size)}

    def initial_values(self):
        P = torch.from_numpy(INITIALIZATIONS[self.name][self.init](self.state_size).P)
        return super().initial_values() | {"P": real_form(P)[:, None].expand(-1, self.n_ssm, -1)}

    def _dt_Lambda(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """dt (H, 1), and Re and Im of dt Lambda, (H, N/2) each."""
        dt = self.log_dt.exp()[:, None]
        return dt, -dt * self._per_channel(self.Lambda_log_re.exp()), dt * self._per_channel(self.Lambda_im)

    def _C_row(self, reverse: bool) -> torch.Tensor:
        """C as a row on the real state: y = 2 Re(C x) = [2 Re C | -2 Im C] . [Re x | Im x]. (H, N)"""
        C_re, C_im = self._C(reverse).chunk(2, -1)
        return 2 * torch.cat([C_re, -C_im], -1)

    def discretize(self, reverse=False) -> DiscreteDPLR:
        """A_bar = (I - dt/2 A)^-1 (I + dt/2 A) and B_bar = (I - dt/2 A)^-1 dt B by the Woodbury identity, O(N).

        In real form A = R(Lambda) - 2 p p^T with p = [Re P | Im P]. With w = 1 / (1 - dt Lambda / 2),
            (I - dt/2 A)^-1 = R(w) - dt (w P) M (P conj w)^T,   M = (I + dt p^T R(w) p)^-1
        and A_bar = 2 (I - dt/2 A)^-1 - I.
        """
        dt, a, b = self._dt_Lambda()
        scale = 1 / ((1 - a / 2) ** 2 + (b / 2) ** 2)
        w = ((1 - a / 2) * scale, (b / 2) * scale)
        P = self._per_channel(self.P).chunk(2, -1)  # (rank, H, N/2) each
        B = self._per_channel(self.B).chunk(2, -1)
        wP = torch.cat(complex_product(w, P), -1)
        wB = torch.cat(complex_product(w, B), -1)
        G = torch.cat(complex_product((w[0], -w[1]), P), -1).permute(1, 2, 0)  # (H, N, rank)
        p = torch.cat(P, -1)
        capacitance = torch.einsum("rhn,shn->hrs", p, wP) * dt[..., None]
        capacitance = capacitance + torch.eye(self.rank, dtype=dt.dtype, device=dt.device)
        M = small_inverse(capacitance)
        wPM = dt[..., None] * torch.einsum("rhn,hrs->hns", wP, M)  # (H, N, rank)
        B_bar = dt * (wB - torch.einsum("hnr,rhm,hm->hn", wPM, p, wB))
        E = torch.cat([2 * w[0] - 1, 2 * w[1]], -1)
        return DiscreteDPLR(E, 2 * wPM, G, B_bar, self._C_row(reverse))

    def _advance(self, discrete, u, state):
        E, F, G, B_bar, C_row = discrete
        low_rank = torch.einsum("hnr,bhr->bhn", F, torch.einsum("hnr,bhn->bhr", G, state))
        state = apply_diagonal(E, state) - low_rank + B_bar * u[..., None]
        return (state * C_row).sum(-1), state

    @staticmethod
    def _rotation(diagonal: torch.Tensor) -> torch.Tensor:
        """R(diagonal): (H, N) -> (H, N, N)."""
        re, im = (torch.diag_embed(part) for part in diagonal.chunk(2, -1))
        return torch.cat([torch.cat([re, -im], -1), torch.cat([im, re], -1)], -2)

    def _dense(self, discrete: DiscreteDPLR) -> torch.Tensor:
        """A_bar, (H, N, N)."""
        return self._rotation(discrete.E) - discrete.F @ discrete.G.transpose(1, 2)

    def operators(self, length: int, reverse: bool = False) -> ChunkOperators:
        """Krylov columns A^j B and rows C A^(j+1) by doubling, without a product of two dense (N, N) matrices.

        With A = R(E) - F G^T, a power of A is diagonal plus low rank too, of rank r m,
            A^m = R(E^m) - [F, A F, ..., A^(m-1) F] [R(E)^(m-1)^T G, ..., R(E)^T G, G]^T
        so A^m is applied to m columns in O(N r m^2), and only A^length is written out, by one matmul.
        """
        discrete = self.discretize(reverse)
        E, F, G = discrete.E, discrete.F, discrete.G
        H, N, rank = F.shape
        half = N // 2
        conjugate = torch.cat([E[:, :half], -E[:, half:]], -1)  # R(E)^T = R(conj E)

        def turned(diagonal, columns):
            """R(diagonal) columns, with columns (H, N, ...)."""
            columns = columns.flatten(2)
            dr, di = diagonal[..., None].chunk(2, 1)
            cr, ci = columns.chunk(2, 1)
            return torch.cat([dr * cr - di * ci, torch.addcmul(dr * ci, di, cr)], 1)

        m = 1
        power, power_t = E, conjugate  # E^m and its conjugate
        columns = torch.cat([discrete.B_bar[..., None], F], -1)[..., None]  # A^j [B, F], j < m: (H, N, 1 + r, m)
        low = G[..., None].transpose(2, 3)  # R(E)^(m-1-j)^T G: (H, N, m, r)
        rows = apply_diagonal(conjugate, discrete.C_row)[:, None] - (discrete.C_row[:, None] @ F) @ G.transpose(1, 2)
        while m < length:
            more = min(m, length - m)
            left = columns[:, :, 1:].transpose(2, 3).reshape(H, N, m * rank)  # A^j F, in the order of `low`
            right = low.reshape(H, N, m * rank)
            new = columns[..., :more].flatten(2)
            new = turned(power, new) - left @ (right.transpose(1, 2) @ new)
            columns = torch.cat([columns, new.view(H, N, 1 + rank, more)], -1)
            new = rows[:, :more]
            new = turned(power_t, new.transpose(1, 2)).transpose(1, 2) - (new @ left) @ right.transpose(1, 2)
            rows = torch.cat([rows, new], 1)
            # low holds R^(m-1) G .. G; the next one starts with R^(m+more-1) G .. R^m G
            low = torch.cat([turned(power_t, low[:, :, m - more :]).view(H, N, more, rank), low], 2)
            m += more
            power, power_t = apply_diagonal(power, power), apply_diagonal(power_t, power_t)
        left = columns[:, :, 1:].transpose(2, 3).reshape(H, N, length * rank)
        carry = self._rotation(diagonal_power(E, length)) - left @ low.reshape(H, N, length * rank).transpose(1, 2)
        columns = columns[:, :, 0]
        taps = (discrete.C_row[:, None] @ columns).squeeze(1)
        return ChunkOperators(taps, rows, columns.flip(-1), carry)

    def kernel(self, length: int, reverse: bool = False) -> torch.Tensor:
        """K (H, L) by the Cauchy kernel: the truncated generating function of the taps at the L-th roots of unity.

        At z = exp(-2 pi i k / L):  2/(1+z) = 1 + i t  and  2 (1-z)/(1+z) = 2 i t  with  t = tan(pi k / L), so
            K^(z) = (1 + i t) C~ (2 i t - dt A)^-1 dt B,    C~ = C (I - A_bar^L)
        and Woodbury turns the inverse into Cauchy products. t is computed in float64 (powers of a float32 root of
        unity lose two digits at L = 8192); at Nyquist, where t is infinite, K^ = dt C~ B / 2.
        """
        dt, a, b = self._dt_Lambda()
        C_tilde = self._truncated_C(length, reverse)
        C = (C_tilde[..., : self.state_size // 2] / 2, -C_tilde[..., self.state_size // 2 :] / 2)
        B = self._per_channel(self.B).chunk(2, -1)
        P = self._per_channel(self.P).chunk(2, -1)
        P_conj = (P[0], -P[1])

        # rows [C~; P^*] times columns [B, P]: (1 + rank)^2 Cauchy products at once
        left = [torch.cat([c[None], p]) for c, p in zip(C, P_conj, strict=True)]
        right = [torch.cat([c[None], p]) for c, p in zip(B, P, strict=True)]
        pairs = complex_product([x[:, None] for x in left], [x[None] for x in right])
        v_re, v_im = (x.flatten(0, 1).transpose(0, 1) for x in pairs)  # (H, (1+rank)^2, N/2)

        k = torch.arange((length + 1) // 2, device=dt.device)  # without Nyquist
        t = torch.tan(torch.pi * k.double() / length).to(dt.dtype)
        r = torch.complex(*cauchy(v_re, v_im, 2 * t, a, b))
        r = r.view(self.hidden_size, 1 + self.rank, 1 + self.rank, -1)
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
            nyquist = dt * (C[0] * B[0] - C[1] * B[1]).sum(-1, keepdim=True)
            spectrum = torch.cat([spectrum, nyquist.to(spectrum.dtype)], -1)
        return torch.fft.irfft(spectrum, n=length)

    def _truncated_C(self, length: int, reverse: bool) -> torch.Tensor:
        """C (I - A_bar^L) as a row on the real state, (H, N): makes the generating function end after L taps."""
        discrete = self.discretize(reverse)
        power, row = self._dense(discrete), discrete.C_row[:, None]
        remaining = length
        while remaining:
            if remaining & 1:
                row = row @ power
            remaining >>= 1
            if remaining:
                power = power @ power
        return discrete.C_row - row.squeeze(1)


def small_inverse(matrix: torch.Tensor) -> torch.Tensor:
    """The inverse of (..., r, r) for the ranks that occur, 1 and 2; in closed form, so without waiting for a device."""
    if matrix.shape[-1] == 1:
        return 1 / matrix
    a, b, c, d = (matrix[..., i, j] for i in (0, 1) for j in (0, 1))
    adjugate = torch.stack([torch.stack([d, -b], -1), torch.stack([-c, a], -1)], -2)
    return adjugate / (a * d - b * c)[..., None, None]


def diagonal_power(diagonal: torch.Tensor, exponent: int) -> torch.Tensor:
    """The elementwise power of a complex vector in real form, by the binary digits of the exponent, at least 1."""
    power = None
    while True:
        if exponent & 1:
            power = diagonal if power is None else apply_diagonal(diagonal, power)
        exponent >>= 1
        if not exponent:
            return power
        diagonal = apply_diagonal(diagonal, diagonal)
