"""Run: .venv/bin/python -m pytest tests/quant/test_robust_pca.py"""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bitdgdm.quant.robust_pca import budget, keep_largest, scaled_gd, truncated_svd

# few distinct values, so that ties are the rule
tied = hnp.arrays(
    np.float64, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.integers(-3, 3).map(float)
)
alphas = st.sampled_from([0.0, 0.01, 0.1, 0.25, 0.3, 0.5, 0.9])


def hadamard(n):
    h = np.ones((1, 1))
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return h / np.sqrt(n)


def low_rank_plus_sparse(n, rank, kappa, seed=0):
    """X as incoherent as can be, condition number kappa; S with two outliers in each row and column."""
    rng = np.random.default_rng(seed)
    rows, columns = rng.permutation(n), rng.permutation(n)
    h = hadamard(n)
    x = h[rows][:, :rank] * np.logspace(0, -np.log10(kappa), rank) @ h[columns][:, rank : 2 * rank].T
    s = np.zeros((n, n))
    first = rng.permutation(n)
    for permutation in (first, np.roll(first, 1)):
        s[np.arange(n), permutation] = rng.choice((-1, 1), n) * rng.uniform(1, 2, n) * np.abs(x).max()
    return x, s


def brute_force_keep_largest(a, alpha):
    """Sort every row and every column; of equal entries the first wins."""
    keep = np.ones(a.shape, bool)
    for axis, length in ((0, a.shape[0]), (1, a.shape[1])):
        order = np.argsort(np.argsort(-np.abs(a), axis=axis, kind="stable"), axis=axis, kind="stable")
        keep &= order < budget(alpha, length)
    return np.where(keep, a, 0.0)


@given(tied, alphas)
def test_keep_largest_equals_a_brute_force_sort_ties_included(a, alpha):
    assert np.array_equal(
        keep_largest(torch.from_numpy(a), alpha).numpy(), brute_force_keep_largest(a, alpha)
    )


@given(tied, alphas)
def test_alpha_bounds_every_row_and_every_column(a, alpha):
    kept = keep_largest(torch.from_numpy(a), alpha).numpy() != 0
    assert (kept.sum(axis=1) <= budget(alpha, a.shape[1])).all()
    assert (kept.sum(axis=0) <= budget(alpha, a.shape[0])).all()


def test_the_budget_is_rounded_up_has_a_floor_of_two_and_never_exceeds_the_length():
    assert [budget(0.01, n) for n in (1, 64, 256, 2048)] == [1, 2, 3, 21]
    assert budget(0.07, 100) == 7  # 0.07 * 100 is 7.000000000000001
    assert budget(0.0, 256) == 0


@given(tied, st.integers(1, 4))
def test_the_truncated_svd_is_as_good_as_numpys(a, rank):
    left, right = (f[0].numpy() for f in truncated_svd(torch.from_numpy(a)[None], rank))
    best = np.sqrt(np.square(np.linalg.svd(a, compute_uv=False)[rank:]).sum())
    assert np.linalg.norm(left @ right.T - a) <= best + 1e-6 * np.linalg.norm(a)
    assert np.allclose(np.linalg.norm(left, axis=0), np.linalg.norm(right, axis=0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kappa", [1, 10, 100])
def test_scaled_gd_recovers_both_parts_at_a_rate_that_does_not_depend_on_the_condition_number(kappa):
    x, s = low_rank_plus_sparse(256, 4, kappa)
    w = torch.from_numpy(x + s)[None]
    errors = []
    for steps in (5, 10, 20, 30):
        found = scaled_gd(w, 4, 2 / 256, steps=steps, tolerance=0.0)
        errors.append(np.linalg.norm((found.left @ found.right.mT)[0].numpy() - x) / np.linalg.norm(x))
    assert errors[1] < 1e-5 and errors[3] < 1e-11
    # the theorem promises a factor 1 - 0.6 eta = 0.7 a step
    assert errors[2] <= 0.7**10 * errors[1] and errors[3] <= 0.7**10 * errors[2]
    assert np.abs(found.sparse[0].numpy() - s).max() <= 1e-11


def test_float32_reaches_the_accuracy_of_float32():
    x, s = low_rank_plus_sparse(256, 4, 10)
    found = scaled_gd(torch.from_numpy(x + s).float()[None], 4, 2 / 256, tolerance=0.0)
    assert np.linalg.norm((found.left @ found.right.mT)[0].numpy() - x) <= 1e-5 * np.linalg.norm(x)


def test_it_stalls_when_there_are_more_outliers_than_the_weakest_direction_can_bear():
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((128, 4)))[0] for _ in range(2))
    x = u * np.logspace(0, -2, 4) @ v.T
    s = np.where(rng.random(x.shape) < 0.05, rng.uniform(-1, 1, x.shape) * np.abs(x).mean(), 0.0)
    found = scaled_gd(torch.from_numpy(x + s)[None], 4, 0.12, steps=100, tolerance=0.0)
    assert np.linalg.norm((found.left @ found.right.mT)[0].numpy() - x) > 1e-3 * np.linalg.norm(x)


@given(tied, st.integers(0, 3), alphas, st.integers(0, 8))
def test_the_split_obeys_alpha_and_is_never_worse_than_its_start(a, rank, alpha, steps):
    w = torch.from_numpy(a)[None]
    found = scaled_gd(w, rank, alpha, steps=steps)
    kept = found.sparse[0].numpy() != 0
    assert (kept.sum(axis=1) <= budget(alpha, a.shape[1])).all()
    assert (kept.sum(axis=0) <= budget(alpha, a.shape[0])).all()
    left, right = truncated_svd(w - keep_largest(w, alpha), rank)
    start = keep_largest(w - left @ right.mT, alpha) + left @ right.mT
    found_error = np.linalg.norm((found.left @ found.right.mT + found.sparse - w).numpy())
    assert found_error <= float((start - w).norm()) + 1e-9


def test_a_matrix_does_not_feel_its_companions_in_the_batch():
    rng = np.random.default_rng(1)
    matrices = torch.from_numpy(rng.standard_normal((3, 24, 40)) * np.array([1.0, 1e-3, 50.0])[:, None, None])
    matrices[1, 3] *= 20
    together = scaled_gd(matrices, 4, 0.05)
    for i in range(3):
        alone = scaled_gd(matrices[i : i + 1], 4, 0.05)
        assert int(alone.steps) == int(together.steps[i])
        assert torch.equal(alone.sparse[0] != 0, together.sparse[i] != 0)
        product = alone.left[0] @ alone.right[0].mT
        assert torch.allclose(product, together.left[i] @ together.right[i].mT, rtol=1e-9, atol=1e-9)


def test_a_zero_matrix_and_a_rank_deficient_one_give_finite_parts():
    rng = np.random.default_rng(2)
    rank_one = np.outer(rng.standard_normal(20), rng.standard_normal(30))
    w = torch.from_numpy(np.stack([np.zeros((20, 30)), rank_one]))
    found = scaled_gd(w, 8, 0.05)
    rebuilt = found.left @ found.right.mT + found.sparse
    assert not rebuilt[0].any()
    assert float((rebuilt - w)[1].norm()) <= 1e-9 * float(w[1].norm())
