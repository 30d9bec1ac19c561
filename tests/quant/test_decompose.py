"""Run: .venv/bin/python -m pytest tests/quant/test_decompose.py"""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitdgdm.infra.errors import NotFinite
from bitdgdm.quant.decompose import decompose
from bitdgdm.quant.layer_report import LayerReport
from bitdgdm.quant.parts import codes, dense, merged, narrow, side
from bitdgdm.quant.recipe import Recipe
from bitdgdm.quant.recipe_book import get_recipe, recipes
from bitdgdm.quant.robust_pca import budget

DEFAULT = get_recipe("bitdgdm-w4a4-r16-s1")
each_recipe = pytest.mark.parametrize("recipe", recipes(), ids=lambda recipe: recipe.name)


def heavy_tailed(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_t(4, shape).astype(np.float32) * 0.05)


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
@pytest.mark.parametrize("shape", [(64, 256), (33, 71), (1, 40), (40, 1), (1, 1), (3, 2)], ids=str)
def test_the_parts_add_up_to_the_weight_and_the_report_says_how_closely(recipe, shape):
    w = heavy_tailed(*shape, seed=shape[1])
    parts, report = decompose(w, recipe)
    back = merged(parts).double().numpy()
    error = np.linalg.norm(back - w.numpy()) / np.linalg.norm(w.numpy())
    assert report.relative_error == pytest.approx(error, rel=1e-4, abs=1e-9)
    assert error < (0.3 if recipe.weight_bits == 4 else 0.02)
    if error > 0:
        assert report.sqnr_db == pytest.approx(-20 * np.log10(error), rel=1e-3)
    assert report.stored_bits == sum(8 * len(raw) for raw in bytes_of(parts).values())
    assert report.bits_per_weight == pytest.approx(report.stored_bits / w.numel(), rel=1e-5)
    assert report.shape == parts.shape == shape


@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from([0.01, 0.05, 0.2]), st.integers(0, 2**31))
def test_alpha_bounds_every_row_and_column_of_the_stored_sparse_part(rows, columns, alpha, seed):
    parts, report = decompose(
        heavy_tailed(rows, columns, seed=seed), dataclasses.replace(DEFAULT, alpha=alpha, rank=2)
    )
    s = sparse_part(parts)
    assert s.sum(axis=1).max() <= budget(alpha, columns) and s.sum(axis=0).max() <= budget(alpha, rows)
    index = parts.sparse_index.numpy().astype(np.int64)
    assert report.nnz == len(index) and (np.diff(index) > 0).all()


def test_each_part_of_the_default_recipe_earns_something_on_weights_made_for_it():
    rng = np.random.default_rng(0)
    smooth = rng.standard_normal((128, 8)) @ rng.standard_normal((8, 128)) * 0.1
    w = smooth + rng.standard_normal((128, 128)) * 0.05
    w[np.arange(128), rng.permutation(128)] += 5
    _, report = decompose(torch.from_numpy(w).float(), DEFAULT)
    assert report.relative_error < 0.7 * report.error_without_low_rank
    assert report.relative_error < 0.7 * report.error_without_sparse
    assert max(report.error_without_low_rank, report.error_without_sparse) < report.error_dense


def test_measuring_the_contributions_does_not_change_the_parts():
    w = heavy_tailed(48, 96)
    without, report = decompose(w, DEFAULT, contributions=False)
    assert bytes_of(without) == bytes_of(decompose(w, DEFAULT)[0])
    assert report.error_dense is None


def test_factors_in_8_bit_cost_nothing_because_the_remainder_absorbs_their_rounding():
    w = heavy_tailed(256, 256)
    eight, sixteen = (decompose(w, dataclasses.replace(DEFAULT, factor_bits=bits))[1] for bits in (8, 16))
    assert eight.relative_error < 1.01 * sixteen.relative_error
    assert sixteen.stored_bits - eight.stored_bits > 0.9 * 8 * 16 * (256 + 256)


@each_recipe
def test_two_runs_and_any_number_of_threads_give_the_same_bytes(recipe):
    w = heavy_tailed(256, 192)
    first, report = decompose(w, recipe)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            again, second_report = decompose(w, recipe)
            assert bytes_of(again) == bytes_of(first) and second_report == report
    finally:
        torch.set_num_threads(threads)


@each_recipe
def test_a_slice_or_transpose_is_read_as_the_matrix_it_shows(recipe):
    w = heavy_tailed(40, 60)
    assert bytes_of(decompose(w.T, recipe)[0]) == bytes_of(decompose(w.T.contiguous(), recipe)[0])
    assert bytes_of(decompose(w[::2, 1::3], recipe)[0]) == bytes_of(
        decompose(w[::2, 1::3].contiguous(), recipe)[0]
    )


@each_recipe
def test_degenerate_weights_give_finite_parts(recipe):
    rank_one = torch.outer(heavy_tailed(40, seed=1), heavy_tailed(50, seed=2))
    huge_column, zero_row = heavy_tailed(40, 50), heavy_tailed(40, 50)
    huge_column[:, 3] *= 1e5
    zero_row[7] = 0
    for w in (rank_one, huge_column, zero_row, torch.zeros(40, 50), torch.full((40, 50), 1e-42)):
        parts, report = decompose(w, recipe)
        back = merged(parts)
        assert bool(torch.isfinite(back).all())
        assert float((back - w).norm()) <= 0.2 * float(w.norm()) + 1e-38
        assert 0 <= report.relative_error <= 1
    assert not merged(decompose(torch.zeros(40, 50), recipe)[0]).any()
    row = merged(decompose(zero_row, recipe)[0])[7]
    assert float(row.abs().max()) <= 0.02 * float(zero_row.abs().max())


@each_recipe
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_refused(recipe, bad):
    w = heavy_tailed(4, 6)
    w[1, 2] = bad
    with pytest.raises(NotFinite):
        decompose(w, recipe)


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4), (0, 4), (4, 0)], ids=str)
def test_what_is_not_a_matrix_or_is_empty_is_refused(shape):
    with pytest.raises(ValueError, match="matrix"):
        decompose(torch.zeros(shape), DEFAULT)


def test_a_weight_stored_in_16_bit_passes_through_w16_unchanged():
    w = heavy_tailed(20, 30).half()
    parts, report = decompose(w, get_recipe("w16"))
    assert parts.qweight.dtype == torch.float16 and torch.equal(parts.qweight, w)
    assert report.relative_error == 0 and report.sqnr_db is None


def test_positions_beyond_65536_weights_take_32_bits():
    small, large = (
        decompose(heavy_tailed(rows, 256), dataclasses.replace(DEFAULT, rank=0))[0] for rows in (256, 257)
    )
    assert small.sparse_index.dtype == torch.uint16 and large.sparse_index.dtype == torch.int32


def test_the_remainder_is_zero_where_the_sparse_part_is():
    w = heavy_tailed(64, 64)
    parts, _ = decompose(w, dataclasses.replace(DEFAULT, rank=0, alpha=0.05))
    s = torch.from_numpy(sparse_part(parts))
    assert not codes(parts)[s].any() and not dense(parts)[s].any()
    assert torch.allclose(side(parts)[s], w[s], rtol=2.0**-8)


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_narrowing_keeps_eleven_bits_or_does_not_narrow(value):
    t = torch.tensor([value], dtype=torch.float32)
    kept = narrow(t)
    assert abs(float(kept) - value) <= 2.0**-11 * abs(value)


def test_a_report_survives_json_values_and_seconds_are_no_part_of_it():
    _, report = decompose(heavy_tailed(8, 16), DEFAULT)
    assert "seconds" not in report.to_dict()
    assert LayerReport.from_dict(report.to_dict()) == report == dataclasses.replace(report, seconds=99.0)


def test_a_16_bit_recipe_has_no_codes():
    with pytest.raises(ValueError, match="no integer codes"):
        codes(decompose(heavy_tailed(3, 4), Recipe("plain", 16, 16))[0])
