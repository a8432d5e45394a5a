"""The bilinear transform of a diagonal plus low-rank system in plain PyTorch: the twin of
triton_dplr_discretization.py.

Shapes: H channels, S systems that they share, N order of the real system.
"""

import torch

from .discrete import DiscreteDPLR, per_channel
from .real_form import complex_product


def bilinear_dplr(
    log_dt: torch.Tensor,
    Lambda_log_re: torch.Tensor,
    Lambda_im: torch.Tensor,
    P: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
) -> DiscreteDPLR:
    """A_bar = (I - dt/2 A)^-1 (I + dt/2 A) and B_bar = (I - dt/2 A)^-1 dt B by the Woodbury identity, O(N).

    log_dt (H,), Lambda_log_re and Lambda_im (S, N/2), P (rank, S, N), B (S, N), C (H, N).

    In real form A = R(Lambda) - 2 p p^T with p = [Re P | Im P]. With w = 1 / (1 - dt Lambda / 2),
        (I - dt/2 A)^-1 = R(w) - dt (w P) M (P conj w)^T,   M = (I + dt p^T R(w) p)^-1
    and A_bar = 2 (I - dt/2 A)^-1 - I. C as a row: y = 2 Re(C x) = [2 Re C | -2 Im C] . [Re x | Im x].
    """
    H, rank = len(log_dt), len(P)
    dt = log_dt.exp()[:, None]
    a, b = -dt * per_channel(Lambda_log_re.exp(), H), dt * per_channel(Lambda_im, H)
    scale = 1 / ((1 - a / 2) ** 2 + (b / 2) ** 2)
    w = ((1 - a / 2) * scale, (b / 2) * scale)
    P = per_channel(P, H).chunk(2, -1)  # (rank, H, N/2) each
    B = per_channel(B, H).chunk(2, -1)
    wP = torch.cat(complex_product(w, P), -1)
    wB = torch.cat(complex_product(w, B), -1)
    G = torch.cat(complex_product((w[0], -w[1]), P), -1).permute(1, 2, 0)  # (H, N, rank)
    p = torch.cat(P, -1)
    capacitance = torch.einsum("rhn,shn->hrs", p, wP) * dt[..., None]
    capacitance = capacitance + torch.eye(rank, dtype=dt.dtype, device=dt.device)
    M = small_inverse(capacitance)
    wPM = dt[..., None] * torch.einsum("rhn,hrs->hns", wP, M)  # (H, N, rank)
    B_bar = dt * (wB - torch.einsum("hnr,rhm,hm->hn", wPM, p, wB))
    E = torch.cat([2 * w[0] - 1, 2 * w[1]], -1)
    C_re, C_im = C.chunk(2, -1)
    return DiscreteDPLR(E, 2 * wPM, G, B_bar, 2 * torch.cat([C_re, -C_im], -1))


def small_inverse(matrix: torch.Tensor) -> torch.Tensor:
    """The inverse of (..., r, r) for the ranks that occur, 1 and 2; in closed form, so without waiting for a device."""
    if matrix.shape[-1] == 1:
        return 1 / matrix
    a, b, c, d = (matrix[..., i, j] for i in (0, 1) for j in (0, 1))
    adjugate = torch.stack([torch.stack([d, -b], -1), torch.stack([-c, a], -1)], -2)
    return adjugate / (a * d - b * c)[..., None, None]
