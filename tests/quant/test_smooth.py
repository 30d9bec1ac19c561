"""Run: .venv/bin/python -m pytest tests/quant/test_smooth.py"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bitdgdm.quant.smooth import smooth_scale

sizes = st.floats(0, 1e6, width=32)


@settings(deadline=None)
@given(
    hnp.arrays(np.float32, (3, 5), elements=st.floats(-1e6, 1e6, width=32)),
    hnp.arrays(np.float32, 5, elements=sizes),
    st.floats(0, 1),
)
def test_smoothing_leaves_the_product_unchanged(w, act, strength):
    s = smooth_scale(torch.from_numpy(w), torch.from_numpy(act), strength).double()
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(4, 5))) * torch.from_numpy(act).double()
    wide = torch.from_numpy(w).double()
    exact, smoothed = x @ wide.T, (x / s) @ (wide * s).T
    limit = x.abs() @ wide.abs().T
    assert ((smoothed - exact).abs() <= 1e-14 * limit + 1e-300).all()
    assert (s > 0).all() and torch.isfinite(s).all()
    assert torch.equal(s, s.to(torch.bfloat16).double())


@pytest.mark.parametrize("strength", [0.0, 0.25, 0.5, 1.0])
def test_the_scale_is_the_published_ratio_up_to_one_factor(strength):
    rng = np.random.default_rng(1)
    w, act = rng.normal(size=(8, 6)), np.exp(rng.normal(size=6))
    expected = act**strength / np.abs(w).max(axis=0) ** (1 - strength)
    ratio = smooth_scale(torch.from_numpy(w), torch.from_numpy(act), strength).numpy() / expected
    assert np.allclose(ratio, ratio[0], rtol=2.0**-7)


def test_half_strength_makes_both_sides_equally_large():
    rng = np.random.default_rng(2)
    w, act = torch.from_numpy(rng.normal(size=(8, 6))), torch.from_numpy(np.exp(3 * rng.normal(size=6)))
    s = smooth_scale(w, act, 0.5).double()
    ratio = (act / s) / (w * s).abs().amax(dim=0)
    assert float(ratio.max() / ratio.min()) < 1.02


def test_channels_that_are_never_used_keep_scale_one():
    w = torch.tensor([[1.0, 0.0, 2.0], [3.0, 0.0, -1.0]])
    assert smooth_scale(w, torch.tensor([0.0, 5.0, 4.0]), 0.5)[:2].tolist() == [1.0, 1.0]
    assert smooth_scale(torch.zeros(2, 3), torch.zeros(3), 0.5).tolist() == [1.0, 1.0, 1.0]


def test_a_layer_has_the_same_scale_alone_and_in_a_batch():
    w, act = torch.randn(3, 4, 6), torch.rand(3, 6)
    batched = smooth_scale(w, act, 0.3)
    assert all(torch.equal(batched[i], smooth_scale(w[i], act[i], 0.3)) for i in range(3))
