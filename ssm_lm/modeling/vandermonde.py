"""The Vandermonde product of S4D's kernel in plain PyTorch; the Triton kernel of it is triton_vandermonde.py."""

import torch

from .real_form import powers


def vandermonde(
    v_re: torch.Tensor, v_im: torch.Tensor, log_re: torch.Tensor, log_im: torch.Tensor, length: int
) -> torch.Tensor:
    """out[h, l] = 2 Re sum_n v[h, n] exp(l (log_re + i log_im)[h, n]) for l < length. All (H, N/2) -> (H, length).

    The logarithms may be float64 where v is float32. l = q R + r splits the powers in two factors, so that R + length/R
    of them are computed and one matmul does the rest; no (H, N, L) tensor exists.
    """
    dtype = v_re.dtype
    R = 1 << max(0, (length - 1).bit_length() // 2)
    Q = -(-length // R)
    index = torch.arange(max(Q, R), device=v_re.device)
    coarse_re, coarse_im = powers(log_re[:, None], log_im[:, None], (index[:Q] * R)[:, None])  # (H, Q, N/2)
    fine_re, fine_im = powers(log_re[..., None], log_im[..., None], index[:R])  # (H, N/2, R)
    v_re, v_im = v_re[:, None], v_im[:, None]
    left_re = v_re * coarse_re - v_im * coarse_im
    left_im = v_re * coarse_im + v_im * coarse_re
    left = torch.cat([left_re, -left_im], -1).to(dtype)
    return 2 * (left @ torch.cat([fine_re, fine_im], 1).to(dtype)).flatten(1)[:, :length]
