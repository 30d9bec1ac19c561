"""Run: .venv/bin/python -m pytest tests/models/test_distill.py -q"""

from dataclasses import replace

import pytest
import torch

from bitdgdm.models.digress import GraphTransformer, build, quantizable
from bitdgdm.models.digress_config import QM9_NO_H, Dims, HiddenDims
from bitdgdm.models.distill import Batches, divergence_loss, quantized, repaired
from bitdgdm.models.divergence import divergence, own_states, predict
from bitdgdm.models.engine import TorchEngine
from bitdgdm.models.source import SourceModel, source_model
from bitdgdm.quant.artifact import Layer
from bitdgdm.quant.decompose import decompose
from bitdgdm.quant.recipe import Recipe

TINY = replace(
    QM9_NO_H,
    n_layers=2,
    diffusion_steps=20,
    hidden_mlp_dims=Dims(X=16, E=12, y=12),
    hidden_dims=HiddenDims(dx=16, de=8, dy=8, n_head=4, dim_ffX=16, dim_ffE=8, dim_ffy=24),
)
RECIPE = Recipe(
    "test-w3a8-r2", weight_bits=3, act_bits=8, factor_bits=8, repair_steps=40, repair_rank=2, calibration="uniform",
    overrides=(
        ("*.linX2", (("factor_bits", 16),)),
        ("*.linE2", (("repair_steps", 0), ("repair_rank", 0))),
        ("*.y_y", (("weight_bits", 16),)),
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> SourceModel:
    torch.manual_seed(2)
    return source_model(TINY, GraphTransformer(TINY).state_dict(), "tiny")


@pytest.fixture(scope="module")
def layers(model: SourceModel) -> dict[str, Layer]:
    plain = replace(RECIPE, repair_steps=0, repair_rank=0, calibration="none")
    return {
        name: (
            decompose(model.weights[f"{name}.weight"], plain.for_layer(name))[0],
            model.weights[f"{name}.bias"],
            None,
        )
        for name in quantizable(TINY)
    }


def test_repair_brings_predictions_nearer_on_molecules_that_it_did_not_see(
    model: SourceModel, layers: dict[str, Layer]
) -> None:
    reference = TorchEngine(build(TINY, model.weights), TINY)
    unseen = own_states(reference, TINY, 24, 10, seed=77)
    told: list[float] = []
    found = repaired(model, RECIPE, layers, molecules=32, steps=10, seed=1, progress=told.append)
    before, after = (
        divergence(reference, TorchEngine(quantized(model, RECIPE, these), TINY), unseen).kl
        for these in (layers, found)
    )
    assert after < 0.75 * before
    assert told == sorted(told) and told[-1] == pytest.approx(1.0)
    for name, (parts, bias, _) in found.items():
        assert bias is not None and not torch.equal(bias, model.weights[f"{name}.bias"])
        if name.endswith(("linE2", "y_y")):
            assert parts is layers[name][0]
            continue
        assert parts.proj_up is not None and parts.proj_up.shape[1] == 2
        assert parts.proj_up.dtype == (torch.bfloat16 if name.endswith("linX2") else torch.int8)
        assert parts.qweight is layers[name][0].qweight


def test_the_loss_is_the_divergence_that_is_reported(model: SourceModel, layers: dict[str, Layer]) -> None:
    reference = TorchEngine(build(TINY, model.weights), TINY)
    states = own_states(reference, TINY, 12, 4, seed=3)[1:2]
    wanted = predict(reference, states)
    net = quantized(model, RECIPE, layers)
    loss = divergence_loss(net, TINY, states[0], wanted.X[0], wanted.E[0])
    reported = divergence(wanted, TorchEngine(net, TINY), states).kl
    assert float(loss) == pytest.approx(reported, rel=1e-3)


def test_every_time_is_seen_once_before_any_is_seen_again(model: SourceModel) -> None:
    reference = TorchEngine(build(TINY, model.weights), TINY)
    states = own_states(reference, TINY, 20, 6, seed=3)
    batches = Batches(states, predict(reference, states), 5, torch.device("cpu"))
    seen = [batches.of(k) for k in range(12)]
    times = [s.t for s, _, _ in seen]
    assert sorted(times[:6]) == sorted(times[6:]) == sorted(s.t for s in states) and times[:6] != times[6:]
    for s, x, e in seen:
        assert len(s) == 16 == len(x) == len(e)
        fresh = predict(reference, [s])
        torch.testing.assert_close(fresh.X[0], x, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(fresh.E[0], e, atol=1e-4, rtol=1e-4)
