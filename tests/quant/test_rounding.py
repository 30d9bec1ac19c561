"""Run: .venv/bin/python -m pytest tests/quant/test_rounding.py"""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bitdgdm.quant.rounding import round_weights

finite = st.floats(-(2.0**20), 2.0**20, width=32)
matrices = hnp.arrays(np.float32, st.tuples(st.integers(1, 6), st.integers(1, 12)), elements=finite)


def rebuilt(codes, scale):
    return codes.double().numpy() * scale.double().numpy()[:, None]


@given(matrices, st.sampled_from([4, 8]))
def test_absmax_rounding_is_within_half_a_step_and_clips_nothing(w, bits):
    codes, scale = round_weights(torch.from_numpy(w), bits, "absmax")
    assert int(codes.abs().max()) <= 2 ** (bits - 1) - 1
    step = scale.double().numpy()[:, None]
    assert (np.abs(rebuilt(codes, scale) - w) <= step * (0.5 + 1e-6)).all()


@given(matrices, st.sampled_from([4, 8]))
def test_the_scale_is_at_most_one_part_in_128_coarser_than_absmax(w, bits):
    _, scale = round_weights(torch.from_numpy(w), bits, "absmax")
    ideal = np.abs(w.astype(np.float64)).max(axis=1) / (2 ** (bits - 1) - 1)
    assert (scale.double().numpy() <= np.maximum(ideal * (1 + 2.0**-7), 2.0**-125)).all()


@given(matrices, st.sampled_from([4, 8]))
def test_the_clip_search_never_does_worse_than_absmax(w, bits):
    errors = [
        np.square(rebuilt(*round_weights(torch.from_numpy(w), bits, clip)) - w).sum(axis=1)
        for clip in ("mse", "absmax")
    ]
    assert (errors[0] <= errors[1] * (1 + 1e-5) + 1e-30).all()


def test_the_clip_search_finds_the_best_scale_of_a_fine_brute_force_grid():
    w = np.random.default_rng(0).standard_t(4, (8, 64)).astype(np.float32)
    codes, scale = round_weights(torch.from_numpy(w), 4, "mse")
    found = np.square(rebuilt(codes, scale) - w).sum(axis=1)
    for row in range(8):
        steps = np.abs(w[row]).max() / 7 * np.linspace(0.4, 1.0, 2000)[:, None]
        best = np.square(np.clip(np.rint(w[row] / steps), -8, 7) * steps - w[row]).sum(axis=1).min()
        assert found[row] <= 1.02 * best


def test_a_row_of_zeros_comes_back_as_zeros():
    w = torch.tensor([[0.0, 0.0, 0.0], [1.0, -2.0, 0.5]])
    for clip in ("absmax", "mse"):
        codes, scale = round_weights(w, 4, clip)
        assert not codes[0].any() and bool(torch.isfinite(scale.float()).all())


@pytest.mark.parametrize("size", [1e-42, 1e-38, 1e30, 3e38])
def test_denormal_and_huge_weights_give_finite_codes_and_scales(size):
    w = torch.tensor([[1.0, -0.5, 0.25, 0.0]]) * size
    for clip in ("absmax", "mse"):
        codes, scale = round_weights(w, 4, clip)
        back = rebuilt(codes, scale)
        assert np.isfinite(back).all() and np.abs(back - w.numpy()).max() <= 0.1 * size + 1e-37
