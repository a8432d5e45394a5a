"""HiPPO: state matrices that remember, in normal-plus-low-rank form.

Everything here is numpy in float64 and runs once, at initialisation. A system of order N that is real has its
eigenvalues in conjugate pairs, so only the N/2 with negative imaginary part are returned.

Source: Gu, Goel, Re, "Efficiently Modeling Long Sequences with Structured State Spaces" (2022), section 3, app. C;
Gu, Gupta, Goel, Re, "On the Parameterization and Initialization of Diagonal State Space Models" (2022), section 4.
"""

from typing import NamedTuple

import numpy as np


class Initialization(NamedTuple):
    """A = diag(Lambda) - P P^*, in the basis where its normal part is diagonal.

    Lambda: (N/2,) complex128, Re < 0, Im <= 0.
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
    """HiPPO-LegS in the eigenbasis of its normal part: the initialisation of S4.

    An eigenvector is free up to a phase, which would differ between LAPACK builds. It is chosen so that P is real and
    positive; then B = sqrt(2) P is too.
    """
    A, B, P = legs_matrices(state_size)
    normal = A + np.outer(P, P)
    real_part = np.mean(np.diag(normal))
    skew = (normal - normal.T) / 2
    # the eigenvalues of a skew-symmetric S are i times those of the Hermitian matrix -i S
    imaginary_part, V = np.linalg.eigh(-1j * skew)
    half = slice(0, state_size // 2)  # eigh sorts ascending: the first half is the negative one
    V, imaginary_part = V[:, half], imaginary_part[half]
    P_eigen, B_eigen = V.conj().T @ P, V.conj().T @ B
    phase = P_eigen.conj() / np.abs(P_eigen)
    return Initialization(real_part + 1j * imaginary_part, (P_eigen * phase)[None], B_eigen * phase)


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


def _diagonal(Lambda: np.ndarray) -> Initialization:
    ones = np.ones(len(Lambda), np.complex128)
    return Initialization(Lambda, np.zeros((0, len(Lambda)), np.complex128), ones)


# which initialisations a layer accepts, by the name in S4Config.ssm
INITIALIZATIONS = {
    "s4": {"legs": legs},
    "s4d": {"legs": diagonal_legs, "lin": diagonal_lin, "inv": diagonal_inv},
}
