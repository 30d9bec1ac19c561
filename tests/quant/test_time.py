"""Run: .venv/bin/python -m pytest tests/quant/test_time.py

Static activation tables: which entry a diffusion time takes, and that a network is told the time.
"""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bitdgdm.quant.activations import largest_entries
from bitdgdm.quant.decompose import decompose
from bitdgdm.quant.linear import QuantLinear, set_time
from bitdgdm.quant.recipe import Recipe
from tests.quant.samples import T, any_stats

STATIC = Recipe("static", 8, 8, act_scale="static", act_bins=5, calibration="uniform")


def layer(recipe=STATIC, width=12):
    w = torch.randn(6, width, generator=torch.Generator().manual_seed(0))
    return QuantLinear.from_parts(decompose(w, recipe, any_stats(width))[0], None, recipe)


@given(st.integers(1, 12))
def test_bins_of_equal_length_follow_the_formula(bins):
    recipe = STATIC.changed(act_bins=bins)
    found = layer(recipe).bin_of_t.numpy()[1:]
    assert np.array_equal(found, [min(bins - 1, (t - 1) * bins // T) for t in range(1, T + 1)])


@pytest.mark.parametrize("groups", ["equal", "learned", "smooth"])
def test_every_time_has_an_entry_of_the_table(groups):
    recipe = STATIC.changed(act_groups=groups, act_bins=1 if groups == "smooth" else 5)
    made = layer(recipe)
    assert len(made.bin_of_t) == T + 1
    assert int(made.bin_of_t.min()) >= 0 and int(made.bin_of_t.max()) < len(made.low)
    assert bool((made.low <= 0).all()) and bool((made.high >= 0).all())


def test_the_time_decides_where_inputs_saturate():
    made = layer()
    x = 1e3 * torch.ones(1, 12)
    outputs = []
    for t in (1, T):
        set_time(made, torch.tensor([t]))
        outputs.append(made(x))
        entry = int(made.bin_of_t[t])
        largest = float(max(made.high[entry], -made.low[entry]))
        assert torch.allclose(made(x), made(torch.full((1, 12), largest)), rtol=1e-5)
    assert not torch.allclose(*outputs)


def test_every_layer_of_a_network_is_told_and_layers_without_a_table_are_left_alone():
    network = nn.Sequential(layer(), nn.ReLU(), layer(Recipe("plain", 4, 4), width=6))
    set_time(network, torch.full((9,), T))
    assert int(network[0].time_bin) == 4 and network[2].time_bin is None
    set_time(network, torch.zeros(0, dtype=torch.int64))
    assert int(network[0].time_bin) == 4


def test_a_batch_of_several_times_is_refused():
    with pytest.raises(ValueError, match="one diffusion time"):
        set_time(layer(), torch.tensor([3, 4]))


def test_a_layer_with_several_bins_does_not_run_before_it_is_told_the_time():
    with pytest.raises(RuntimeError, match="set_time"):
        layer()(torch.zeros(1, 12))
    assert layer(STATIC.changed(act_bins=1))(torch.zeros(1, 12)).shape == (1, 6)


@given(
    st.lists(st.sampled_from([0.0, 1.0, -1.0, 2.0, -2.0, 3.0]), min_size=1, max_size=12), st.integers(1, 12)
)
def test_of_equal_entries_those_with_the_smaller_index_are_the_outliers(row, count):
    found = largest_entries(torch.tensor([row]), count)[0].tolist()
    order = sorted(range(len(row)), key=lambda i: (-abs(row[i]), i))[:count]
    assert found == [v if i in order else 0.0 for i, v in enumerate(row)]
