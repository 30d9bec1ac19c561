"""Run: .venv/bin/python -m pytest tests/quant/test_packing.py"""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitdgdm.quant.packing import limits, pack, unpack

BITS = (1, 2, 3, 4, 5, 6, 7)


def any_codes(bits, rows, width, seed):
    low, high = limits(bits)
    found = np.random.default_rng(seed).integers(low, high + 1, (rows, width)).astype(np.int8)
    return np.where(found == 0, 1, found) if bits == 1 else found


@given(st.sampled_from(BITS), st.integers(1, 5), st.integers(1, 40), st.integers(0, 2**31))
def test_unpacking_gives_back_what_was_packed_for_every_width(bits, rows, width, seed):
    codes = any_codes(bits, rows, width, seed)
    packed = pack(torch.from_numpy(codes), bits)
    assert packed.shape == (rows, -(-width * bits // 8))
    assert np.array_equal(unpack(packed, bits, width).numpy(), codes)


@given(st.sampled_from(BITS), st.integers(1, 3), st.integers(1, 20), st.integers(0, 2**31))
def test_a_row_is_a_stream_of_bits_lowest_first(bits, rows, width, seed):
    codes = any_codes(bits, rows, width, seed)
    packed = pack(torch.from_numpy(codes), bits).numpy()
    for row in range(rows):
        whole = int.from_bytes(packed[row].tobytes(), "little")
        for i in range(width):
            code = int(codes[row, i])
            expected = (code > 0) if bits == 1 else code % 2**bits
            assert (whole >> (bits * i)) % 2**bits == expected
        assert whole >> (bits * width) == 0


def test_every_code_of_every_width_survives_at_the_ends_of_its_range():
    for bits in BITS:
        codes = torch.tensor([limits(bits)], dtype=torch.int8)
        assert torch.equal(unpack(pack(codes, bits), bits, 2), codes)


@pytest.mark.parametrize(("bits", "value"), [(4, -9), (4, 8), (3, 4), (6, -33), (1, 2)])
def test_a_code_that_needs_more_bits_is_refused(bits, value):
    with pytest.raises(ValueError, match="codes are in"):
        pack(torch.tensor([[1, value]], dtype=torch.int8), bits)


def test_a_zero_of_one_bit_is_refused():
    with pytest.raises(ValueError, match="not 0"):
        pack(torch.tensor([[1, 0]], dtype=torch.int8), 1)


def test_a_width_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="packed codes"):
        unpack(torch.zeros(2, 3, dtype=torch.uint8), 4, 7)
