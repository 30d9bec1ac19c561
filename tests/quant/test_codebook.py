"""Run: .venv/bin/python -m pytest tests/quant/test_codebook.py"""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bitdgdm.quant.codebook import kmeans_rows, look_up
from bitdgdm.quant.rounding import round_weights

matrices = hnp.arrays(
    np.float32, st.tuples(st.integers(1, 4), st.integers(1, 30)), elements=st.floats(-1e6, 1e6, width=32)
)


def weighted_error(w, found, weight):
    return (np.square(found.double().numpy() - w) * weight).sum(axis=1)


@settings(deadline=None, max_examples=60)
@given(matrices, st.sampled_from([3, 4]), st.integers(0, 1000))
def test_no_row_is_worse_than_rounding_to_nearest_with_levels_in_16_bit(w, bits, seed):
    weight = np.random.default_rng(seed).exponential(size=w.shape[1])
    codes, book = kmeans_rows(torch.from_numpy(w), bits, torch.from_numpy(weight))
    rounded, scale = round_weights(torch.from_numpy(w), bits, "mse")
    nearest = (rounded.double() * scale.double()[:, None]).to(torch.bfloat16)
    limit = weighted_error(w, nearest, weight)
    assert (weighted_error(w, look_up(codes, book), weight) <= limit * (1 + 1e-6) + 1e-30).all()


@settings(deadline=None, max_examples=40)
@given(matrices, st.sampled_from([3, 4]))
def test_every_code_is_the_nearest_value_of_a_sorted_book(w, bits):
    codes, book = kmeans_rows(torch.from_numpy(w), bits)
    values = book.double().numpy()
    assert book.shape == (len(w), 2**bits) and (np.diff(values, axis=1) >= 0).all()
    distance = np.abs(values[:, None, :] - w[:, :, None])
    chosen = np.take_along_axis(distance, codes.numpy()[:, :, None].astype(int), axis=2)[:, :, 0]
    assert (chosen <= distance.min(axis=2)).all()


def test_it_comes_close_to_the_best_of_all_clusterings():
    rng = np.random.default_rng(0)
    w, weight = rng.normal(size=(1, 14)).astype(np.float32), rng.exponential(size=14)
    order = np.argsort(w[0])
    values, weights = w[0][order].astype(np.float64), weight[order]
    best = np.inf
    for borders in itertools.combinations(range(1, 14), 7):
        cost = 0.0
        for a, b in itertools.pairwise((0, *borders, 14)):
            mean = np.average(values[a:b], weights=weights[a:b])
            cost += (weights[a:b] * np.square(values[a:b] - mean)).sum()
        best = min(best, cost)
    found = weighted_error(w, look_up(*kmeans_rows(torch.from_numpy(w), 3, torch.from_numpy(weight))), weight)
    assert found[0] <= 1.02 * best  # the book is rounded to 16 bit


def test_rows_of_few_values_are_stored_exactly():
    w = torch.tensor([[1.5, -2.0, 1.5, 0.0, 3.0, 0.25], [0.0] * 6, [7.0] * 6])
    assert torch.equal(look_up(*kmeans_rows(w, 3)), w)


def test_channels_with_large_inputs_get_the_smaller_errors():
    w = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    weight = torch.ones(64)
    weight[:8] = 1000.0
    plain, weighted = (look_up(*kmeans_rows(w, 3, weights)) for weights in (None, weight))
    assert (weighted - w)[:, :8].square().mean() < 0.2 * (plain - w)[:, :8].square().mean()


def test_weights_of_zero_count_as_equal_ones_and_a_weight_per_entry_is_taken():
    w = torch.randn(3, 20)
    assert torch.equal(kmeans_rows(w, 3, torch.zeros(20))[1], kmeans_rows(w, 3)[1])
    per_entry = torch.rand(3, 20)
    for row in range(3):
        alone = kmeans_rows(w[row : row + 1], 3, per_entry[row])[1]
        assert torch.equal(alone[0], kmeans_rows(w, 3, per_entry)[1][row])


def test_a_layer_gets_the_same_books_alone_and_in_a_batch():
    w, weight = torch.randn(3, 4, 17), torch.rand(3, 17)
    codes, book = kmeans_rows(w, 4, weight)
    for index in range(3):
        alone = kmeans_rows(w[index], 4, weight[index])
        assert torch.equal(codes[index], alone[0]) and torch.equal(book[index], alone[1])


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_tiny_and_huge_weights_keep_their_relative_error(size):
    w = torch.randn(2, 64, generator=torch.Generator().manual_seed(1))
    found = look_up(*kmeans_rows(w * size, 4)).double() / size
    assert float((found - w).norm() / w.norm()) < 0.12
