"""Run: .venv/bin/python -m pytest tests/models/test_outliers.py -q"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from bitdgdm.models.digress import GraphTransformer, quantizable
from bitdgdm.models.digress_config import QM9_NO_H, Dims, HiddenDims
from bitdgdm.models.noise import steps as times_of
from bitdgdm.models.outliers import layer_outliers, spectra
from bitdgdm.models.source import SourceModel, source_model
from bitdgdm.models.trajectory import walk

TINY = replace(
    QM9_NO_H,
    n_layers=2,
    diffusion_steps=20,
    hidden_mlp_dims=Dims(X=16, E=12, y=12),
    hidden_dims=HiddenDims(dx=16, de=8, dy=8, n_head=4, dim_ffX=16, dim_ffE=8, dim_ffy=24),
)


@pytest.fixture(scope="module")
def model() -> SourceModel:
    torch.manual_seed(4)
    return source_model(TINY, GraphTransformer(TINY).state_dict(), "tiny")


def rounding_error(x: np.ndarray, asymmetric: bool) -> float:
    """Sum of squares, row by row, value by value: the nearest of the 16 (or 15) points of the row's grid."""
    total = 0.0
    for row in x:
        if asymmetric:
            step = (max(row.max(), 0) - min(row.min(), 0)) / 15
            zero = round(min(row.min(), 0) / step) if step else 0
            grid = (zero + np.arange(16)) * step
        else:
            grid = np.arange(-7, 8) * (np.abs(row).max() / 7)
        total += (np.abs(row[:, None] - grid).min(1) ** 2).sum()
    return total


@pytest.mark.parametrize("kind", ["e_out", "linX2", "y_x_mul"])
def test_a_row_equals_its_definition_over_all_rows_of_the_bin(model: SourceModel, kind: str) -> None:
    table = layer_outliers(model, sigma=1.5, bins=4, molecules=6, steps=8, seed=5)
    (name,) = (n for n in quantizable(TINY) if n.startswith("tf_layers.1.") and n.endswith("." + kind))
    seen: list[tuple[int, Tensor]] = []
    walk(model, [name], lambda _, __, t, x: seen.append((t, x.clone())), molecules=6, steps=8, seed=5)
    for row in (r for r in table if r["layer"] == name):
        x = torch.cat([v for t, v in seen if (t - 1) * 4 // 20 == row["bin"]]).double().numpy()
        outlier = np.abs(x) > 1.5 * np.sqrt((x**2).mean(1, keepdims=True))
        assert row["rows"] == len(x) and row["kind"] == kind and row["index"] == 1
        assert row["outlier_fraction"] == pytest.approx(outlier.mean())
        assert row["outliers_of_a_row"] == outlier.sum(1).max() <= row["limit"]
        centred = x - x.mean()
        assert row["kurtosis"] == pytest.approx((centred**4).mean() / x.var() ** 2, rel=1e-6)
        assert row["max_over_sigma"] == pytest.approx(np.abs(x).max() / x.std(), rel=1e-6)
        size = (x**2).sum()
        for column, rows, asymmetric in (
            ("error_symmetric", x, False),
            ("error_asymmetric", x, True),
            ("error_without_outliers", np.where(outlier, 0, x), True),
        ):
            assert row[column] == pytest.approx(np.sqrt(rounding_error(rows, asymmetric) / size), rel=0.02)


def test_every_linear_has_a_row_for_every_bin_that_the_steps_reach(model: SourceModel) -> None:
    told: list[float] = []
    table = layer_outliers(model, bins=5, molecules=3, steps=8, progress=told.append)
    reached = {(t - 1) * 5 // 20 for t in times_of(20, 8)[:-1]}
    assert {(r["layer"], r["bin"]) for r in table} == {(n, b) for n in quantizable(TINY) for b in reached}
    for r in table:
        inside = {t for t in range(1, 21) if (t - 1) * 5 // 20 == r["bin"]}
        assert (r["t_low"], r["t_high"]) == (min(inside), max(inside))
        assert all(isinstance(v, str | int | float) for v in r.values())
    assert told[-1] == 1.0


def test_spectra_are_those_of_numpy_and_their_energy_adds_up(model: SourceModel) -> None:
    table = spectra(model)
    for name in quantizable(TINY):
        rows = [r for r in table if r["layer"] == name]
        w = model.weights[f"{name}.weight"].double().numpy()
        expected = np.linalg.svd(w, compute_uv=False)
        assert [r["component"] for r in rows] == list(range(1, min(w.shape) + 1))
        np.testing.assert_allclose([r["singular_value"] for r in rows], expected, rtol=1e-10, atol=1e-12)
        assert rows[-1]["energy"] == pytest.approx(1.0)
        assert rows[2]["energy"] == pytest.approx((expected[:3] ** 2).sum() / (w**2).sum())


def test_the_spectrum_of_a_weight_of_zeros_has_no_energy_and_no_nan(model: SourceModel) -> None:
    name = "tf_layers.0.self_attn.q.weight"
    empty = replace(model, weights={**model.weights, name: torch.zeros_like(model.weights[name])})
    assert {r["energy"] for r in spectra(empty) if f"{r['layer']}.weight" == name} == {0.0}
