"""Run: .venv/bin/python -m pytest tests/quant/test_packing.py"""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bitdgdm.quant.packing import pack_nibbles, unpack_nibbles

shapes = st.tuples(st.integers(1, 5), st.integers(1, 19))


@given(hnp.arrays(np.int8, shapes, elements=st.integers(-8, 7)))
def test_unpacking_gives_back_what_was_packed_for_every_width(codes):
    packed = pack_nibbles(torch.from_numpy(codes))
    assert packed.shape == (codes.shape[0], (codes.shape[1] + 1) // 2)
    assert np.array_equal(unpack_nibbles(packed, codes.shape[1]).numpy(), codes)


@given(hnp.arrays(np.int8, shapes, elements=st.integers(-8, 7)))
def test_even_columns_are_in_the_low_nibble_in_twos_complement(codes):
    packed = pack_nibbles(torch.from_numpy(codes)).numpy()
    for row, column in np.ndindex(*codes.shape):
        nibble = (int(packed[row, column // 2]) >> (4 * (column % 2))) & 15
        assert nibble == int(codes[row, column]) % 16


def test_the_spare_nibble_of_an_odd_width_is_zero():
    assert int(pack_nibbles(torch.tensor([[-1, -1, -1]], dtype=torch.int8))[0, 1]) == 0x0F


@pytest.mark.parametrize("value", [-9, 8])
def test_a_code_that_needs_more_than_four_bits_is_refused(value):
    with pytest.raises(ValueError, match=r"\[-8, 7\]"):
        pack_nibbles(torch.tensor([[0, value]], dtype=torch.int8))


def test_a_width_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="packed codes"):
        unpack_nibbles(torch.zeros(2, 3, dtype=torch.uint8), 7)
