"""Run: .venv/bin/python -m pytest tests/quant/test_gptq.py"""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitdgdm.infra.errors import NotFinite
from bitdgdm.quant.gptq import (
    FRACTIONS,
    feedback_round,
    gptq_fp8,
    gptq_round,
    output_error,
    row_scales,
    spread,
)
from bitdgdm.quant.rounding import round_weights


def layer(out, width, samples=None, seed=0):
    """A weight and the second moment of correlated inputs with channels of very different size."""
    rng = np.random.default_rng(seed)
    samples = samples or 4 * width
    x = rng.normal(size=(samples, width)) @ rng.normal(size=(width, width)) * np.exp(rng.normal(size=width))
    w = rng.normal(size=(out, width)) * np.exp(rng.normal(size=(out, 1)))
    return torch.tensor(w, dtype=torch.float32), torch.tensor(x.T @ x / samples, dtype=torch.float32)


def rebuilt(codes, scale, group=0):
    return codes.float() * spread(scale, codes.shape[-1], group)


def nearest(w, bits, clip, group=0):
    scale = spread(row_scales(w, bits, clip, group), w.shape[-1], group)
    top = 2 ** (bits - 1) - 1
    return (w / scale).round().clamp(-top - (clip == "mse"), top) * scale


@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 6),
    st.integers(1, 20),
    st.sampled_from([3, 4, 8]),
    st.sampled_from(["absmax", "mse"]),
    st.sampled_from([0, 4]),
    st.booleans(),
    st.integers(0, 1000),
)
def test_no_row_is_worse_than_rounding_to_nearest(out, width, bits, clip, group, act_order, seed):
    w, moment = layer(out, width, samples=max(1, width // 2), seed=seed)
    found = rebuilt(*gptq_round(w, moment, bits, clip, group, act_order=act_order), group)
    limit = output_error(w, nearest(w, bits, clip, group), moment)
    assert (output_error(w, found, moment) <= limit * (1 + 1e-9) + 1e-12).all()


def test_without_damping_three_columns_are_the_nearest_plane_of_the_lattice():
    """Babai's nearest plane from a QR factor: the same rounding, derived another way."""
    w, moment = layer(5, 3)
    scale = spread(row_scales(w, 4, "absmax"), 3)
    codes = feedback_round(w, moment, scale, (-100, 100), damping=0.0, act_order=False).numpy()
    for row in range(5):
        root = np.linalg.cholesky(moment.double().numpy()[::-1, ::-1]).T  # last column is fixed first
        basis = root * scale[row].double().numpy()[::-1]
        target = root @ w[row].double().numpy()[::-1]
        found = np.zeros(3)
        for k in (2, 1, 0):
            found[k] = np.rint((target[k] - basis[k, k + 1 :] @ found[k + 1 :]) / basis[k, k])
        plane = np.square(basis @ found - target).sum()
        ours = np.square(basis @ codes[row][::-1] - target).sum()
        plain = np.square(
            basis @ np.rint(w[row].double().numpy()[::-1] / scale[row].double().numpy()) - target
        )
        assert ours == pytest.approx(min(plane, plain.sum()), rel=1e-6)


def test_it_stays_close_to_the_best_of_all_codes():
    w, moment = layer(8, 4, seed=0)
    codes, scale = gptq_round(w, moment, 3, "absmax")
    error = output_error(w, rebuilt(codes, scale), moment)
    every = torch.tensor(list(itertools.product(range(-3, 4), repeat=4)), dtype=torch.float32)
    best = torch.zeros(8, dtype=torch.float64)
    for row in range(8):
        tried = every * scale[row].float()
        best[row] = output_error(w[row].expand_as(tried), tried, moment).min()
    plain = output_error(w, nearest(w, 3, "absmax"), moment)
    assert (error >= best * (1 - 1e-9)).all()
    assert (error / best).mean() < 2.0 < 3.0 < (plain / best).mean()


def test_inputs_without_correlation_give_rounding_to_nearest():
    w, _ = layer(6, 16)
    for clip in ("absmax", "mse"):
        codes, scale = gptq_round(w, torch.eye(16), 4, clip)
        expected, expected_scale = round_weights(w, 4, clip)
        assert torch.equal(codes, expected) and torch.equal(scale, expected_scale)


def test_correlated_inputs_lose_much_less_than_by_rounding_to_nearest():
    w, moment = layer(32, 100, samples=150)
    found = output_error(w, rebuilt(*gptq_round(w, moment, 4, "mse")), moment).sum()
    assert found < 0.4 * output_error(w, nearest(w, 4, "mse"), moment).sum()


def test_a_layer_is_rounded_the_same_alone_and_in_a_batch():
    pairs = [layer(8, 24, seed=seed) for seed in range(3)]
    w, moment = (torch.stack(column) for column in zip(*pairs, strict=True))
    codes, scale = gptq_round(w, moment, 4, "mse", 8)
    for index, (one, its_moment) in enumerate(pairs):
        alone, alone_scale = gptq_round(one, its_moment, 4, "mse", 8)
        assert torch.equal(codes[index], alone) and torch.equal(scale[index], alone_scale)


@pytest.mark.parametrize(("width", "group"), [(16, 4), (18, 8), (5, 8)])
def test_each_group_has_the_scale_it_would_have_alone(width, group):
    w, moment = layer(4, width)
    _, scale = gptq_round(w, moment, 4, "absmax", group)
    assert scale.shape == (4, -(-width // group))
    for index, start in enumerate(range(0, width, group)):
        alone = round_weights(w[:, start : start + group].contiguous(), 4, "absmax")[1]
        assert torch.equal(scale[:, index], alone)


@pytest.mark.parametrize(
    "moment",
    [torch.zeros(6, 6), torch.ones(6, 6), torch.diag(torch.tensor([1e30, 1.0, 1e-30, 0.0, 0.0, 2.0]))],
    ids=["silent", "rank one", "badly scaled"],
)
def test_a_singular_second_moment_is_rounded_and_reproduces_zero_rows(moment):
    w = layer(3, 6)[0]
    w[1] = 0.0
    codes, scale = gptq_round(w, moment, 4, "absmax")
    found = rebuilt(codes, scale)
    assert torch.isfinite(found).all() and not found[1].any()
    plain = output_error(w, nearest(w, 4, "absmax"), moment)
    assert (output_error(w, found, moment) <= plain * (1 + 1e-9)).all()


def test_a_second_moment_with_a_slightly_negative_eigenvalue_is_damped_until_it_has_a_factor():
    w, moment = layer(3, 8)
    broken = moment - 1.1 * torch.linalg.eigvalsh(moment)[0] * torch.eye(8)
    assert torch.isfinite(rebuilt(*gptq_round(w, broken, 4, "absmax", damping=0.0))).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(bad):
    w, moment = layer(3, 4)
    broken = w.clone()
    broken[1, 1] = bad
    with pytest.raises(NotFinite):
        feedback_round(broken, moment, torch.ones(3, 4), (-7, 7))
    moment[0, 0] = bad
    with pytest.raises(NotFinite):
        gptq_round(w, moment, 4, "absmax")


@pytest.mark.parametrize("group", [0, 5])
def test_a_clip_by_the_output_is_the_best_of_its_scales_in_every_row(group):
    w, moment = layer(6, 15, seed=4)
    many, moments = torch.stack([w, 2 * w.flip(0)]), torch.stack([moment, moment.flip(0, 1)])
    codes, scale = gptq_round(many, moments, 4, "output", group)
    found = output_error(many, rebuilt(codes, scale, group), moments)
    tried = []
    for fraction in FRACTIONS:
        step = (row_scales(many, 4, "absmax", group).float() * fraction).to(torch.bfloat16)
        q = feedback_round(many, moments, spread(step, 15, group), (-8, 7))
        tried.append(output_error(many, rebuilt(q, step, group), moments))
    assert torch.allclose(found, torch.stack(tried).amin(0), rtol=1e-6)
    assert codes.shape == many.shape and scale.dtype == torch.bfloat16


def test_a_clip_by_the_output_keeps_rows_of_zeros():
    w, moment = layer(3, 9)
    w[1] = 0
    codes, scale = gptq_round(w, moment, 4, "output")
    assert (codes[1] == 0).all() and (scale > 0).all()


def test_e4m3_codes_lose_less_of_the_output_than_the_nearest_ones():
    w, moment = layer(8, 40)
    scale = w.abs().amax(1) / 448 * 1.01
    codes = gptq_fp8(w, moment, scale)
    assert codes.dtype == torch.float8_e4m3fn
    nearest_codes = (w / scale[:, None]).to(torch.float8_e4m3fn).float() * scale[:, None]
    lost, plain = (output_error(w, v, moment).sum() for v in (codes.float() * scale[:, None], nearest_codes))
    assert lost < 0.7 * plain
