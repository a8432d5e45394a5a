"""HiPPO: state matrices that remember, in normal-plus-low-rank form.

Everything here is numpy in float64 and runs once, at initialisation. A system of order N that is real has its
eigenvalues in conjugate pairs, so only the N/2 with negative imaginary part are returned.

Source: Gu, Goel, Re, "Efficiently Modeling Long Sequences with Structured State Spaces" (2022), section 3, app. C;
Gu, Gupta, Goel, Re, "On the Parameterization and Initialization of Diagonal State Space Models" (2022), section 4;
Gu, Johnson, Timalsina, Rudra, Re, "How to Train Your HiPPO" (2022), for LegT and Fourier.
"""

from typing import NamedTuple

import numpy as np


class Initialization(NamedTuple):
    """A = diag(Lambda) - P P^*, in the basis where its normal part is diagonal.

    Lambda: (N/2,) complex128, Re <= 0, Im <= 0.
    P:      (rank, N/2) complex128; rank 0 where A is diagonal.
    B:      (N/2,) complex128.
    """

    Lambda: np.ndarray
    P: np.ndarray
    B: np.ndarray


def legs_matrices(state_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """HiPPO-LegS as it is defined: A (N, N), B (N,), and the P (N,) for which A + P P^T is normal; all float64.

    A_nk = -sqrt(2n+1) sqrt(2k+1)  below the diagonal,  -(n+1) on it,  0 above
    B_n  =  sqrt(2n+1)
    P_n  =  sqrt(n + 1/2),   A + P P^T = -1/2 I + a skew-symmetric matrix
    """
    n = np.arange(state_size, dtype=np.float64)
    B = np.sqrt(2 * n + 1)
    A = -np.tril(np.outer(B, B), -1) - np.diag(n + 1)
    return A, B, np.sqrt(n + 0.5)


def legs(state_size: int) -> Initialization:
    """HiPPO-LegS in the eigenbasis of its normal part: the initialisation of S4."""
    A, B, P = legs_matrices(state_size)
    return _in_the_eigenbasis(A, B, P[None])


def legt_matrices(state_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """HiPPO-LegT, a sliding window under the Legendre measure: A (N, N), B (N,), P (2, N), all float64.

    A_nk = -1/2 sqrt(2n+1) sqrt(2k+1) times  1 for n >= k,  (-1)^(n-k) for n < k
    B_n  =  1/2 sqrt(2n+1)
    P    =  sqrt(n + 1/2) at the odd n, and at the even n; A + P^T P is skew-symmetric
    """
    n = np.arange(state_size)
    root = np.sqrt(2 * n + 1.0)
    sign = np.where(n[:, None] < n, (-1.0) ** (n[:, None] - n), 1.0)
    P = np.sqrt(n + 0.5)
    return -0.5 * np.outer(root, root) * sign, 0.5 * root, np.stack([P * (n % 2), P * (1 - n % 2)])


def legt(state_size: int) -> Initialization:
    """HiPPO-LegT, of rank 2, in the eigenbasis of its normal part. The first P is real and positive."""
    return _in_the_eigenbasis(*legt_matrices(state_size))


def fourier_matrices(state_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """HiPPO-Fourier, a sliding window under a Fourier basis: A (N, N), B (N,), P (1, N), all float64.

    The states are pairs (cos, sin) of frequency k = 0 ... N/2 - 1, of which A rotates each by pi k, minus B B^T, which
    takes out what leaves the window. B is sqrt(2) at a cosine, 1 at the constant, 0 at a sine; P = B.
    """
    A = np.zeros((state_size, state_size))
    cosine = np.arange(0, state_size, 2)
    A[cosine + 1, cosine] = np.pi * (cosine // 2)
    A -= A.T
    B = np.zeros(state_size)
    B[cosine] = np.sqrt(2.0)
    B[0] = 1
    return A - np.outer(B, B), B, B[None]


def fourier(state_size: int) -> Initialization:
    """HiPPO-Fourier in closed form: Lambda_k = -i pi k, P = B = (sqrt(1/2), 1, 1, ...).

    Frequency 0 has a double eigenvalue 0, whose eigenspace a numerical decomposition would cut at random. Its two real
    states make up one conjugate pair of ours, (cos + i sin) / sqrt(2); the sine of frequency 0 is a state that nothing
    drives, and it stays, so that the order is N. All of Lambda is imaginary; `MIN_DECAY` makes it stable.
    """
    ones = np.ones(state_size // 2, np.complex128)
    ones[0] = np.sqrt(0.5)
    return Initialization(-1j * np.pi * np.arange(state_size // 2), ones[None], ones)


def _in_the_eigenbasis(A: np.ndarray, B: np.ndarray, P: np.ndarray) -> Initialization:
    """A + P^T P, which is a multiple of I plus a skew-symmetric matrix, diagonalised. P: (rank, N).

    An eigenvector is free up to a phase, which would differ between LAPACK builds. It is chosen so that the first P is
    real and positive (legs: then B = sqrt(2) P is too).
    """
    normal = A + P.T @ P
    real_part = np.mean(np.diag(normal))
    skew = (normal - normal.T) / 2
    # the eigenvalues of a skew-symmetric S are i times those of the Hermitian matrix -i S
    imaginary_part, V = np.linalg.eigh(-1j * skew)
    half = slice(0, len(A) // 2)  # eigh sorts ascending: the first half is the negative one
    V, imaginary_part = V[:, half], imaginary_part[half]
    P_eigen, B_eigen = P @ V.conj(), V.conj().T @ B
    phase = P_eigen[0].conj() / np.abs(P_eigen[0])
    return Initialization(real_part + 1j * imaginary_part, P_eigen * phase, B_eigen * phase)


def diagonal_legs(state_size: int) -> Initialization:
    """S4D-LegS: HiPPO-LegS with its low-rank part dropped."""
    Lambda, _, B = legs(state_size)
    return Initialization(Lambda, np.zeros((0, len(Lambda)), np.complex128), B)


def diagonal_lin(state_size: int) -> Initialization:
    """S4D-Lin: Lambda_n = -1/2 - i pi n, the Fourier frequencies."""
    n = np.arange(state_size // 2)
    return _diagonal(-0.5 - 1j * np.pi * n)


def diagonal_inv(state_size: int) -> Initialization:
    """S4D-Inv: Lambda_n = -1/2 - i (N/pi) (N/(2n+1) - 1), an inverse law close to the LegS spectrum."""
    n = np.arange(state_size // 2)
    return _diagonal(-0.5 - 1j * (state_size / np.pi) * (state_size / (2 * n + 1) - 1))


def diagonal_quad(state_size: int) -> Initialization:
    """S4D-Quad: Lambda_n = -1/2 - i (1/pi) (1 + 2n)^2, a spectrum that grows faster than LegS's."""
    n = np.arange(state_size // 2)
    return _diagonal(-0.5 - 1j / np.pi * (1 + 2 * n) ** 2)


def diagonal_real(state_size: int) -> Initialization:
    """S4D-Real: Lambda_n = -(n + 1), the eigenvalues of LegS itself.

    A real rate fills a conjugate pair with zero imaginary part, as upstream has it: N/2 rates, each twice. The state
    stays N real numbers, and training may give a pair a frequency.
    """
    return _diagonal(-1.0 - np.arange(state_size // 2) + 0j)


def diagonal_rope(state_size: int) -> Initialization:
    """Lambda_n = -1/2 - i pi (N/2) 10000^(-2n/N): from S4D-Lin's highest frequency downward by equal factors, as rotary
    embeddings have them (Su et al., 2104.09864). The slow pairs tell tokens apart however far they lie, the fast ones
    tell how far.
    """
    n = np.arange(state_size // 2)
    return _diagonal(-0.5 - 1j * np.pi * (state_size // 2) * 10000.0 ** (-2 * n / state_size))


def _diagonal(Lambda: np.ndarray) -> Initialization:
    ones = np.ones(len(Lambda), np.complex128)
    return Initialization(Lambda, np.zeros((0, len(Lambda)), np.complex128), ones)


# which initialisations a layer accepts, by the name in S4Config.ssm; the first is the default
INITIALIZATIONS = {
    "s4": {"legs": legs, "legt": legt, "fourier": fourier},
    "s4d": {
        "legs": diagonal_legs,
        "lin": diagonal_lin,
        "inv": diagonal_inv,
        "quad": diagonal_quad,
        "real": diagonal_real,
    },
    "s5": {"legs": diagonal_legs},  # of the order of a block
    # a head has one decay, the first of the rates, and all of the frequencies; of several, heads take them in turns
    "ssd": {
        "rope": diagonal_rope,
        "lin": diagonal_lin,
        "real": diagonal_real,
        "lin+real": (diagonal_lin, diagonal_real),
    },
}
