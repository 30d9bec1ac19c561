"""Run: .venv/bin/python -m pytest tests/quant/test_binary.py"""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bitdgdm.quant.binary import binarize, partly_binary, salient_mask
from bitdgdm.quant.robust_pca import budget

matrices = hnp.arrays(
    np.float32, st.tuples(st.integers(1, 5), st.integers(1, 12)), elements=st.floats(-1e6, 1e6, width=32)
)


@given(matrices)
def test_the_scale_is_the_least_squares_one(w):
    codes, scale = binarize(torch.from_numpy(w))
    signs, wide = codes.double().numpy(), w.astype(np.float64)
    assert set(np.unique(signs)) <= {-1.0, 1.0}
    best = (signs * wide).sum(axis=1) / (signs * signs).sum(axis=1)
    assert np.allclose(scale.double().numpy(), best, rtol=2.0**-8)
    for other in (0.9, 1.1):
        lost = np.square(wide - signs * best[:, None]).sum(axis=1)
        assert (lost <= np.square(wide - signs * (best * other)[:, None]).sum(axis=1) * (1 + 1e-12)).all()


@settings(deadline=None)
@given(matrices, st.sampled_from([0.1, 0.3, 0.6]))
def test_salient_entries_come_back_and_stay_within_alpha(w, alpha):
    codes, scale, rest = partly_binary(torch.from_numpy(w), alpha)
    mask = salient_mask(torch.from_numpy(w), alpha)
    assert (mask.sum(dim=1) <= budget(alpha, w.shape[1])).all()
    assert (mask.sum(dim=0) <= budget(alpha, w.shape[0])).all()
    assert not rest[~mask].any()
    found = codes.double() * scale.double()[:, None] + rest.double()
    assert np.allclose(found[mask].numpy(), w[mask.numpy()], rtol=1e-6, atol=1e-6 * (np.abs(w).max() + 1e-30))


def test_the_scale_ignores_salient_entries():
    w = torch.tensor([[1.0, -1.0, 100.0, 1.0], [2.0, 2.0, -2.0, 0.0]])
    mask = torch.tensor([[False, False, True, False], [True, True, True, True]])
    assert binarize(w, mask)[1].tolist() == [1.0, 0.0]


def test_a_row_of_zeros_comes_back_as_zeros():
    codes, scale, rest = partly_binary(torch.zeros(2, 5), 0.2)
    assert not (codes * scale[:, None]).any() and not rest.any()


def test_inputs_decide_what_is_salient_by_the_published_score():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 20)) * np.exp(2 * rng.normal(size=20))
    moment = x.T @ x / len(x)
    damped = moment + 0.01 * np.diag(moment).mean() * np.eye(20)
    w = rng.normal(size=(1, 20))
    score = np.square(w) / np.square(np.diag(np.linalg.inv(damped)))
    mask = salient_mask(torch.from_numpy(w), 0.2, torch.from_numpy(moment)).numpy()
    assert set(np.flatnonzero(mask[0])) == set(np.argsort(-score[0])[:4])
    assert not np.array_equal(mask, salient_mask(torch.from_numpy(w), 0.2).numpy())
