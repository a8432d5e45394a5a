"""Complex numbers as pairs of real ones.

Complex states come in conjugate pairs; one of each pair is kept, as a real vector [real parts | imaginary parts] of
length N. Parameters are kept the same way: complex ones break optimizers, collectives and safetensors.
"""

import torch


def real_form(z: torch.Tensor) -> torch.Tensor:
    """(..., N/2) complex -> (..., N) real, [real parts | imaginary parts]."""
    return torch.cat([z.real, z.imag], -1)


def complex_product(a: tuple, b: tuple) -> tuple[torch.Tensor, torch.Tensor]:
    """(re, im) times (re, im)."""
    return a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]


def apply_diagonal(diagonal: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """Complex product of two vectors in real form: diagonal (..., N) times state (..., N)."""
    dr, di = diagonal.chunk(2, -1)
    sr, si = state.chunk(2, -1)
    return torch.cat([dr * sr - di * si, dr * si + di * sr], -1)


def powers(log_re: torch.Tensor, log_im: torch.Tensor, exponents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """exp(exponent * (log_re + i log_im)) as its real and imaginary part, in float64.

    The phase log_im * exponent reaches thousands of radians; in float32 it would keep three digits of the angle.
    """
    exponents = exponents.to(torch.float64)
    magnitude, phase = torch.exp(log_re.double() * exponents), log_im.double() * exponents
    return magnitude * torch.cos(phase), magnitude * torch.sin(phase)
