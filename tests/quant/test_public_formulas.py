"""Run: .venv/bin/python -m pytest tests/quant/test_public_formulas.py

Round to nearest, GPTQ and SVDQuant against what public implementations compute, on the same matrices: synthetic ones
and layers of the shipped network with inputs from its own trajectories. Every reference below was written from the
formulas of the file named beside it, in NumPy float64, and shares no code with the package.
"""

import dataclasses

import numpy as np
import pytest
import torch

from bitdgdm.models.calibrate import calibrate
from bitdgdm.models.source import load_source
from bitdgdm.quant.decompose import decompose
from bitdgdm.quant.gptq import feedback_round, gptq_round, output_error, row_scales, spread
from bitdgdm.quant.parts import merged
from bitdgdm.quant.recipe_book import get_recipe
from bitdgdm.quant.robust_pca import truncated_svd
from bitdgdm.quant.rounding import round_weights
from bitdgdm.quant.smooth import smooth_scale
from bitdgdm.quant.stats import stats_of_rows

LAYERS = tuple(
    f"tf_layers.{i}" for i in ("2.self_attn.q", "4.self_attn.e_out", "5.linX2", "6.linE1", "7.lin_y1")
)
ONE_PERCENT = 0.01


@pytest.fixture(scope="module")
def cases():
    """name -> (weight, inputs, second moment), all float64."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 96)) @ rng.normal(size=(96, 96)) * np.exp(rng.normal(size=96))
    heavy = rng.standard_t(3, size=(48, 96))
    cases = {
        "synthetic": (rng.normal(size=(64, 96)), x, x.T @ x / len(x)),
        "heavy tails": (heavy, x, x.T @ x / len(x)),
    }
    source = load_source("builtin:digress-qm9")
    stats = calibrate(source, LAYERS, molecules=8, steps=10)
    for name in LAYERS:
        weight = source.weights[f"{name}.weight"].double().numpy()
        cases[name] = (
            weight,
            stats[name].sample.double().numpy(),
            stats[name].second_moment.double().numpy(),
        )
    return cases


def bfloat16(a):
    return torch.tensor(a).to(torch.bfloat16).double().numpy()


def torchao_symmetric(w, low, high, scale_dtype=bfloat16):
    """pytorch/ao 0.18.0, torchao/quantization/quant_primitives.py, _choose_qparams_affine with MappingType.SYMMETRIC,
    one block a row, and _quantize_affine_no_dtype_cast: the step is max|w| over half the range of codes, in the type
    of the weight, which is bfloat16 in a model that is to be quantized."""
    step = scale_dtype(np.abs(w).max(axis=1, keepdims=True) / ((high - low) / 2))
    return np.clip(np.rint(w * (1 / step)), low, high) * step


def deepcompressor_int4(w, group):
    """deepcompressor (mit-han-lab/lmquant at bf52c1e), data/range.py QuantRange.intersect: signed codes without a zero
    point span -7..7; data/range.py DynamicRange.measure and quantizer/impl/scale.py: the step is max|w| / 7 a group."""
    out, width = w.shape
    groups = w.reshape(out, width // group, group)
    step = np.abs(groups).max(axis=2, keepdims=True) / 7
    return (np.clip(np.rint(groups / step), -7, 7) * step).reshape(out, width)


def gptqmodel_round(w, h, step, low, high, *, percdamp, desc_act, blocksize=128):
    """ModelCloud/GPTQModel at 00e0b83, gptqmodel/quantization/gptq.py, GPTQ.hessian_inverse and GPTQ.quantize: the
    upper Cholesky factor of the inverse of the damped H; every error is divided by its diagonal and taken off the
    columns to its right, at once inside a block and after it for the others."""
    w, h, columns = w.copy(), 2 * h, w.shape[1]
    order = np.argsort(-np.diag(h), kind="stable") if desc_act else np.arange(columns)
    w, h = w[:, order], h[np.ix_(order, order)]
    damped = h + percdamp * np.mean(np.diag(h)) * np.eye(columns)
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    done = np.zeros_like(w)
    for start in range(0, columns, blocksize):
        stop = min(start + blocksize, columns)
        block, scaled_errors = w[:, start:stop].copy(), np.zeros((len(w), stop - start))
        for i in range(stop - start):
            column = block[:, i]
            rounded = np.clip(np.rint(column / step), low, high) * step
            scaled_errors[:, i] = (column - rounded) / upper[start + i, start + i]
            block[:, i:] -= np.outer(scaled_errors[:, i], upper[start + i, start + i : stop])
            done[:, start + i] = rounded
        w[:, stop:] -= scaled_errors @ upper[start:stop, stop:]
    return done[:, np.argsort(order)]


def smoothquant_scale(w, x, strength):
    """mit-han-lab/smoothquant, smoothquant/smooth.py, smooth_ln_fcs; the same ratio in deepcompressor's
    calib/smooth.py get_smooth_scale with spans of the largest absolute value."""
    return np.abs(x).max(axis=0) ** strength / np.abs(w).max(axis=0) ** (1 - strength)


def svdquant_weight(w, rank, group):
    """deepcompressor (mit-han-lab/lmquant at bf52c1e), nn/patch/lowrank.py LowRankBranch.reset_parameters and
    calib/lowrank.py _ask without compensation: U S and V^T of the weight's SVD, the rest rounded."""
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    low_rank = (u[:, :rank] * s[:rank]) @ vt[:rank]
    return low_rank + deepcompressor_int4(w - low_rank, group)


def relative(w, found):
    return np.linalg.norm(w - found) / np.linalg.norm(w)


def output_loss(w, found, h):
    e = w - found
    return np.einsum("oi,ij,oj->", e, h, e)


def tensor(a):
    return torch.tensor(a, dtype=torch.float32)


@pytest.mark.parametrize(("bits", "top"), [(4, 7), (8, 127)])
def test_round_to_nearest_has_torchaos_error(cases, bits, top):
    for name, (w, _, _) in cases.items():
        codes, scale = round_weights(tensor(w), bits, "absmax")
        ours = relative(w, codes.double().numpy() * scale.double().numpy()[:, None])
        assert ours == pytest.approx(relative(w, torchao_symmetric(w, -top, top)), rel=ONE_PERCENT), name


def test_scales_in_16_bit_cost_up_to_two_percent_of_error_against_torchao_on_a_float32_model(cases):
    """The largest weight of a row is exact only if the step is: one of 64 weights in the narrowest layers."""
    for name, (w, _, _) in cases.items():
        for bits, top in ((4, 7), (8, 127)):
            codes, scale = round_weights(tensor(w), bits, "absmax")
            ours = relative(w, codes.double().numpy() * scale.double().numpy()[:, None])
            exact = relative(w, torchao_symmetric(w, -top, top, np.float64))
            assert 1 - ONE_PERCENT < ours / exact < 1 + 2 * ONE_PERCENT, name


def test_torchaos_own_range_of_codes_differs_at_4_bit(cases):
    """Its default lets codes start at -2^(bits-1): a step 14/15 as long, and half a step cut off at the top."""
    for name, (w, _, _) in cases.items():
        for bits, least, most in ((4, 0.90, 1.05), (8, 1 - ONE_PERCENT, 1 + ONE_PERCENT)):
            codes, scale = round_weights(tensor(w), bits, "absmax")
            ours = relative(w, codes.double().numpy() * scale.double().numpy()[:, None])
            theirs = relative(w, torchao_symmetric(w, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1))
            assert least < theirs / ours < most, name


def test_round_to_nearest_in_groups_has_deepcompressors_error(cases):
    for name, (w, _, _) in cases.items():
        group = 32
        scale = spread(row_scales(tensor(w), 4, "absmax", group), w.shape[1], group).double().numpy()
        ours = np.clip(np.rint(w / scale), -7, 7) * scale
        assert relative(w, ours) == pytest.approx(
            relative(w, deepcompressor_int4(w, group)), rel=ONE_PERCENT
        ), name


@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize(("bits", "low", "high"), [(4, -8, 7), (4, -7, 7), (3, -4, 3), (8, -128, 127)])
def test_gptq_on_the_same_grid_has_gptqmodels_output_error_and_codes(cases, bits, low, high, desc_act):
    """(-8, 7) is GPTQModel's own grid (quantization/quantizer.py, sym: 2 max|w| over 2^bits - 1, zero at 2^(bits-1))."""
    for name, (w, _, h) in cases.items():
        step = np.abs(w).max(axis=1) / ((high - low) / 2)
        reference = gptqmodel_round(w, h, step, low, high, percdamp=0.01, desc_act=desc_act)
        grid = torch.tensor(step)[:, None].expand(w.shape)
        codes = feedback_round(
            torch.tensor(w), torch.tensor(h), grid, (low, high), damping=0.01, act_order=desc_act
        )
        ours = codes.double().numpy() * step[:, None]
        worse = output_loss(w, ours, h) / output_loss(w, reference, h)
        assert worse < 1 + ONE_PERCENT, name
        nearest = np.clip(np.rint(w / step[:, None]), low, high) * step[:, None]
        e, plain = w - reference, w - nearest
        kept = np.einsum("oi,ij,oj->o", e, h, e) <= np.einsum("oi,ij,oj->o", plain, h, plain)
        same = np.isclose(ours, reference, atol=step.min() / 100).mean(axis=1)
        assert (same[kept] > 0.98).all() or worse > 1 - ONE_PERCENT, (
            name
        )  # rows where it lost fall back to nearest


def test_our_gptq_recipe_loses_no_more_output_than_gptqmodel_on_the_same_kind_of_grid(cases):
    for name, (w, _, h) in cases.items():
        step = np.abs(w).max(axis=1) / 7
        reference = output_loss(w, gptqmodel_round(w, h, step, -7, 7, percdamp=0.01, desc_act=True), h)
        codes, scale = gptq_round(tensor(w), tensor(h), 4, "absmax")
        found = codes.double() * scale.double()[:, None]
        ours = float(output_error(torch.tensor(w), found, torch.tensor(h)).sum())
        assert ours < (1 + 3 * ONE_PERCENT) * reference, name


def test_smoothing_scales_are_smoothquants_up_to_one_factor_and_16_bit(cases):
    for name, (w, x, _) in cases.items():
        used = np.abs(x).max(axis=0) > 0
        ratio = smooth_scale(tensor(w), tensor(np.abs(x).max(axis=0)), 0.5).numpy() / smoothquant_scale(
            w, x, 0.5
        )
        assert np.allclose(ratio[used] / np.median(ratio[used]), 1, rtol=2.0**-7), name


@pytest.mark.parametrize("rank", [8, 16, 32])
def test_svdquant_has_deepcompressors_error_of_the_weight_and_of_the_output(cases, rank):
    for name, (w, x, h) in cases.items():
        s = smooth_scale(tensor(w), tensor(np.abs(x).max(axis=0)), 0.5).double().numpy()
        smoothed, moment = w * s, h / np.outer(s, s)
        reference = svdquant_weight(smoothed, rank, 32)
        left, right = (f[0].to(torch.bfloat16).float() for f in truncated_svd(tensor(smoothed)[None], rank))
        rest = tensor(smoothed) - left @ right.T
        step = spread(row_scales(rest, 4, "absmax", 32), w.shape[1], 32)
        ours = (left @ right.T + (rest / step).round().clamp(-7, 7) * step).double().numpy()
        assert relative(smoothed, ours) == pytest.approx(relative(smoothed, reference), rel=ONE_PERCENT), name
        losses = [np.sqrt(output_loss(smoothed, found, moment)) for found in (ours, reference)]
        assert losses[0] == pytest.approx(losses[1], rel=3 * ONE_PERCENT), name


def test_the_registered_recipes_have_the_same_errors_as_these_formulas(cases):
    """With scales that clip nothing, as in the public implementations; the recipes search for a better clip."""
    for name, (w, x, h) in cases.items():
        stats = dataclasses.replace(stats_of_rows(tensor(x), torch.ones(len(x)), 1), second_moment=tensor(h))
        s = smoothquant_scale(w, x, 0.5)
        steps = np.abs(w).max(axis=1) / 7
        references = {
            "rtn-w4a4": (1.0, torchao_symmetric(w, -7, 7), np.eye(w.shape[1])),
            "gptq-w4a8": (1.0, gptqmodel_round(w, h, steps, -7, 7, percdamp=0.01, desc_act=True), h),
            "svdquant-w4a4-r16": (s, svdquant_weight(w * s, 16, 32), np.eye(w.shape[1])),
        }
        for recipe, (factor, reference, metric) in references.items():
            chosen = get_recipe(recipe).changed(weight_clip="absmax")
            if chosen.weight_group:
                chosen = chosen.changed(weight_group=32)
            parts, _ = decompose(
                tensor(w), chosen, stats if chosen.needs_calibration else None, contributions=False
            )
            found = merged(parts).double().numpy() * factor
            losses = [np.sqrt(output_loss(w * factor, v, metric)) for v in (found, reference)]
            assert losses[0] == pytest.approx(losses[1], rel=ONE_PERCENT), (name, recipe)


def test_the_installed_torchao_computes_what_its_transcription_above_computes(cases):
    primitives = pytest.importorskip(
        "torchao.quantization.quant_primitives", reason="torchao isn't installed: pip install torchao"
    )
    for name, (w, _, _) in cases.items():
        weight, block = tensor(w), (1, w.shape[1])
        for top in (7, 127):
            step, zero = primitives.choose_qparams_affine(
                weight, primitives.MappingType.SYMMETRIC, block, torch.int8, -top, top
            )
            codes = primitives.quantize_affine(weight, block, step, zero, torch.int8, -top, top)
            found = relative(w, codes.double().numpy() * step.double().numpy().reshape(-1, 1))
            transcribed = relative(w, torchao_symmetric(w, -top, top, np.float64))
            assert found == pytest.approx(transcribed, rel=1e-4), name
