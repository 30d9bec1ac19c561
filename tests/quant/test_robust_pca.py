"""Run: .venv/bin/python -m pytest tests/quant/test_robust_pca.py"""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bitdgdm.quant.robust_pca import budget, keep_largest, scaled_gd, truncated_svd
from tests.quant import plain_rpca

# few distinct values, so that ties are the rule
tied = hnp.arrays(
    np.float64, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.integers(-3, 3).map(float)
)
alphas = st.sampled_from([0.0, 0.01, 0.1, 0.25, 0.3, 0.5, 0.9])


@given(tied, alphas)
def test_keep_largest_equals_a_brute_force_sort_ties_included(a, alpha):
    assert np.array_equal(keep_largest(torch.from_numpy(a), alpha).numpy(), plain_rpca.keep_largest(a, alpha))


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


@pytest.mark.parametrize("eta", [0.3, 0.5, 2 / 3])
def test_inside_the_theory_the_error_falls_at_the_published_rate_for_any_condition_number(eta):
    """n = 256, rank 4, as incoherent as can be, two outliers in each row and column (alpha = 0.8 %)."""
    rates = []
    for kappa in (1, 10, 100):
        x, s = plain_rpca.low_rank_plus_sparse(256, 4, kappa)
        plain = plain_rpca.scaled_gd(x + s, 4, 2 / 256, 60, eta)
        smallest = 1 / kappa  # sigma_r of X
        errors = np.array([np.linalg.norm(low - x) for low in plain]) / smallest
        # the theorem counts from an error of 0.03 sigma_r on; the start reaches it by itself, later for
        # large kappa
        inside = np.flatnonzero((errors <= 0.03) & (errors >= 1e-10 * kappa))
        assert len(inside) > 10 and (np.diff(inside) == 1).all()
        ratios = errors[inside[1:]] / errors[inside[:-1]]
        assert (ratios <= 1 - 0.6 * eta).all()
        rates.append((errors[inside[-1]] / errors[inside[0]]) ** (1 / (len(inside) - 1)))
        w = torch.from_numpy(x + s)[None]
        for steps in (3, 12, 60):
            found = scaled_gd(w, 4, 2 / 256, steps=steps, eta=eta, tolerance=0.0)
            low, sparse = plain_rpca.polished(x + s, plain[steps], 4, 2 / 256)
            assert np.allclose((found.left @ found.right.mT)[0].numpy(), low, rtol=0, atol=1e-9)
            assert np.allclose(found.sparse[0].numpy(), sparse, rtol=0, atol=1e-9)
        assert np.linalg.norm(low - x) <= 1e-5 * smallest
        assert np.abs(sparse - s).max() <= 1e-5 * np.abs(s).max()
    assert max(rates) - min(rates) <= 0.02


@pytest.mark.parametrize(
    ("rank", "kappa", "density", "lowest", "highest"),
    [
        (4, 1, 0.02, 0.0, 1e-5),  # random factors are less incoherent, and it still recovers
        (16, 1, 0.05, 0.0, 1e-5),
        (
            16,
            10,
            0.05,
            1e-2,
            1.0,
        ),  # kappa enters the admissible alpha: four times fewer outliers than the last
        (16, 100, 0.05, 1e-2, 1.0),
        (16, 1, 0.25, 1e-2, 1.0),
    ],
)
def test_where_it_recovers_and_where_it_stalls(rank, kappa, density, lowest, highest):
    """256 x 256, random factors, outliers of up to five times the mean entry, alpha as high as their densest
    row."""
    rng = np.random.default_rng(0)
    x = plain_rpca.random_low_rank(256, 256, rank, kappa, rng)
    hit = rng.random(x.shape) < density
    s = np.where(hit, rng.uniform(-5, 5, x.shape) * np.abs(x).mean(), 0.0)
    alpha = max(hit.sum(axis=0).max(), hit.sum(axis=1).max()) / 256
    found = scaled_gd(torch.from_numpy(x + s)[None], rank, alpha, steps=100, tolerance=0.0)
    error = np.linalg.norm((found.left @ found.right.mT)[0].numpy() - x) / np.linalg.norm(x)
    assert lowest <= error <= highest


def test_float32_reaches_the_accuracy_of_float32():
    x, s = plain_rpca.low_rank_plus_sparse(256, 4, 10)
    found = scaled_gd(torch.from_numpy(x + s).float()[None], 4, 2 / 256, tolerance=0.0)
    assert np.linalg.norm((found.left @ found.right.mT)[0].numpy() - x) <= 1e-5 * np.linalg.norm(x)


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
