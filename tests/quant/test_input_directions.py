"""Run: .venv/bin/python -m pytest tests/quant/test_input_directions.py

Recipes with low_rank_metric "input": the principal directions of the inputs are taken out before rounding.
"""

import numpy as np
import pytest
import torch

from bitdgdm.quant.decompose import decompose
from bitdgdm.quant.linear import QuantLinear
from bitdgdm.quant.low_rank import principal
from bitdgdm.quant.parts import factors
from bitdgdm.quant.recipe import Recipe
from bitdgdm.quant.stats import stats_of_rows

PLAIN = Recipe("plain", 4, 4, act_asymmetric=True)
DEFLATED = PLAIN.changed(name="deflated", rank=3, solver="svd", low_rank_metric="input", rounding="gptq")


def correlated(rows, width, strong, seed=0):
    """Rows whose energy lies in `strong` directions but for one part in a hundred."""
    rng = np.random.default_rng(seed)
    directions = np.linalg.qr(rng.normal(size=(width, strong)))[0]
    x = 3 * rng.normal(size=(rows, strong)) @ directions.T + 0.03 * rng.normal(size=(rows, width))
    return torch.tensor(x, dtype=torch.float32), torch.tensor(directions, dtype=torch.float32)


def lost(recipe, w, x, stats):
    layer = QuantLinear.from_parts(decompose(w, recipe, stats, contributions=False)[0], None, recipe)
    wanted = x.double() @ w.double().T
    return float((layer(x).double() - wanted).norm() / wanted.norm())


def test_inputs_inside_the_directions_are_not_rounded_at_all():
    x, directions = correlated(500, 48, 3)
    w = torch.tensor(np.random.default_rng(1).normal(size=(20, 48)), dtype=torch.float32)
    inside = torch.randn(9, 3, generator=torch.Generator().manual_seed(0)) @ directions.T
    stats = stats_of_rows(x, torch.ones(500), 10)
    assert lost(DEFLATED, w, inside, stats) < 0.01
    assert lost(PLAIN, w, inside, stats) > 0.05


def test_correlated_inputs_lose_far_less_at_the_same_bits_of_the_codes():
    x, _ = correlated(500, 48, 3)
    w = torch.tensor(np.random.default_rng(1).normal(size=(20, 48)), dtype=torch.float32)
    stats = stats_of_rows(x, torch.ones(500), 10)
    assert lost(DEFLATED, w, x, stats) < 0.2 * lost(PLAIN.changed(rounding="gptq"), w, x, stats)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_the_up_factor_is_the_weight_times_the_stored_directions(bits):
    x, _ = correlated(300, 32, 4)
    w = torch.tensor(np.random.default_rng(2).normal(size=(8, 32)), dtype=torch.float32)
    recipe = DEFLATED.changed(factor_bits=bits)
    up, down = factors(decompose(w, recipe, stats_of_rows(x, torch.ones(300), 10))[0])
    step = (w @ down).abs().amax(dim=0) / {4: 7, 8: 127, 16: 128}[bits]
    assert ((up - w @ down).abs() <= 0.51 * step + 1e-6).all()


def test_directions_are_orthonormal_and_hold_the_most_energy_of_any():
    x, _ = correlated(400, 20, 5, seed=3)
    moment = (x.double().T @ x.double() / 400)[None]
    found = principal(moment, 4)[0].double()
    assert torch.allclose(found.T @ found, torch.eye(4, dtype=torch.float64), atol=1e-6)
    held = float(torch.trace(found.T @ moment[0] @ found))
    assert held == pytest.approx(float(torch.linalg.svdvals(x.double())[:4].square().sum() / 400), rel=1e-6)
    assert (found.gather(0, found.abs().argmax(dim=0, keepdim=True)) > 0).all()


def test_more_directions_than_the_inputs_have_leave_nothing_and_still_round():
    x = torch.zeros(50, 6)
    x[:, 0] = torch.linspace(-1, 1, 50)
    w = torch.arange(18.0).view(3, 6)
    assert lost(DEFLATED, w, x, stats_of_rows(x, torch.ones(50), 10)) < 0.01
