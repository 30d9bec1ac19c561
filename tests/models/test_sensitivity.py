"""Run: .venv/bin/python -m pytest tests/models/test_sensitivity.py"""

import dataclasses

import pytest
import torch
from torch import nn

from bitdgdm.models.digress import GraphTransformer, build, quantizable, thresholds
from bitdgdm.models.digress_config import QM9_NO_H
from bitdgdm.models.divergence import held_out_states, predict
from bitdgdm.models.engine import TorchEngine
from bitdgdm.models.sensitivity import layers_of, loss, rows_a_graph
from bitdgdm.models.source import SourceModel, source_model
from bitdgdm.quant.decompose import decompose
from bitdgdm.quant.recipe import Recipe

SMALL = dataclasses.replace(QM9_NO_H, n_layers=2)


@pytest.fixture(scope="module")
def source() -> SourceModel:
    torch.manual_seed(0)
    return source_model(SMALL, GraphTransformer(SMALL).state_dict(), "small")


def test_replacing_a_linear_by_an_equal_one_loses_nothing_and_by_another_one_something(
    source: SourceModel,
) -> None:
    states = held_out_states(SMALL, molecules=6, times=3)
    full = TorchEngine(build(SMALL, source.weights), SMALL)
    reference = predict(full, states)
    name = "tf_layers.0.self_attn.e_out"
    same = nn.Linear(256, 64)
    same.load_state_dict({key: source.weights[f"{name}.{key}"].float() for key in ("weight", "bias")})
    assert loss(source, {name: same}, reference, states).kl == pytest.approx(0.0, abs=1e-12)
    with torch.no_grad():
        same.weight.mul_(1.5)
    assert loss(source, {name: same}, reference, states).kl > 1e-7


def test_layers_have_the_thresholds_of_an_artifact(source: SourceModel) -> None:
    recipe = Recipe("r", 4, 4, outlier_sigma=3.0)
    names = ("tf_layers.1.self_attn.q", "tf_layers.1.self_attn.e_out", "tf_layers.1.linX2")
    parts = {n: decompose(source.weights[f"{n}.weight"], recipe, contributions=False)[0] for n in names}
    layers = layers_of(source, parts, recipe)
    wanted = thresholds(source.weights, SMALL, 3.0)
    assert torch.equal(layers[names[0]].tau, wanted[names[0]])
    for name in names[1:]:  # no LayerNorm gives their inputs: each token's own size decides
        assert layers[name].tau is None and name not in wanted
    assert torch.equal(layers[names[0]].bias, source.weights[f"{names[0]}.bias"].float())


def test_rows_are_those_that_the_network_shows_each_linear(source: SourceModel) -> None:
    states = held_out_states(SMALL, molecules=6, times=3)
    network = build(SMALL, source.weights)
    dims: dict[str, int] = {}
    for name in quantizable(SMALL):
        network.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, name=name: dims.__setitem__(name, inputs[0].ndim)
        )
    states[0].logits(TorchEngine(network, SMALL))
    n = torch.cat([s.mask.sum(1) for s in states]).double()
    by_dims = {2: 1.0, 3: float(n.mean()), 4: float((n**2).mean())}
    for name in quantizable(SMALL):
        if name.endswith((".x_y.lin", ".e_y.lin")):  # rows are pooled inside of the module
            assert rows_a_graph(name, states) == 1.0
        else:
            assert rows_a_graph(name, states) == pytest.approx(by_dims[dims[name]])
