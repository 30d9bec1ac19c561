"""Run: .venv/bin/python -m pytest tests/quant/test_ranges.py"""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitdgdm.quant.activations import quantize_static
from bitdgdm.quant.ranges import (
    equal_bins,
    learned_bins,
    range_of_bins,
    smooth_range,
    static_range,
)

STEPS = 100


def drifting_rows(rows=600, width=16, seed=0, positive=False):
    """Inputs that grow tenfold over time."""
    rng = np.random.default_rng(seed)
    time = rng.integers(1, STEPS + 1, rows)
    x = rng.normal(size=(rows, width)) * 10.0 ** (time / STEPS)[:, None]
    return torch.tensor(np.abs(x) if positive else x, dtype=torch.float32), torch.tensor(time)


def lost(sample, bits, asymmetric, low, high):
    """Squared error of each row on its own range, by the codes that run."""
    total = 0.0
    for row, below, above in zip(sample, low, high, strict=True):
        q, scale = quantize_static(row[None], below[None], above[None], bits, asymmetric)
        total += float((q * scale - row).double().square().sum())
    return total


@pytest.mark.parametrize(("bins", "steps"), [(1, 500), (4, 500), (7, 50), (3, 2)])
def test_equal_bins_follow_their_formula(bins, steps):
    expected = [min(bins - 1, (t - 1) * bins // steps) for t in range(1, steps + 1)]
    assert equal_bins(bins, steps)[1:].tolist() == expected


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 5),
    st.sampled_from([4, 8]),
    st.booleans(),
    st.sampled_from(["absmax", "mse", "quantile"]),
    st.integers(0, 100),
)
def test_ranges_hold_zero_and_absmax_ones_hold_everything(bins, bits, asymmetric, how, seed):
    sample, time = drifting_rows(rows=40, width=3, seed=seed)
    low, high = static_range(sample, time, bits, asymmetric, bins, STEPS, how)
    assert low.shape == high.shape == (bins,) and bool((low <= 0).all()) and bool((high >= 0).all())
    assert asymmetric or torch.equal(low, -high)
    if how == "absmax":
        of_row = equal_bins(bins, STEPS).long()[time]
        assert (sample >= low[of_row, None]).all() and (sample <= high[of_row, None]).all()


@pytest.mark.parametrize("asymmetric", [False, True])
def test_the_best_range_beats_every_other_fraction_of_the_largest_entry(asymmetric):
    rng = np.random.default_rng(0)
    sample = torch.tensor(rng.standard_t(3, size=(200, 16)), dtype=torch.float32)
    time = torch.ones(200, dtype=torch.int64)
    low, high = static_range(sample, time, 4, asymmetric, 1, STEPS, "mse")
    found = lost(sample, 4, asymmetric, low.expand(200), high.expand(200))
    widest = static_range(sample, time, 4, asymmetric, 1, STEPS, "absmax")
    for fraction in np.linspace(0.05, 1, 40):
        ends = [(end * fraction).expand(200) for end in widest]
        assert found <= 1.05 * lost(sample, 4, asymmetric, *ends)


def test_a_quantile_range_leaves_out_a_thousandth_on_each_side():
    sample = torch.linspace(-1, 3, 10_001)[:, None]
    low, high = range_of_bins(sample, torch.zeros(10_001, dtype=torch.int64), 1, 4, True, "quantile")
    assert float(low) == pytest.approx(-0.996, abs=1e-3) and float(high) == pytest.approx(2.996, abs=1e-3)


@pytest.mark.parametrize("how", ["absmax", "mse", "quantile"])
def test_a_bin_without_rows_takes_the_range_of_the_nearest_one(how):
    sample = torch.tensor([[1.0, -2.0], [40.0, -30.0]])
    low, high = range_of_bins(sample, torch.tensor([1, 4]), 6, 8, True, how)
    assert torch.equal(high[[0, 2]], high[[1, 1]]) and torch.equal(high[[3, 5]], high[[4, 4]])
    assert torch.equal(low[[0, 2]], low[[1, 1]]) and float(high[4]) > float(high[1])


def test_rows_of_zeros_give_a_range_of_zero():
    sample, time = torch.zeros(5, 3), torch.arange(1, 6)
    for how in ("absmax", "mse", "quantile"):
        low, high = static_range(sample, time, 4, True, 2, STEPS, how)
        assert not low.any() and not high.any()
    assert learned_bins(sample, time, 4, True, 2, STEPS).max() <= 1
    assert not smooth_range(sample, time, 4, True, STEPS, iterations=3)[1].any()


@pytest.mark.parametrize("asymmetric", [False, True])
def test_more_bins_learned_bins_and_a_smooth_table_lower_the_error_of_drifting_inputs(asymmetric):
    sample, time = drifting_rows(positive=asymmetric)

    def error(bins, bin_of_t):
        of_row = bin_of_t.long()[time]
        low, high = range_of_bins(sample, of_row, bins, 4, asymmetric, "mse")
        return lost(sample, 4, asymmetric, low[of_row], high[of_row])

    one, four = error(1, equal_bins(1, STEPS)), error(4, equal_bins(4, STEPS))
    learned = error(4, learned_bins(sample, time, 4, asymmetric, 4, STEPS))
    low, high = smooth_range(sample, time, 4, asymmetric, STEPS)
    smooth = lost(sample, 4, asymmetric, low[time - 1], high[time - 1])
    assert learned <= four < one
    assert smooth < learned


def test_learned_bins_are_intervals_that_find_an_abrupt_change():
    time = torch.arange(1, STEPS + 1)
    sample = torch.randn(STEPS, 32, generator=torch.Generator().manual_seed(0))
    sample[time > 70] *= 50
    bins = learned_bins(sample, time, 4, False, 2, STEPS)
    assert bins.shape == (STEPS + 1,) and (bins.diff() >= 0).all()
    first = int((bins == 1).nonzero()[0])
    assert abs(first - 71) <= 2


def test_learned_bins_are_the_best_of_all_ways_to_cut():
    sample, time = drifting_rows(rows=80, width=4)
    time = (time - 1) // 10 + 1  # ten times
    found = learned_bins(sample, time, 4, False, 3, 10)

    def error(bin_of_t):
        of_row = bin_of_t.long()[time]
        low, high = range_of_bins(sample, of_row, 3, 4, False, "mse")
        return lost(sample, 4, False, low[of_row], high[of_row])

    every = []
    for first, second in itertools.combinations(range(2, 11), 2):
        t = torch.arange(11)
        every.append(error((t >= first).long() + (t >= second).long()))
    assert error(found) <= min(every) * (1 + 1e-5)


def test_a_smooth_table_is_the_same_every_time_and_changes_little_from_one_time_to_the_next():
    sample, time = drifting_rows()
    low, high = smooth_range(sample, time, 4, False, STEPS)
    again = smooth_range(sample, time, 4, False, STEPS)
    assert torch.equal(high, again[1]) and torch.equal(low, -high)
    assert float((high[1:] / high[:-1]).max()) < 1.3 and float(high[-1]) > 3 * float(high[0])
