"""Run: .venv/bin/python -m pytest tests/models/test_threshold_rules.py -q"""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bitdgdm.models.calibrate import calibrate
from bitdgdm.models.digress import build, dead, layer_linears, quantizable, thresholds
from bitdgdm.models.divergence import held_out_states
from bitdgdm.models.features import network_input
from bitdgdm.models.outliers import outliers_beyond
from bitdgdm.models.source import load_source
from bitdgdm.models.threshold_rules import all_thresholds, bounds, limit_of, rule_of, rules, sampled_threshold
from bitdgdm.models.trajectory import walk
from bitdgdm.quant.stats import stats_of_rows

SHIPPED = load_source("builtin:digress-qm9")


def test_a_linear_is_called_layernorm_fed_if_and_only_if_it_reads_a_layer_norms_output() -> None:
    net = build(SHIPPED.config, SHIPPED.weights)
    normed: list[Tensor] = []
    fed: dict[str, bool] = {}
    negative: dict[str, bool] = {}
    for name, module in net.named_modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_hook(lambda _, __, out: normed.append(out))
        elif isinstance(module, nn.Linear) and name.startswith("tf_layers"):

            def note(_: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
                fed[name] = any(inputs[0] is out for out in normed)
                negative[name] = bool((inputs[0] < 0).any())

            module.register_forward_pre_hook(note)
    s = held_out_states(SHIPPED.config, molecules=8, times=1)[0]
    with torch.no_grad():
        net(*network_input(s.X, s.E, torch.full((8,), s.t / 500), s.mask, SHIPPED.config), s.mask)
    found = rules(SHIPPED.config)
    assert set(found) == set(fed) == set(quantizable(SHIPPED.config))
    assert {n for n, rule in found.items() if rule == "layernorm"} == {
        n for n, is_fed in fed.items() if is_fed
    }
    relu = {n for n, rule in found.items() if rule == "relu"}
    assert not any(negative[n] for n in relu) and {n.rsplit(".")[-1] for n in relu} == {
        "linX2",
        "linE2",
        "lin_y2",
    }


def test_the_table_names_the_same_linears_as_the_closed_forms() -> None:
    found = rules(SHIPPED.config)
    closed = {n for n, rule in found.items() if rule == "layernorm"}
    assert closed == set(thresholds(SHIPPED.weights, SHIPPED.config, 3.0))
    assert set(bounds(SHIPPED)) == {n for n, rule in found.items() if rule != "sampled"}
    for name in layer_linears(SHIPPED.config):
        assert rule_of(name) in ("layernorm", "relu", "sampled") or name in dead(SHIPPED.config)


@pytest.mark.parametrize("name", ["mlp_in_X.0", "tf_layers.x.linX1", "tf_layers.3", "linX1"])
def test_what_is_no_linear_of_a_layer_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="no Linear of a layer"):
        rule_of(name)


def test_bounds_and_limits_hold_for_every_token_of_real_trajectories() -> None:
    names = tuple(bounds(SHIPPED))
    top, k = bounds(SHIPPED), 2.5
    taus = thresholds(SHIPPED.weights, SHIPPED.config, k)
    closest = dict.fromkeys(names, 0.0)
    seen = dict.fromkeys(names, 0)

    def visit(name: str, where: str, t: int, rows: Tensor) -> None:
        slack = 1e-4 * float(top[name].max())
        assert bool((rows.abs() <= top[name] + slack).all()), name
        closest[name] = max(closest[name], float((rows.abs() / (top[name] + slack)).max()))
        limit = limit_of(name, rows.shape[1], k)
        if limit is not None:
            assert int((rows.abs() > taus[name] + slack).sum(1).max()) <= limit, name
        seen[name] += len(rows)

    walk(SHIPPED, names, visit, molecules=8, steps=10, seed=3)
    assert min(seen.values()) == 80 and max(seen.values()) > 5000
    assert max(closest.values()) > 0.3  # the bounds are no empty promise


def test_a_sampled_threshold_is_exceeded_by_the_fraction_asked_for() -> None:
    rng = np.random.default_rng(1)
    rows = torch.from_numpy(rng.standard_t(3, (500, 12)).astype(np.float32))
    stats = stats_of_rows(rows, torch.ones(500, dtype=torch.int64), 10)
    for fraction in (0.001, 0.01, 0.2):
        tau = sampled_threshold(stats, fraction)
        assert tau.shape == (12,) and len(tau.unique()) == 1
        assert float((rows.abs() > tau).double().mean()) == pytest.approx(fraction, abs=1 / 6000)
        assert float(tau[0]) == pytest.approx(float(np.quantile(rows.abs().numpy(), 1 - fraction)), rel=0.05)
    with pytest.raises(ValueError, match="between 0 and 1"):
        sampled_threshold(stats, 0.0)


def test_a_layer_of_zeros_and_a_single_row_have_a_threshold() -> None:
    zero = stats_of_rows(torch.zeros(1, 4), torch.ones(1, dtype=torch.int64), 10)
    assert torch.equal(sampled_threshold(zero, 0.01), torch.zeros(4))


def test_every_linear_gets_thresholds_and_new_trajectories_exceed_the_sampled_ones_as_often() -> None:
    names = quantizable(SHIPPED.config)
    sampled = [n for n in names if rule_of(n) != "layernorm"]
    stats = calibrate(SHIPPED, sampled, molecules=24, steps=10, seed=1)
    taus = all_thresholds(SHIPPED, 3.0, stats, 0.01)
    assert set(taus) == set(names)
    rows = outliers_beyond(SHIPPED, taus, 3.0, molecules=16, steps=10, seed=2)
    assert [r["layer"] for r in rows] == list(taus)
    fractions = {r["layer"]: r["outlier_fraction"] for r in rows}
    assert np.median([fractions[n] for n in sampled]) == pytest.approx(0.01, rel=0.25)
    for r in rows:
        if r["rule"] == "layernorm":
            assert r["outliers_of_a_row"] <= r["limit"] == math.ceil(taus[r["layer"]].numel() / 9) - 1
            assert r["outlier_fraction"] < 0.02
        else:
            assert r["limit"] is None


def test_counts_beyond_a_threshold_equal_a_count_by_hand() -> None:
    name = "tf_layers.2.self_attn.x_out"
    tau = torch.full((256,), 0.7)
    kept: list[Tensor] = []
    walk(SHIPPED, [name], lambda *a: kept.append(a[3].clone()), molecules=5, steps=4, seed=9)
    everything = torch.cat(kept).numpy()
    (row,) = outliers_beyond(SHIPPED, {name: tau}, 3.0, molecules=5, steps=4, seed=9)
    outside = np.abs(everything) > np.float32(0.7)
    assert row["rows"] == len(everything)
    assert row["outlier_fraction"] == pytest.approx(outside.mean(), rel=1e-12)
    assert row["outliers_of_a_row"] == outside.sum(1).max()
