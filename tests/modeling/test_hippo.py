import numpy as np
import pytest

from ssm_lm.modeling.hippo import (
    diagonal_inv,
    diagonal_legs,
    diagonal_lin,
    diagonal_quad,
    diagonal_real,
    diagonal_rope,
    fourier,
    fourier_matrices,
    legs,
    legs_matrices,
    legt,
    legt_matrices,
)


def test_legs_matrix_by_hand():
    A, B, P = legs_matrices(3)
    np.testing.assert_allclose(
        A, [[-1, 0, 0], [-np.sqrt(3), -2, 0], [-np.sqrt(5), -np.sqrt(15), -3]], rtol=0, atol=1e-15
    )
    np.testing.assert_allclose(B**2, [1, 3, 5])
    np.testing.assert_allclose(P**2, [0.5, 1.5, 2.5])


@pytest.mark.parametrize("state_size", [2, 16, 64])
@pytest.mark.parametrize(
    ("init", "matrices"), [(legs, legs_matrices), (legt, legt_matrices), (fourier, fourier_matrices)]
)
def test_normal_plus_low_rank_is_similar_to_the_matrix(init, matrices, state_size):
    """diag(Lambda) - P P^*, both conjugate halves, is unitarily similar to A: same impulse response B^T A^k B."""
    A, B, _ = matrices(state_size)
    Lambda, P, B_eigen = init(state_size)
    Lambda, P, b = (np.concatenate([z, z.conj()], -1) for z in (Lambda, P, B_eigen))
    dplr = np.diag(Lambda) - P.T @ P.conj()
    # moments B^T A^k B do not depend on the basis; A is scaled to keep its powers in range
    scale = max(np.abs(A).max(), 1)
    for k in range(6):
        ours = b.conj() @ np.linalg.matrix_power(dplr / scale, k) @ b
        theirs = B @ np.linalg.matrix_power(A / scale, k) @ B
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9 * state_size)


@pytest.mark.parametrize("matrices", [legs_matrices, legt_matrices, fourier_matrices])
def test_the_low_rank_part_leaves_a_normal_matrix(matrices):
    A, _, P = matrices(12)
    P = np.atleast_2d(P)
    normal = A + P.T @ P
    np.testing.assert_allclose(normal + normal.T, 2 * normal[0, 0] * np.eye(12), atol=1e-12)


def test_legt_and_fourier_values_of_order_64():
    """The figures that upstream's initialisation gives."""
    Lambda, P, _ = legt(64)
    assert P.shape == (2, 32)
    np.testing.assert_allclose(Lambda.real, 0, atol=1e-9)
    np.testing.assert_allclose([Lambda.imag[0], Lambda.imag[-1]], [-662.6, -1.56], rtol=1e-2)
    Lambda, P, B = fourier(64)
    np.testing.assert_allclose(Lambda, -1j * np.pi * np.arange(32))
    np.testing.assert_allclose(P[0], B)
    np.testing.assert_allclose(np.abs(B[:2]) ** 2 * 2, [1, 2])


def test_legs_values_of_order_64():
    """The figures that upstream's initialisation gives."""
    Lambda, P, B = legs(64)
    np.testing.assert_allclose(Lambda.real, -0.5, atol=1e-12)
    np.testing.assert_allclose(Lambda.imag[:3], [-1303.27, -433.03, -258.15], atol=0.01)
    np.testing.assert_allclose(Lambda.imag[-1], -0.264, atol=1e-3)
    np.testing.assert_allclose([np.abs(P).min(), np.abs(P).max()], [0.42, 28.8], atol=0.05)
    np.testing.assert_allclose([np.abs(B).min(), np.abs(B).max()], [0.59, 40.75], atol=0.01)
    np.testing.assert_allclose(np.abs(P[0] / B), np.sqrt(0.5), rtol=1e-9)
    assert np.all(P.real > 0)
    np.testing.assert_allclose(P.imag, 0, atol=1e-12)


def test_diagonal_initialisations():
    np.testing.assert_allclose(diagonal_lin(8).Lambda, -0.5 - 1j * np.pi * np.arange(4))
    inverse = diagonal_inv(64).Lambda
    np.testing.assert_allclose(inverse.imag[0], -1283.4, atol=0.1)
    np.testing.assert_allclose(inverse.imag[-1], -(64 / np.pi) * (64 / 63 - 1))
    np.testing.assert_allclose(diagonal_legs(64).Lambda, legs(64).Lambda)
    np.testing.assert_allclose(diagonal_legs(64).B, legs(64).B)
    assert diagonal_lin(8).P.shape == (0, 4)


def test_quad_and_real():
    np.testing.assert_allclose(diagonal_quad(6).Lambda, -0.5 - 1j / np.pi * np.array([1, 9, 25]))
    np.testing.assert_allclose(diagonal_real(6).Lambda, [-1, -2, -3])


def test_rope_goes_down_from_lin_by_equal_factors():
    Lambda = diagonal_rope(64).Lambda
    np.testing.assert_allclose(Lambda.real, -0.5)
    np.testing.assert_allclose(Lambda.imag[0], -np.pi * 32)
    np.testing.assert_allclose(Lambda.imag[1:] / Lambda.imag[:-1], 10000 ** (-1 / 32))
