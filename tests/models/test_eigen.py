"""Run: .venv/bin/python -m pytest tests/models/test_eigen.py -q"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitdgdm.models.eigen import basis_vectors, pivot, symmetric_eigen


@st.composite
def laplacians(draw: st.DrawFn, least: int = 1, most: int = 12) -> Tensor:
    """float64[B, n, n]: Laplacians of 1..4 random graphs of one size, of any density."""
    n, batch = draw(st.integers(least, most)), draw(st.integers(1, 4))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    share = draw(st.sampled_from([0.0, 0.1, 0.3, 0.6, 1.0]))
    upper = (torch.rand(batch, n, n, generator=g) < share).double().triu(1)
    adjacency = upper + upper.transpose(1, 2)
    return torch.diag_embed(adjacency.sum(-1)) - adjacency


def spaces(values: np.ndarray) -> list[np.ndarray]:
    """Numbers of equal eigenvalues, ascending."""
    groups = np.split(np.arange(len(values)), np.flatnonzero(np.diff(values) > 1e-6) + 1)
    return [group for group in groups if len(group)]


@given(laplacians())
def test_eigenvalues_and_eigenspaces_are_those_of_lapack(matrices: Tensor) -> None:
    values, vectors = symmetric_eigen(matrices)
    for matrix, ours, basis in zip(matrices.numpy(), values.numpy(), vectors.numpy(), strict=True):
        theirs, other = np.linalg.eigh(matrix)
        np.testing.assert_allclose(ours, theirs, atol=1e-9)
        np.testing.assert_allclose(basis.T @ basis, np.eye(len(ours)), atol=1e-12)
        for space in spaces(theirs):
            projector = other[:, space] @ other[:, space].T
            np.testing.assert_allclose(basis[:, space] @ basis[:, space].T, projector, atol=1e-7)


@pytest.mark.parametrize("n", [16, 27, 33, 64])
def test_larger_graphs_are_diagonalised_too(n: int) -> None:
    g = torch.Generator().manual_seed(n)
    upper = (torch.rand(6, n, n, generator=g) < torch.rand(6, 1, 1, generator=g)).double().triu(1)
    ring = torch.roll(torch.eye(n, dtype=torch.float64), 1, 0)[None]
    adjacency = torch.cat((upper + upper.transpose(1, 2), ring + ring.transpose(1, 2)))
    matrices = torch.diag_embed(adjacency.sum(-1)) - adjacency
    values, vectors = symmetric_eigen(matrices)
    torch.testing.assert_close(values, torch.linalg.eigvalsh(matrices), atol=1e-7, rtol=0)
    rebuilt = vectors @ torch.diag_embed(values) @ vectors.transpose(1, 2)
    torch.testing.assert_close(rebuilt, matrices, atol=1e-6, rtol=0)


@given(laplacians(most=9), st.integers(0, 2**31))
def test_a_matrix_gets_the_same_bits_in_any_batch(matrices: Tensor, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    n = matrices.shape[1]
    others = torch.randn(7, n, n, generator=g, dtype=torch.float64)
    values, vectors = symmetric_eigen(torch.cat((others + others.transpose(1, 2), matrices)))
    alone = symmetric_eigen(matrices[-1:])
    assert torch.equal(values[-1:], alone[0]) and torch.equal(vectors[-1:], alone[1])


def test_matrices_without_a_unique_eigenvector_give_no_nan() -> None:
    matrices = torch.stack(
        (torch.zeros(5, 5), torch.eye(5), torch.ones(5, 5), 1e-200 * torch.ones(5, 5).double())
    )
    values, vectors = symmetric_eigen(matrices)
    assert torch.isfinite(values).all() and torch.isfinite(vectors).all()


def rotated_within_spaces(matrix: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """An equally good answer of another solver: every eigenspace turned by a random rotation."""
    values, vectors = np.linalg.eigh(matrix)
    for space in spaces(values):
        turn, _ = np.linalg.qr(rng.standard_normal((len(space), len(space))))
        vectors[:, space] = vectors[:, space] @ turn
    return torch.from_numpy(values)[None], torch.from_numpy(vectors)[None]


def first_after_zero(values: Tensor) -> Tensor:
    return (values < 1e-6).sum(1)


@settings(max_examples=100)
@given(laplacians(least=2, most=9), st.integers(0, 2**31))
def test_basis_vectors_do_not_depend_on_the_solver(matrices: Tensor, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values, vectors = symmetric_eigen(matrices)
    ours = basis_vectors(values, vectors, first_after_zero(values))
    for i, matrix in enumerate(matrices.numpy()):
        other_values, other_vectors = rotated_within_spaces(matrix, rng)
        theirs = basis_vectors(other_values, other_vectors, first_after_zero(other_values))
        torch.testing.assert_close(ours[i], theirs[0], atol=1e-6, rtol=0)


@settings(max_examples=100)
@given(laplacians(least=2, most=9))
def test_basis_vectors_are_orthonormal_eigenvectors_whose_first_largest_entry_is_positive(
    matrices: Tensor,
) -> None:
    values, vectors = symmetric_eigen(matrices)
    first = first_after_zero(values)
    for matrix, value, start, found in zip(
        matrices, values, first, basis_vectors(values, vectors, first), strict=True
    ):
        n = len(value)
        there = [column for column in range(2) if int(start) + column < n]
        for column in there:
            v = found[:, column]
            torch.testing.assert_close(matrix @ v, value[start + column] * v, atol=1e-6, rtol=0)
            leading = next(x for x in v.tolist() if abs(x) >= (1 - 1e-4) * v.abs().max())
            assert leading > 0
        basis = found[:, there]
        torch.testing.assert_close(
            basis.T @ basis, torch.eye(len(there), dtype=torch.float64), atol=1e-6, rtol=0
        )
        assert not found[:, len(there) :].any()


def test_the_pivot_is_the_first_of_nearly_equal_values() -> None:
    rows = torch.tensor([[0.1, 0.99995, 1.0, 0.5], [0.1, 0.999, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    assert pivot(rows).tolist() == [[1], [2], [0]]
