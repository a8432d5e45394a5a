"""The four operators of a chunk of S4 in plain PyTorch, by squarings of its dense matrix: the twin of
triton_dplr_operators.py.

Shapes: H channels, N order of the real system, T chunk length.
"""

import torch

from .chunked import ChunkOperators, with_skip
from .discrete import DiscreteDPLR


def float32_is_rounded(device_type: str) -> bool:
    """Whether matrix products of float32 numbers take them as TF32, of 11 bits: on a GPU, by `tf32: true`,
    `torch_compile: true` (transformers then turns it on) or torch.set_float32_matmul_precision.
    """
    return device_type == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32"


# a compiled model keeps what was found when it was traced
float32_is_rounded._dynamo_marked_constant = True


def for_powers(discrete: DiscreteDPLR) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A_bar (H, N, N), B_bar and C_row (H, N), in the dtype in which their products are to be made.

    Every squaring doubles the error of the one before: rounded as TF32 does, by 5e-4, A^64 has two digits left.
    """
    if float32_is_rounded(discrete.E.device.type):
        discrete = DiscreteDPLR(*(x.double() for x in discrete))
    e_re, e_im = (torch.diag_embed(part) for part in discrete.E.chunk(2, -1))
    rotation = torch.cat([torch.cat([e_re, -e_im], -1), torch.cat([e_im, e_re], -1)], -2)
    return rotation - discrete.F @ discrete.G.transpose(1, 2), discrete.B_bar, discrete.C_row


def krylov_operators(
    E: torch.Tensor,
    F: torch.Tensor,
    G: torch.Tensor,
    B_bar: torch.Tensor,
    C_row: torch.Tensor,
    length: int,
    skip: torch.Tensor | None = None,
) -> ChunkOperators:
    """The operators of a chunk of `length` tokens of a `DiscreteDPLR`, of which these are the parts, in their dtype.
    skip: D (H,), which is added to the first tap.

    Krylov columns A^j B and rows C A^(j+1) by doubling: log2(T) squarings of the dense real A_bar. The powers are
    diagonal plus low rank, so columns, rows and A^T could do without the squarings, in 2.7 times fewer operations. On
    a CPU that takes the same time: what replaces a squaring is a dozen passes over (H, N, T).
    """
    power, B, C = for_powers(DiscreteDPLR(E, F, G, B_bar, C_row))  # A^(2^k)
    columns = B[..., None]  # A^j B, j = 0, 1, ...
    rows = C[:, None] @ power  # C A^(j+1)
    carry = None  # A^length, from the binary digits of the length
    remaining = length
    while True:
        if remaining & 1:
            carry = power if carry is None else power @ carry
        remaining >>= 1
        if not remaining:
            break
        missing = length - columns.shape[-1]
        columns = torch.cat([columns, power @ columns[..., :missing]], -1)
        rows = torch.cat([rows, rows[:, :missing] @ power], 1)
        power = power @ power
    missing = length - columns.shape[-1]
    if missing:
        columns = torch.cat([columns, power @ columns[..., :missing]], -1)
        rows = torch.cat([rows, rows[:, :missing] @ power], 1)
    taps = (C[:, None] @ columns).squeeze(1)
    taps = with_skip(taps.to(E.dtype), skip)
    return ChunkOperators(taps, rows.to(E.dtype), columns.flip(-1).to(E.dtype), carry.to(E.dtype))
