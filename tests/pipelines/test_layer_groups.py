"""Run: pytest tests/pipelines/test_layer_groups.py"""

import torch
from hypothesis import given
from hypothesis import strategies as st

from bitdgdm.pipelines.layer_groups import MOST_LAYERS, MOST_MOMENTS, MOST_WEIGHTS, layer_groups
from bitdgdm.quant.recipe import Recipe

RECIPE = Recipe("mixed", 4, 4, overrides=(("*.out", (("weight_bits", 8),)), ("*.skip", (("act_bits", 8),))))
shapes = st.sampled_from([(3, 5), (5, 3), (256, 256), (64, 2048), (2000, 2000)])
networks = st.lists(st.tuples(shapes, st.sampled_from(["in", "out", "skip"])), min_size=1, max_size=60)


@given(networks)
def test_each_layer_is_in_one_group_of_its_shape_and_recipe_and_no_group_is_too_large(network):
    weights = {f"{i}.{kind}": torch.empty(shape) for i, (shape, kind) in enumerate(network)}
    groups = layer_groups(weights, RECIPE)
    assert sorted(name for group in groups for name in group.names) == sorted(weights)
    for group in groups:
        assert all(tuple(weights[name].shape) == group.shape for name in group.names)
        assert all(RECIPE.for_layer(name) == group.recipe for name in group.names)
        assert len(group.names) <= MOST_LAYERS
        assert len(group.names) == 1 or group.weights <= MOST_WEIGHTS
        order = [list(weights).index(name) for name in group.names]
        assert order == sorted(order)
    sizes = [group.weights for group in groups]
    assert sizes == sorted(sizes, reverse=True)


@given(networks)
def test_groups_do_not_depend_on_the_values_of_the_weights(network):
    names = [f"{i}.{kind}" for i, (_, kind) in enumerate(network)]
    zeros = {name: torch.zeros(shape) for name, (shape, _) in zip(names, network, strict=True)}
    ones = {name: torch.ones(shape) for name, (shape, _) in zip(names, network, strict=True)}
    assert layer_groups(zeros, RECIPE) == layer_groups(ones, RECIPE)


@given(networks)
def test_a_group_that_is_calibrated_holds_few_moments_of_wide_inputs(network):
    weights = {f"{i}.{kind}": torch.empty(shape) for i, (shape, kind) in enumerate(network)}
    for group in layer_groups(weights, Recipe("seen", 4, 4, rounding="gptq", calibration="uniform")):
        assert len(group.names) == 1 or len(group.names) * group.shape[1] ** 2 <= MOST_MOMENTS


def test_alike_layers_are_spread_evenly():
    weights = {str(i): torch.empty(4, 4) for i in range(MOST_LAYERS + 1)}
    lengths = [len(group.names) for group in layer_groups(weights, Recipe("plain", 8, 8))]
    assert sum(lengths) == MOST_LAYERS + 1 and max(lengths) - min(lengths) <= 1
