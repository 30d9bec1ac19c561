"""Run: .venv/bin/python -m pytest tests/quant/test_adaround.py"""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitdgdm.infra.errors import NotFinite
from bitdgdm.quant.adaround import adaround, adaround_moment
from bitdgdm.quant.gptq import output_error
from bitdgdm.quant.rounding import round_weights


def layer(out, width, rows, seed=0):
    """A weight and strongly correlated inputs with a mean."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=(rows, max(1, width // 4))) @ rng.normal(size=(max(1, width // 4), width))
    x = shared + 0.3 * rng.normal(size=(rows, width)) + 0.5
    return torch.tensor(rng.normal(size=(out, width)), dtype=torch.float32), torch.tensor(x)


def moment(x):
    return x.T @ x / len(x)


@settings(deadline=None, max_examples=15)
@given(
    st.integers(1, 5),
    st.integers(1, 16),
    st.sampled_from([3, 4, 8]),
    st.sampled_from(["absmax", "mse"]),
    st.integers(0, 100),
)
def test_every_code_is_rounded_up_or_down_and_no_row_is_worse_than_nearest(out, width, bits, clip, seed):
    w, x = layer(out, width, 30, seed)
    codes, scale = adaround(w, x, bits, clip, steps=40)
    nearest, its_scale = round_weights(w, bits, clip)
    assert torch.equal(scale, its_scale)
    exact = w / scale.float()[:, None]
    top = 2 ** (bits - 1) - 1
    clipped = exact.clamp(-top - (clip == "mse"), top)
    assert bool(((codes - clipped).abs() <= 1 + 1e-5).all())
    assert int(codes.abs().max()) <= top + (clip == "mse")
    lost, limit = (output_error(w, c.float() * scale.float()[:, None], moment(x)) for c in (codes, nearest))
    assert (lost <= limit * (1 + 1e-6) + 1e-12).all()


def test_correlated_inputs_lose_a_fraction_of_what_rounding_to_nearest_loses():
    w, x = layer(32, 64, 200)
    (codes, scale), (nearest, _) = adaround(w, x, 4, "mse"), round_weights(w, 4, "mse")
    outputs = [x @ (w - c * scale.float()[:, None]).double().T for c in (codes, nearest)]
    assert outputs[0].square().sum() < 0.3 * outputs[1].square().sum()


def test_it_stays_close_to_the_best_of_all_ways_to_round():
    w, x = layer(6, 8, 100)
    codes, scale = adaround(w, x, 4, "absmax")
    lost = output_error(w, codes * scale.float()[:, None], moment(x))
    best = torch.empty(6, dtype=torch.float64)
    for row in range(6):
        step = scale[row].float()
        every = torch.tensor(list(itertools.product((0.0, 1.0), repeat=8)))
        tried = ((w[row] / step).floor() + every).clamp(-7, 7) * step
        best[row] = output_error(w[row].expand_as(tried), tried, moment(x)).min()
    assert (lost >= best * (1 - 1e-9)).all() and lost.sum() < 2.0 * best.sum()


def test_a_batch_of_layers_does_as_well_as_each_alone():
    pairs = [layer(6, 12, 50, seed) for seed in range(3)]
    w, moments = torch.stack([p[0] for p in pairs]), torch.stack([moment(p[1]) for p in pairs])
    codes, scale = adaround_moment(w, moments, 4, "absmax")
    for index, (one, x) in enumerate(pairs):
        alone, alone_scale = adaround(one, x, 4, "absmax")
        assert torch.equal(scale[index], alone_scale)
        together = output_error(one, codes[index] * scale[index].float()[:, None], moments[index])
        apart = output_error(one, alone * alone_scale.float()[:, None], moments[index])
        assert together.sum() == pytest.approx(float(apart.sum()), rel=0.2)


def test_the_same_layer_gives_the_same_codes():
    w, x = layer(8, 16, 50)
    assert torch.equal(adaround(w, x, 4, "mse")[0], adaround(w, x, 4, "mse")[0])


def test_silent_inputs_and_rows_of_zeros_are_rounded_to_nearest():
    w, x = layer(4, 6, 20)
    w[2] = 0.0
    assert torch.equal(adaround(w, torch.zeros(3, 6), 4, "mse")[0], round_weights(w, 4, "mse")[0])
    assert not adaround(w, x, 4, "mse")[0][2].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(bad):
    w, x = layer(3, 4, 10)
    x[1, 1] = bad
    with pytest.raises(NotFinite):
        adaround(w, x, 4, "absmax")
    w[0, 0] = bad
    with pytest.raises(NotFinite):
        adaround(w, torch.ones(2, 4), 4, "absmax")
