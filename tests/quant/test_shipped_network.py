"""Run: .venv/bin/python -m pytest tests/quant/test_shipped_network.py

The recipes on the network that ships with the package, against errors computed here with NumPy.
"""

import dataclasses

import numpy as np
import pytest
import torch

from bitdgdm.models.digress import quantizable
from bitdgdm.models.source import load_source
from bitdgdm.quant.decompose import decompose
from bitdgdm.quant.recipe_book import get_recipe
from bitdgdm.quant.robust_pca import budget

R2 = get_recipe("bitdgdm-w4a4-r16-s1")


@pytest.fixture(scope="module")
def weights():
    """All Linears of two of the nine layers, by name."""
    source = load_source("builtin:digress-qm9")
    names = [n for n in quantizable(source.config) if n.startswith(("tf_layers.0.", "tf_layers.5."))]
    return {name: source.weights[f"{name}.weight"].float() for name in names}


def relative(w, approximation):
    return np.linalg.norm(approximation - w) / np.linalg.norm(w)


def nearest(w, step, low, high):
    return np.clip(np.rint(w / step), low, high) * step


def round_absmax(w, top):
    return nearest(w, np.abs(w).max(axis=1, keepdims=True) / top, -top, top)


def round_best_clip(w):
    """4 bit, the best of 60 steps of each row."""
    best, least = np.zeros_like(w), np.full((len(w), 1), np.inf)
    for fraction in np.linspace(0.4, 1, 60):
        back = nearest(w, np.maximum(np.abs(w).max(axis=1, keepdims=True) / 7 * fraction, 1e-30), -8, 7)
        error = np.square(back - w).sum(axis=1, keepdims=True)
        best, least = np.where(error < least, back, best), np.minimum(error, least)
    return best


def largest(a, alpha):
    keep = np.ones(a.shape, bool)
    for axis in (0, 1):
        keep &= np.argsort(np.argsort(-np.abs(a), axis=axis), axis=axis) < budget(alpha, a.shape[axis])
    return np.where(keep, a, 0.0)


@pytest.mark.parametrize(("name", "top"), [("rtn-w8a8", 127), ("rtn-w4a4", 7)])
def test_round_to_nearest_has_the_error_of_plain_absmax_rounding(weights, name, top):
    for layer, w in weights.items():
        wide = w.double().numpy()
        ours = decompose(w, get_recipe(name))[1].relative_error
        assert ours == pytest.approx(relative(wide, round_absmax(wide, top)), rel=0.03), layer


def test_the_published_method_is_as_close_as_alternating_exact_svd_and_threshold(weights):
    ours, reference = [], []
    for name, w in weights.items():
        if name.startswith("tf_layers.0."):
            continue
        wide = w.double().numpy()
        low_rank, sparse = np.zeros_like(wide), largest(wide, R2.alpha)
        for _ in range(3):
            u, s, vt = np.linalg.svd(wide - sparse, full_matrices=False)
            low_rank = u[:, : R2.rank] * s[: R2.rank] @ vt[: R2.rank]
            sparse = largest(wide - low_rank, R2.alpha)
        rest = wide - low_rank - sparse
        reference.append(relative(wide, low_rank + sparse + round_best_clip(rest)))
        ours.append(decompose(w, R2, contributions=False)[1].relative_error)
    assert np.median(ours) == pytest.approx(np.median(reference), rel=0.02)
    assert max(o / r for o, r in zip(ours, reference, strict=True)) < 1.08


def test_low_rank_and_sparse_part_both_lower_the_error_of_most_layers(weights):
    reports = [decompose(w, R2)[1] for name, w in weights.items() if name.startswith("tf_layers.5.")]
    for part in ("error_without_low_rank", "error_without_sparse", "error_dense"):
        lower = [report.relative_error < getattr(report, part) for report in reports]
        assert np.mean(lower) > 0.7, part


def test_factors_in_8_bit_cost_less_than_one_percent_of_error(weights):
    for layer in ("self_attn.q", "self_attn.e_out", "linE2", "lin_y2"):
        w = weights[f"tf_layers.5.{layer}"]
        eight, sixteen = (
            decompose(w, dataclasses.replace(R2, factor_bits=bits), contributions=False)[1]
            for bits in (8, 16)
        )
        assert eight.relative_error < 1.01 * sixteen.relative_error, layer


def test_decomposing_the_16_bit_checkpoint_in_another_float_type_gives_the_same_parts(weights):
    w = weights["tf_layers.5.self_attn.q"]
    first, second = (decompose(v, R2, contributions=False)[0].tensors() for v in (w.half(), w.double()))
    assert all(torch.equal(first[name], second[name]) for name in first)
