"""The four operators of a chunk of a diagonal system (S4D) in plain PyTorch: the twin of triton_diagonal_operators.py.

Shapes: H channels, N order of the real system, T chunk length.
"""

import torch

from .chunked import ChunkOperators, with_skip
from .real_form import powers


def power_operators(
    log_re: torch.Tensor,
    log_im: torch.Tensor,
    CB_re: torch.Tensor,
    CB_im: torch.Tensor,
    length: int,
    skip: torch.Tensor | None = None,
) -> ChunkOperators:
    """The operators of a chunk of `length` tokens of a `DiscreteDiagonal`, of which these are the parts: log Lambda_bar
    in float64, C B_bar in the dtype of the operators, (H, N/2) each. skip: D (H,), which is added to the first tap.
    """
    dtype, half = CB_re.dtype, CB_re.shape[1]
    exponents = torch.arange(length + 1, device=log_re.device)
    re, im = powers(log_re[..., None], log_im[..., None], exponents)
    re, im = re.to(dtype), im.to(dtype)  # (H, N/2, T + 1)
    inject = torch.cat([re, im], 1)[..., :length].flip(-1)  # Lambda^(T-1-j)
    carry = torch.cat([re[..., -1], im[..., -1]], -1)
    c_re, c_im = CB_re[..., None], CB_im[..., None]
    rows = 2 * torch.cat([c_re * re - c_im * im, -(c_re * im + c_im * re)], 1)  # 2 Re(c Lambda^j x), j <= T
    taps = with_skip(rows[:, :half, :length].sum(1), skip)
    return ChunkOperators(taps, rows[..., 1:].transpose(1, 2), inject, carry)
