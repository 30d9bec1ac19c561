"""Run: .venv/bin/python -m pytest tests/quant/test_rivals_on_shipped_network.py

What each rival's step buys on layers of the shipped network, on inputs that it was not fitted to.
"""

import numpy as np
import pytest
import torch

from bitdgdm.models.calibrate import calibrate
from bitdgdm.models.source import load_source
from bitdgdm.quant import rotate
from bitdgdm.quant.activations import quantize_log, quantize_static, quantize_tokens
from bitdgdm.quant.adaround import adaround_moment
from bitdgdm.quant.codebook import kmeans_rows, look_up
from bitdgdm.quant.gptq import gptq_round
from bitdgdm.quant.ranges import equal_bins, learned_bins, range_of_bins, smooth_range
from bitdgdm.quant.rounding import round_weights

KINDS = (
    "self_attn.q",
    "self_attn.v",
    "self_attn.e_out",
    "self_attn.x_out",
    "linX1",
    "linX2",
    "linE1",
    "linE2",
)
LAYERS = tuple(f"tf_layers.4.{kind}" for kind in KINDS)


@pytest.fixture(scope="module")
def network():
    """weights by layer, and statistics of two disjoint sets of trajectories: one to fit, one to look at."""
    source = load_source("builtin:digress-qm9")
    weights = {name: source.weights[f"{name}.weight"].float() for name in LAYERS}
    fitted, unseen = (calibrate(source, LAYERS, molecules=12, steps=15, seed=seed) for seed in (0, 1))
    return weights, fitted, unseen


def lost(w, found, x):
    """Relative error of the layer's output."""
    y = x @ w.T
    return float((x @ found.T - y).norm() / y.norm())


def rounded_inputs(x, codes, scale):
    return codes * scale - x


@pytest.mark.parametrize("method", [gptq_round, adaround_moment], ids=["gptq", "adaround"])
def test_rounding_with_the_output_in_view_halves_its_error_on_unseen_inputs(network, method):
    weights, fitted, unseen = network
    ratios = []
    for name, w in weights.items():
        codes, scale = method(w, fitted[name].second_moment, 4, "mse")
        nearest, its_scale = round_weights(w, 4, "mse")
        ours = lost(w, codes.float() * scale.float()[:, None], unseen[name].sample)
        ratios.append(ours / lost(w, nearest.float() * its_scale.float()[:, None], unseen[name].sample))
    assert np.median(ratios) < 0.55 and max(ratios) < 0.8


def test_a_book_of_16_values_is_closer_than_16_even_levels_in_every_layer(network):
    for name, w in network[0].items():
        codes, scale = round_weights(w, 4, "mse")
        even = (codes.float() * scale.float()[:, None] - w).norm()
        assert float((look_up(*kmeans_rows(w, 4)) - w).norm()) < 0.9 * float(even), name


def test_rotations_lower_the_peaks_of_score_inputs_and_raise_those_behind_a_relu(network):
    """Why they lose at some layers: inputs that are mostly zero become dense."""
    _, fitted, unseen = network

    def peak(x):
        return float((x.abs().amax(dim=1) / x.norm(dim=1).clamp_min(1e-6)).mean())

    for kind, compare in (("self_attn.e_out", np.less), ("self_attn.x_out", np.less)):
        x = unseen[f"tf_layers.4.{kind}"].sample
        rotation = rotate.duquant(fitted[f"tf_layers.4.{kind}"].sample)
        turned = rotate.apply(x, rotation.permutation, rotate.rotation_blocks(rotation))
        assert compare(peak(turned), 0.9 * peak(x)) and compare(peak(rotate.hadamard(x)), 0.9 * peak(x)), kind
    x, w = unseen["tf_layers.4.linX2"].sample, network[0]["tf_layers.4.linX2"]
    plain = rounded_inputs(x, *quantize_tokens(x, 4, True)) @ w.T
    turned = rotate.hadamard(x)
    dense = rounded_inputs(turned, *quantize_tokens(turned, 4, True)) @ rotate.hadamard(w).T
    assert float(dense.norm()) > 1.5 * float(plain.norm())


def test_time_groups_and_smooth_tables_keep_up_with_one_range_on_unseen_inputs(network):
    """4 bit, static: the best range per group of times, against one for all times."""
    _, fitted, unseen = network
    gains = []
    for name in ("tf_layers.4.self_attn.x_out", "tf_layers.4.linX2", "tf_layers.4.self_attn.e_out"):
        a, b = fitted[name], unseen[name]
        steps = a.diffusion_steps

        def error(low, high, x):
            total = 0.0
            for ends in torch.stack((low, high), dim=1).unique(dim=0):
                rows = x[(low == ends[0]) & (high == ends[1])]
                total += float(
                    rounded_inputs(rows, *quantize_static(rows, ends[:1], ends[1:], 4, True)).square().sum()
                )
            return total

        found = {}
        for method, bin_of_t in (
            ("one", equal_bins(1, steps)),
            ("learned", learned_bins(a.sample, a.time, 4, True, 4, steps)),
        ):
            bins = int(bin_of_t.max()) + 1
            low, high = range_of_bins(a.sample, bin_of_t[a.time].long(), bins, 4, True, "mse")
            of_row = bin_of_t[b.time].long()
            found[method] = error(low[of_row], high[of_row], b.sample)
        low, high = smooth_range(a.sample, a.time, 4, True, steps)
        found["smooth"] = error(low[b.time - 1], high[b.time - 1], b.sample)
        gains += [found["learned"] / found["one"], found["smooth"] / found["one"]]
    assert max(gains) < 1.05 and min(gains) < 0.97


def test_no_input_has_the_two_humps_of_ptq4sam_and_its_log_grid_loses_to_even_steps(network):
    """chengtao-lv/PTQ4SAM at 4ec50bd, quantization/fake_quant.py: two humps are seen where 80 % of the channels have
    one sign in all but 10 % of their entries; then the negative channels are flipped."""
    weights, _, unseen = network
    for name, stats in unseen.items():
        x = stats.sample.numpy()
        one_sided = np.abs((x > 0).mean(axis=0) - (x < 0).mean(axis=0)) >= 0.8
        assert one_sided.mean() <= 0.8 or (x >= 0).all(), name
    for kind in ("linX2", "linE2"):
        x, w = unseen[f"tf_layers.4.{kind}"].sample, weights[f"tf_layers.4.{kind}"]
        log, even = (
            rounded_inputs(x, *codes) @ w.T for codes in (quantize_log(x, 4), quantize_tokens(x, 4, True))
        )
        assert 1.1 < float(log.norm() / even.norm()) < 3
