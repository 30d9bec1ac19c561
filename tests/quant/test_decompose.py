"""Run: .venv/bin/python -m pytest tests/quant/test_decompose.py"""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitdgdm.infra.errors import NotFinite
from bitdgdm.quant.decompose import decompose, decompose_group
from bitdgdm.quant.layer_report import LayerReport
from bitdgdm.quant.linear import QuantLinear, set_time
from bitdgdm.quant.parts import codes, dense, low_rank, merged, narrow, side
from bitdgdm.quant.recipe import Recipe
from bitdgdm.quant.recipe_book import get_recipe
from bitdgdm.quant.robust_pca import budget
from tests.quant.plain_linear import weight_of
from tests.quant.samples import T, any_stats, layer_recipes, needed

R2 = get_recipe("bitdgdm-w4a4-r16-s1")
each_recipe = pytest.mark.parametrize("recipe", layer_recipes(), ids=lambda recipe: recipe.name)


def heavy_tailed(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_t(4, shape).astype(np.float32) * 0.05)


def decomposed(w, recipe, **how):
    return decompose(w, recipe, needed(recipe, w.shape[1]), **how)


def worst_error(recipe):
    """What heavy-tailed weights of any size may lose; R1 and one bit lose most of them."""
    if not recipe.remainder or recipe.weight_bits == 1:
        return 1.0
    nearest = {3: 0.6, 4: 0.3, 6: 0.08}.get(recipe.weight_bits, 0.02)
    nearest = 0.05 if recipe.weight_format == "fp8" else nearest
    return nearest if recipe.rounding == "nearest" else 2 * nearest  # those trade it for the output's error


def sparse_part(parts):
    s = np.zeros(parts.shape, bool)
    s.reshape(-1)[parts.sparse_index.numpy().astype(np.int64)] = True
    return s


def bytes_of(parts):
    return {
        name: t.contiguous().view(torch.uint8).numpy().tobytes()
        for name, t in parts.tensors().items()
        if t.numel()
    }


@each_recipe
@pytest.mark.parametrize("shape", [(24, 64), (33, 71), (1, 40), (40, 1), (1, 1)], ids=str)
def test_the_parts_add_up_to_the_weight_and_the_report_says_how_closely(recipe, shape):
    w = heavy_tailed(*shape, seed=shape[1])
    parts, report = decomposed(w, recipe)
    back = weight_of(parts)
    assert np.allclose(merged(parts).double().numpy(), back, rtol=1e-5, atol=1e-5 * np.abs(back).max())
    error = np.linalg.norm(back - w.numpy()) / np.linalg.norm(w.numpy())
    assert report.relative_error == pytest.approx(error, rel=1e-3, abs=1e-6)
    assert error < worst_error(recipe)
    if error > 1e-5:
        assert report.sqnr_db == pytest.approx(-20 * np.log10(error), rel=1e-3)
    assert report.stored_bits == sum(8 * len(raw) for raw in bytes_of(parts).values())
    assert report.bits_per_weight == pytest.approx(report.stored_bits / w.numel(), rel=1e-5)
    assert report.shape == parts.shape == shape


@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from([0.01, 0.05, 0.2]), st.integers(0, 2**31))
def test_alpha_bounds_every_row_and_column_of_the_stored_sparse_part(rows, columns, alpha, seed):
    parts, report = decompose(
        heavy_tailed(rows, columns, seed=seed), dataclasses.replace(R2, alpha=alpha, rank=2)
    )
    s = sparse_part(parts)
    assert s.sum(axis=1).max() <= budget(alpha, columns) and s.sum(axis=0).max() <= budget(alpha, rows)
    index = parts.sparse_index.numpy().astype(np.int64)
    assert report.nnz == len(index) and (np.diff(index) > 0).all()


def test_each_part_of_the_published_method_earns_something_on_weights_made_for_it():
    rng = np.random.default_rng(0)
    smooth = rng.standard_normal((128, 8)) @ rng.standard_normal((8, 128)) * 0.1
    w = smooth + rng.standard_normal((128, 128)) * 0.05
    w[np.arange(128), rng.permutation(128)] += 5
    _, report = decompose(torch.from_numpy(w).float(), R2)
    assert report.relative_error < 0.7 * report.error_without_low_rank
    assert report.relative_error < 0.7 * report.error_without_sparse
    assert max(report.error_without_low_rank, report.error_without_sparse) < report.error_dense


def test_measuring_the_contributions_does_not_change_the_parts():
    w = heavy_tailed(48, 96)
    without, report = decompose(w, R2, contributions=False)
    assert bytes_of(without) == bytes_of(decompose(w, R2)[0])
    assert report.error_dense is None


def test_factors_in_8_bit_cost_nothing_because_the_remainder_absorbs_their_rounding():
    w = heavy_tailed(256, 256)
    eight, sixteen = (decompose(w, dataclasses.replace(R2, factor_bits=bits))[1] for bits in (8, 16))
    assert eight.relative_error < 1.01 * sixteen.relative_error
    assert sixteen.stored_bits - eight.stored_bits > 0.9 * 8 * 16 * (256 + 256)


@each_recipe
def test_two_runs_and_any_number_of_threads_give_the_same_bytes(recipe):
    w = heavy_tailed(160, 128)
    first, report = decomposed(w, recipe, contributions=False)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            again, second_report = decomposed(w, recipe, contributions=False)
            assert bytes_of(again) == bytes_of(first) and second_report == report
    finally:
        torch.set_num_threads(threads)


@each_recipe
def test_a_slice_or_transpose_is_read_as_the_matrix_it_shows(recipe):
    w = heavy_tailed(40, 60)
    for shown in (w.T, w[::2, 1::3]):
        first, second = (decomposed(v, recipe, contributions=False)[0] for v in (shown, shown.contiguous()))
        assert bytes_of(first) == bytes_of(second)


@each_recipe
def test_degenerate_weights_give_finite_parts(recipe):
    rank_one = torch.outer(heavy_tailed(40, seed=1), heavy_tailed(50, seed=2))
    huge_column, zero_row = heavy_tailed(40, 50), heavy_tailed(40, 50)
    huge_column[:, 3] *= 1e5
    zero_row[7] = 0
    for w in (rank_one, huge_column, zero_row, torch.zeros(40, 50), torch.full((40, 50), 1e-42)):
        parts, report = decomposed(w, recipe)
        back = merged(parts)
        assert bool(torch.isfinite(back).all())
        assert float((back - w).norm()) <= worst_error(recipe) * float(w.norm()) + 1e-37
        assert 0 <= report.relative_error <= 1
    assert not merged(decomposed(torch.zeros(40, 50), recipe)[0]).any()
    if recipe.remainder and recipe.premul in ("none", "smooth"):
        row = merged(decomposed(zero_row, recipe)[0])[7]
        assert float(row.abs().max()) <= 0.02 * float(zero_row.abs().max())


@each_recipe
@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (17, 23)], ids=str)
def test_a_layer_in_a_group_gets_the_parts_it_gets_alone(recipe, shape):
    weights = [heavy_tailed(*shape, seed=seed) * 10.0**seed for seed in range(3)]
    stats = [any_stats(shape[1], seed) for seed in range(3)] if recipe.needs_calibration else None
    together = decompose_group(weights, recipe, stats, contributions=False)
    for i, (parts, _) in enumerate(together):
        alone, _ = decompose(weights[i], recipe, None if stats is None else stats[i], contributions=False)
        assert torch.allclose(
            merged(parts), merged(alone), rtol=1e-3, atol=1e-3 * float(weights[i].abs().max())
        )


@each_recipe
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_refused(recipe, bad):
    w = heavy_tailed(4, 6)
    w[1, 2] = bad
    with pytest.raises(NotFinite):
        decomposed(w, recipe)


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4), (0, 4), (4, 0)], ids=str)
def test_what_is_not_a_matrix_or_is_empty_is_refused(shape):
    with pytest.raises(ValueError, match="matrix"):
        decompose(torch.zeros(shape), R2)


def test_a_weight_stored_in_16_bit_passes_through_w16_unchanged():
    w = heavy_tailed(20, 30).half()
    parts, report = decompose(w, get_recipe("w16"))
    assert parts.qweight.dtype == torch.float16 and torch.equal(parts.qweight, w)
    assert report.relative_error == 0 and report.sqnr_db is None


def test_positions_beyond_65536_weights_take_32_bits():
    small, large = (
        decompose(heavy_tailed(rows, 256), dataclasses.replace(R2, rank=0))[0] for rows in (256, 257)
    )
    assert small.sparse_index.dtype == torch.uint16 and large.sparse_index.dtype == torch.int32


def test_the_remainder_is_zero_where_the_sparse_part_is():
    w = heavy_tailed(64, 64)
    parts, _ = decompose(w, dataclasses.replace(R2, rank=0, alpha=0.05))
    s = torch.from_numpy(sparse_part(parts))
    assert not codes(parts)[s].any() and not dense(parts)[s].any()
    assert torch.allclose(side(parts)[s], w[s], rtol=2.0**-8)


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_narrowing_keeps_eleven_bits_or_does_not_narrow(value):
    t = torch.tensor([value], dtype=torch.float32)
    kept = narrow(t)
    assert abs(float(kept) - value) <= 2.0**-11 * abs(value)


def test_a_report_survives_json_values_and_seconds_are_no_part_of_it():
    _, report = decompose(heavy_tailed(8, 16), R2)
    assert "seconds" not in report.to_dict()
    assert LayerReport.from_dict(report.to_dict()) == report == dataclasses.replace(report, seconds=99.0)


def test_a_16_bit_recipe_has_no_codes():
    with pytest.raises(ValueError, match="no integer codes"):
        codes(decompose(heavy_tailed(3, 4), Recipe("plain", 16, 16))[0])


@each_recipe
def test_statistics_that_a_recipe_does_not_need_change_nothing_but_the_report(recipe):
    if recipe.needs_calibration:
        with pytest.raises(ValueError, match="needs statistics"):
            decompose(heavy_tailed(8, 16), recipe)
        return
    w = heavy_tailed(24, 32)
    blind, (seen, report) = decompose(w, recipe)[0], decompose(w, recipe, any_stats(32))
    assert bytes_of(blind) == bytes_of(seen) and report.output_error is not None


def test_a_group_of_different_shapes_or_too_few_statistics_is_refused():
    with pytest.raises(ValueError, match="one shape"):
        decompose_group([heavy_tailed(3, 4), heavy_tailed(4, 3)], R2)
    with pytest.raises(ValueError, match="2 weights, 1 statistics"):
        decompose_group([heavy_tailed(3, 4)] * 2, R2, [any_stats(4)])
    with pytest.raises(ValueError, match="5 inputs"):
        decompose(heavy_tailed(3, 4), R2, any_stats(5))


def test_a_recipe_that_differs_by_layer_must_be_resolved_first():
    mixed = dataclasses.replace(R2, overrides=(("a", (("rank", 2),)),))
    with pytest.raises(ValueError, match="for_layer"):
        decompose(heavy_tailed(3, 4), mixed)


def test_the_output_error_is_that_of_the_layer_on_the_calibration_rows():
    w, stats = heavy_tailed(24, 32), any_stats(32)
    recipe = Recipe("static", 4, 4, act_scale="static", act_bins=3, calibration="uniform")
    parts, report = decompose(w, recipe, stats)
    layer = QuantLinear.from_parts(parts, None, recipe)
    lost = total = 0.0
    for x, t in zip(stats.sample, stats.time, strict=True):
        set_time(layer, t[None])
        wanted = w.double() @ x.double()
        lost, total = lost + float((layer(x) - wanted).square().sum()), total + float(wanted.square().sum())
    assert report.output_error == pytest.approx((lost / total) ** 0.5, rel=1e-3)
    assert int(stats.time.min()) >= 1 and int(stats.time.max()) <= T


def test_the_report_says_what_the_outlier_branch_of_the_input_buys():
    _, report = decompose(heavy_tailed(64, 64), R2, any_stats(64))
    assert report.output_error < report.output_error_without_outliers
    assert report.output_error_without_low_rank is not None and report.output_error_without_sparse is not None
    plain = decompose(heavy_tailed(64, 64), get_recipe("rtn-w4a4"), any_stats(64))[1]
    assert plain.output_error_without_outliers is None and plain.error_dense is None


def test_a_layer_is_judged_by_its_output_where_its_inputs_were_seen_else_by_its_weight():
    blind, seen = (decompose(heavy_tailed(16, 24), R2, stats)[1] for stats in (None, any_stats(24)))
    assert (blind.of, blind.error) == ("weight", blind.relative_error)
    assert (seen.of, seen.error) == ("output", seen.output_error)


def test_a_low_rank_part_in_the_metric_of_the_output_has_the_least_output_error():
    w, stats = heavy_tailed(48, 40), any_stats(40)
    errors = {}
    for metric in ("weight", "output"):
        recipe = Recipe("r", 8, 16, rank=8, solver="svd").changed(low_rank_metric=metric, factor_bits=16)
        product = low_rank(decompose(w, recipe, stats, contributions=False)[0])
        rows = stats.sample.double()
        errors[metric] = float((rows @ (w - product).double().T).norm())
    singular = np.linalg.svd(stats.sample.double().numpy() @ w.double().numpy().T, compute_uv=False)
    best = np.sqrt(np.square(singular[8:]).sum())  # no rank-8 product has a smaller one
    assert best <= errors["output"] * (1 + 1e-6) and errors["output"] <= 1.03 * best < 0.9 * errors["weight"]


@pytest.mark.parametrize("choice", ["residual", "magnitude", "sensitivity", "salient"])
def test_every_choice_of_sparse_entries_obeys_alpha_by_row_and_column(choice):
    w = heavy_tailed(50, 70)
    w[3] *= 30
    w[:, 5] *= 30
    recipe = Recipe("s", 4, 4, alpha=0.04, rank=2).changed(sparse_choice=choice)
    s = sparse_part(decompose(w, recipe, any_stats(70))[0])
    assert 0 < s.sum(axis=1).max() <= budget(0.04, 70) and s.sum(axis=0).max() <= budget(0.04, 50)


@each_recipe
def test_alpha_bounds_the_sparse_part_of_every_recipe(recipe):
    parts, _ = decomposed(heavy_tailed(60, 90), recipe, contributions=False)
    if parts.sparse_index is not None:
        s = sparse_part(parts)
        assert s.sum(axis=1).max() <= budget(recipe.alpha, 90) and s.sum(axis=0).max() <= budget(
            recipe.alpha, 60
        )


def test_columns_are_those_with_the_largest_inputs_or_weights_and_hold_the_weight():
    w, stats = heavy_tailed(20, 30), any_stats(30)
    for choice, size in (("activation", stats.absmax), ("weight", w.abs().amax(dim=0))):
        recipe = Recipe("c", 4, 4).changed(columns=4, column_choice=choice)
        parts, report = decompose(w, recipe, stats)
        chosen = parts.column_index.numpy()
        assert report.columns == 4 and set(chosen) == set(np.argsort(-size.numpy())[:4])
        assert torch.equal(parts.column_value, w[:, chosen].bfloat16()) and not codes(parts)[:, chosen].any()
