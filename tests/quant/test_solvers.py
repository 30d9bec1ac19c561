"""Run: pytest tests/quant/test_solvers.py"""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bitdgdm.quant.altproj import alternating_projections
from bitdgdm.quant.lrpca import Schedule, geometric, learned_rpca, trained
from bitdgdm.quant.outlier_pursuit import outlier_pursuit
from bitdgdm.quant.pcp import principal_component_pursuit
from bitdgdm.quant.robust_pca import budget, keep_largest, scaled_gd, truncated_svd
from tests.quant import plain_rpca


def learned_rpca_trained(w, rank, alpha):
    return learned_rpca(w, rank, alpha, schedule=trained())


ALPHA_SPARSE = [
    scaled_gd, alternating_projections, learned_rpca, learned_rpca_trained, principal_component_pursuit,
]  # fmt: skip
EVERY = [*ALPHA_SPARSE, outlier_pursuit]

# few distinct values, so that ties, zero rows and rank-deficient matrices are the rule
tied = hnp.arrays(
    np.float64, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.integers(-3, 3).map(float)
)
alphas = st.sampled_from([0.0, 0.01, 0.1, 0.3, 0.9])


def product(found):
    return (found.left @ found.right.mT)[0].numpy()


def error(found, x):
    return np.linalg.norm(product(found) - x) / np.linalg.norm(x)


@pytest.mark.parametrize("solve", ALPHA_SPARSE)
@given(tied, st.integers(0, 3), alphas)
def test_every_split_obeys_alpha_and_is_never_worse_than_its_start(solve, a, rank, alpha):
    w = torch.from_numpy(a)[None]
    found = solve(w, rank, alpha)
    kept = found.sparse[0].numpy() != 0
    assert (kept.sum(axis=1) <= budget(alpha, a.shape[1])).all()
    assert (kept.sum(axis=0) <= budget(alpha, a.shape[0])).all()
    assert found.left.shape == (1, a.shape[0], rank) and found.right.shape == (1, a.shape[1], rank)
    left, right = truncated_svd(w - keep_largest(w, alpha), rank)
    start = keep_largest(w - left @ right.mT, alpha) + left @ right.mT
    reached = np.linalg.norm(product(found) + found.sparse[0].numpy() - a)
    assert reached <= float((start - w).norm()) + 1e-9


@given(tied, st.integers(0, 3), alphas)
def test_outlier_pursuit_keeps_whole_columns_within_its_budget_and_no_product_there(a, rank, alpha):
    found = outlier_pursuit(torch.from_numpy(a)[None], rank, alpha)
    sparse = found.sparse[0].numpy()
    columns = np.abs(sparse).sum(axis=0) > 0
    assert columns.sum() <= budget(alpha, a.shape[1])
    assert np.array_equal(sparse[:, columns], a[:, columns])
    assert np.abs(product(found)[:, columns]).max(initial=0.0) <= 1e-9


@pytest.mark.parametrize("kappa", [1, 10, 100])
@pytest.mark.parametrize("solve", [alternating_projections, learned_rpca, principal_component_pursuit])
def test_a_known_answer_is_recovered_for_any_condition_number(solve, kappa):
    x, s = plain_rpca.low_rank_plus_sparse(256, 4, kappa)
    found = solve(torch.from_numpy(x + s)[None], 4, 2 / 256)
    assert error(found, x) <= 1e-5
    assert np.abs(found.sparse[0].numpy() - s).max() <= 1e-5 * np.abs(s).max()


def test_alternating_projections_and_pcp_recover_where_scaled_gd_stalls():
    """128 x 128, rank 4, kappa 10, 5 % outliers: the admissible alpha of ScaledGD falls with kappa, theirs
    doesn't."""
    rng = np.random.default_rng(0)
    x = plain_rpca.random_low_rank(128, 128, 4, 10, rng)
    hit = rng.random(x.shape) < 0.05
    s = np.where(hit, rng.uniform(-5, 5, x.shape) * np.abs(x).mean(), 0.0)
    alpha = max(hit.sum(axis=0).max(), hit.sum(axis=1).max()) / 128
    w = torch.from_numpy(x + s)[None]
    assert error(scaled_gd(w, 4, alpha, steps=100, tolerance=0.0), x) > 1e-2
    for solve in (alternating_projections, principal_component_pursuit, learned_rpca):
        assert error(solve(w, 4, alpha), x) <= 1e-5


def test_nothing_recovers_a_matrix_with_a_third_of_its_entries_replaced():
    rng = np.random.default_rng(0)
    x = plain_rpca.random_low_rank(96, 96, 16, 10, rng)
    s = np.where(rng.random(x.shape) < 0.33, rng.uniform(-5, 5, x.shape) * np.abs(x).mean(), 0.0)
    for solve in ALPHA_SPARSE:
        assert error(solve(torch.from_numpy(x + s)[None], 16, 0.4), x) > 1e-2


def test_alternating_projections_take_the_published_iterates():
    """Stages 1 and 2 are those of the source, where every k is a stage; one iteration each and no early
    end."""
    rng = np.random.default_rng(0)
    w = plain_rpca.random_low_rank(40, 30, 2, 3, rng) + 0.01 * rng.standard_normal((40, 30))
    w[rng.random(w.shape) < 0.03] += 0.3
    beta = 4 * 2 / np.sqrt(w.size)
    low = plain_rpca.alternating_projections(w, 2, beta, steps=1)[-1]
    for matrix, plain in ((w, low), (w.T, low.T)):
        found = alternating_projections(torch.from_numpy(matrix.copy())[None], 2, 0.1, steps=1)
        expected, sparse = plain_rpca.polished(matrix, plain, 2, 0.1)
        assert np.allclose(product(found), expected, rtol=0, atol=1e-8)
        assert np.allclose(found.sparse[0].numpy(), sparse, rtol=0, atol=1e-8)


@pytest.mark.parametrize("kappa", [1, 10, 100])
def test_the_error_of_alternating_projections_halves_in_each_iteration_of_a_stage(kappa):
    x, s = plain_rpca.low_rank_plus_sparse(128, 2, kappa)
    w, beta = x + s, 4 * 2 / 128
    plain = plain_rpca.alternating_projections(w, 2, beta, steps=30)
    # the theorem: |L - X| <= (2 mu^2 r / n) (sigma_3 + 2^-t sigma_2) entry by entry in the last stage;
    # sigma_3 = 0
    for t, low in enumerate(plain[30:]):
        assert np.abs(low - x).max() <= beta / 2 * 0.5**t / kappa + 1e-14
    found = alternating_projections(torch.from_numpy(w)[None], 2, 2 / 128)
    assert np.allclose(product(found), plain[-1], rtol=0, atol=1e-9)


def test_learned_rpca_takes_the_published_iterates_with_any_schedule():
    rng = np.random.default_rng(4)
    w = plain_rpca.random_low_rank(40, 56, 3, 5, rng) + 0.005 * rng.standard_normal((40, 56))
    w[rng.random(w.shape) < 0.03] -= 0.3
    unit = np.abs(w).mean()
    for plan in (Schedule((4.0, 2.0, 1.5, 0.2), (0.4, 0.5, 0.8)), geometric(10), trained()):
        plain = plain_rpca.learned_rpca(w, 3, unit * np.array(plan.zeta), plan.eta)[-1]
        expected, sparse = plain_rpca.polished(w, plain, 3, 0.1)
        found = learned_rpca(torch.from_numpy(w)[None], 3, 0.1, schedule=plan)
        assert np.allclose(product(found), expected, rtol=0, atol=1e-6)
        assert np.allclose(found.sparse[0].numpy(), sparse, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kappa", [1, 10])
def test_the_error_of_learned_rpca_follows_its_thresholds(kappa):
    """Theorem 1: with zeta_k >= |X_k - X| entry by entry no entry outside the support of S is ever taken for
    one."""
    x, s = plain_rpca.low_rank_plus_sparse(128, 4, kappa)
    plan = geometric(30)
    zeta = np.abs(x + s).mean() * np.array(plan.zeta)
    for low, level in zip(plain_rpca.learned_rpca(x + s, 4, zeta, plan.eta), zeta, strict=True):
        assert np.abs(low - x).max() <= level
        assert not (np.abs(x + s - low)[s == 0] > level).any()


def test_the_trained_schedule_beats_an_equally_long_untrained_one_on_matrices_it_has_not_seen():
    rng = np.random.default_rng(99)
    errors = []
    for plan in (trained(), geometric(len(trained().eta))):
        for seed in range(8):
            rng = np.random.default_rng(seed)
            x = plain_rpca.random_low_rank(128, 96, 16, 10, rng)
            hit = rng.random(x.shape) < 0.02
            s = np.where(hit, rng.uniform(-8, 8, x.shape) * np.abs(x).mean(), 0.0)
            noise = 0.01 * np.abs(x).mean() * rng.standard_normal(x.shape)
            errors.append(
                error(learned_rpca(torch.from_numpy(x + s + noise)[None], 16, 0.08, schedule=plan), x)
            )
    assert np.median(errors[:8]) < np.median(errors[8:])


def test_a_schedule_needs_one_threshold_more_than_steps():
    with pytest.raises(ValueError, match="one threshold more"):
        Schedule((1.0, 0.5), (0.5, 0.5))


def test_pcp_and_outlier_pursuit_come_close_to_the_optimum_of_their_convex_problem():
    rng = np.random.default_rng(0)
    from bitdgdm.quant import outlier_pursuit as op
    from bitdgdm.quant import pcp

    for w in (
        plain_rpca.random_low_rank(24, 36, 3, 10, rng) * 24 + 0.1 * rng.standard_normal((24, 36)),
        rng.standard_t(3, (36, 24)),
    ):
        for weight, dual, ours, plain in (
            (36**-0.5, pcp._largest_entry, pcp._shrink_entries, plain_rpca.shrink_entries),
            (3 / 14, op._longest_column, op._shrink_columns, plain_rpca.shrink_columns),
        ):

            def objective(low, w=w, weight=weight, columns=plain is plain_rpca.shrink_columns):
                rest = np.linalg.norm(w - low, axis=0) if columns else np.abs(w - low)
                return np.linalg.svd(low, compute_uv=False).sum() + weight * rest.sum()

            low, _ = pcp.minimise(torch.from_numpy(w)[None], weight, dual, ours, steps=200, tolerance=1e-7)
            best = objective(plain_rpca.pursue(w, weight, plain))
            assert best * (1 - 1e-6) <= objective(low[0].numpy()) <= 1.01 * best


@pytest.mark.parametrize("kappa", [1, 10, 100])
def test_outlier_pursuit_finds_the_columns_that_are_not_of_the_low_rank_part(kappa):
    rng = np.random.default_rng(1)
    x, _ = plain_rpca.low_rank_plus_sparse(128, 4, kappa)
    columns = rng.choice(128, 5, replace=False)
    x[:, columns] = 0.0
    s = np.zeros_like(x)
    s[:, columns] = 3 * np.abs(x).mean() * rng.standard_normal((128, 5))
    found = outlier_pursuit(torch.from_numpy(x + s)[None], 4, 5 / 128)
    assert np.array_equal(found.sparse[0].numpy(), s)
    assert error(found, x) <= 1e-9


@pytest.mark.parametrize("solve", EVERY)
def test_a_matrix_does_not_feel_its_companions_in_the_batch(solve):
    rng = np.random.default_rng(1)
    matrices = torch.from_numpy(rng.standard_normal((3, 24, 40)) * np.array([1.0, 1e-3, 50.0])[:, None, None])
    matrices[1, 3] *= 20
    together = solve(matrices, 4, 0.05)
    for i in range(3):
        alone = solve(matrices[i : i + 1], 4, 0.05)
        assert int(alone.steps) == int(together.steps[i])
        assert torch.equal(alone.sparse[0] != 0, together.sparse[i] != 0)
        assert torch.allclose(
            alone.left[0] @ alone.right[0].mT, together.left[i] @ together.right[i].mT, rtol=1e-8, atol=1e-8
        )


@pytest.mark.parametrize("solve", EVERY)
def test_degenerate_matrices_give_finite_parts(solve):
    rng = np.random.default_rng(2)
    rank_one = np.outer(rng.standard_normal(20), rng.standard_normal(30))
    huge = rng.standard_normal((20, 30))
    huge[:, 7] *= 1e6
    w = torch.from_numpy(np.stack([np.zeros((20, 30)), rank_one, huge])).float()
    found = solve(w, 8, 0.05)
    rebuilt = found.left @ found.right.mT + found.sparse
    assert rebuilt.isfinite().all() and rebuilt.dtype == torch.float32
    assert not rebuilt[0].any()
    assert float((rebuilt - w)[1].norm()) <= 1e-5 * float(w[1].norm())
    one_row = torch.from_numpy(rng.standard_normal((2, 1, 7))).float()
    assert solve(one_row, 1, 0.3).sparse.isfinite().all()
