"""Run: .venv/bin/python -m pytest tests/quant/test_rates.py"""

import pytest

from bitdgdm.quant.rates import RATES, grid, time_of
from bitdgdm.quant.recipe import Recipe

FP8 = Recipe("f", 8, 8, weight_format="fp8", act_format="fp8")


@pytest.mark.parametrize(
    ("recipe", "unit"),
    [
        (Recipe("r", 16, 16), "bf16"),
        (Recipe("r", 4, 16), "bf16"),
        (Recipe("r", 4, 8), "int8"),
        (Recipe("r", 6, 4), "int8"),
        (Recipe("r", 4, 4), "int4"),
        (FP8, "fp8"),
        (Recipe("r", 8, 8, weight_format="fp8"), "bf16"),
    ],
)
def test_the_unit_is_the_narrowest_that_holds_both_codes(recipe, unit):
    assert grid(recipe) == unit


@pytest.mark.parametrize("chip", RATES)
def test_low_bits_are_never_slower_than_bf16_and_thin_products_cost(chip):
    full = time_of(Recipe("r", 16, 16), (64, 256), 10, chip)
    assert full == 10 * 64 * 256
    assert (
        time_of(Recipe("r", 4, 4), (64, 256), 10, chip)
        <= time_of(Recipe("r", 8, 8), (64, 256), 10, chip)
        < full
    )
    ranked = time_of(Recipe("r", 4, 4, rank=8), (64, 256), 10, chip)
    assert ranked == pytest.approx(time_of(Recipe("r", 4, 4), (64, 256), 10, chip) + 10 * 8 * 320)


def test_on_hopper_four_bits_run_as_eight():
    assert time_of(Recipe("r", 4, 4), (64, 64), 1, "h200") == time_of(Recipe("r", 8, 8), (64, 64), 1, "h200")
