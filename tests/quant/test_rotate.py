"""Run: .venv/bin/python -m pytest tests/quant/test_rotate.py"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitdgdm.quant.rotate import (
    apply,
    duquant,
    hadamard,
    rotation_blocks,
    signs,
    walsh,
    zigzag,
)


def sylvester(n):
    h = np.ones((1, 1))
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return h / np.sqrt(n)


def outlier_sample(rows=64, width=64, seed=0):
    """A few channels are thirty times as large, one always positive."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, width))
    x[:, [3, width // 2]] *= 30
    x[:, 5] = np.abs(x[:, 5]) * 10
    return torch.tensor(x)


@pytest.mark.parametrize("width", [1, 2, 8, 64, 256])
def test_the_fast_transform_is_the_product_with_sylvesters_matrix(width):
    x = torch.randn(3, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = (x.numpy() * signs(width).double().numpy()) @ sylvester(width)
    assert np.allclose(hadamard(x).numpy(), expected, atol=1e-12)


@pytest.mark.parametrize(("width", "block"), [(12, 4), (48, 16), (7, 1)])
def test_other_widths_are_transformed_in_blocks(width, block):
    x = torch.randn(3, width, dtype=torch.float64)
    expected = (x * signs(width)).numpy() @ np.kron(np.eye(width // block), sylvester(block))
    assert np.allclose(hadamard(x).numpy(), expected, atol=1e-12)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 40), st.integers(0, 100))
def test_rotations_keep_norms_and_products_and_can_be_undone(width, seed):
    generator = torch.Generator().manual_seed(seed)
    x, w = (torch.randn(5, width, dtype=torch.float64, generator=generator) for _ in range(2))
    rotation = duquant(x, block=8, steps=5)
    blocks = rotation_blocks(rotation).double()
    for turned, weight in (
        (hadamard(x), hadamard(w)),
        (apply(x, rotation.permutation, blocks), apply(w, rotation.permutation, blocks)),
    ):
        assert torch.allclose(turned.norm(dim=1), x.norm(dim=1), rtol=1e-6)
        assert torch.allclose(turned @ weight.T, x @ w.T, atol=1e-5)
    assert torch.allclose(walsh(hadamard(x)) * signs(width), x, atol=1e-12)


def test_a_row_is_transformed_the_same_alone_and_in_a_batch_bit_for_bit():
    x = torch.randn(33, 256)
    assert all(torch.equal(hadamard(x)[i], hadamard(x[i])) for i in range(33))
    assert torch.equal(hadamard(x.view(3, 11, 256)), hadamard(x).view(3, 11, 256))


def test_a_channel_of_positive_mean_does_not_become_an_outlier():
    x = torch.randn(200, 256, generator=torch.Generator().manual_seed(0)).relu()
    plain = x.double().numpy() @ sylvester(256)
    assert np.abs(plain.mean(axis=0)).max() > 4 * float(hadamard(x).mean(dim=0).abs().max())


def test_rotating_lowers_the_peak_of_tokens_with_outlier_channels():
    x = outlier_sample()
    rotation = duquant(x)
    turned = apply(x, rotation.permutation, rotation_blocks(rotation).double())
    for found in (turned, hadamard(x)):
        assert found.abs().amax(dim=1).square().mean() < 0.3 * x.abs().amax(dim=1).square().mean()


def test_duquant_is_orthogonal_to_one_millionth_and_its_permutation_a_bijection():
    rotation = duquant(outlier_sample(width=256), block=64)
    blocks = rotation_blocks(rotation)
    assert blocks.shape == (2, 4, 64, 64) and rotation.permutation.dtype == torch.int16
    assert (blocks @ blocks.mT - torch.eye(64)).abs().max() < 1e-6
    assert torch.equal(
        rotation.permutation.sort(dim=1).values, torch.arange(256).to(torch.int16).expand(2, 256)
    )


def test_each_greedy_step_spreads_the_largest_channel_and_no_step_is_kept_that_hurts():
    flat = torch.ones(4, 16) * torch.tensor([1.0, -1.0] * 8)
    assert (duquant(flat, block=16).swaps[0] == 255).all()
    spike = torch.zeros(4, 16)
    spike[:, 6] = 5.0
    first = duquant(spike, block=16)
    assert int(first.swaps[0, 0, 0]) == 6
    turned = apply(spike, first.permutation[:1], rotation_blocks(first)[:1])
    assert float(turned.abs().max()) <= 5.0 / 4 + 1e-6


def test_zigzag_deals_the_largest_channels_out_over_the_blocks_and_back():
    size = torch.tensor([10.0, 1, 9, 2, 8, 3, 7, 4, 6, 5, 0, 0])
    order = zigzag(size, 4)
    assert size[order].view(3, 4).tolist() == [[10, 5, 4, 0], [9, 6, 3, 0], [8, 7, 2, 1]]


def test_the_same_sample_gives_the_same_rotation_and_an_impossible_block_is_refused():
    first, second = duquant(outlier_sample()), duquant(outlier_sample())
    assert torch.equal(first.swaps, second.swaps) and torch.equal(first.permutation, second.permutation)
    assert duquant(outlier_sample(width=6)).block == 2
    with pytest.raises(ValueError, match="power of two"):
        duquant(outlier_sample(), block=12)
