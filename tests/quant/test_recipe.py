"""Run: .venv/bin/python -m pytest tests/quant/test_recipe.py"""

import dataclasses
import json

import pytest

from bitdgdm.infra.errors import UnknownRecipe
from bitdgdm.quant.recipe import Recipe, get_recipe, recipes


def test_every_recipe_is_found_by_its_name_and_survives_json():
    for recipe in recipes():
        assert get_recipe(recipe.name) is recipe
        assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_names_follow_the_scheme_of_their_fields():
    for recipe in recipes():
        if recipe.weight_quantized:
            _, grid, *rest = recipe.name.split("-")
            assert grid == f"w{recipe.weight_bits}a{recipe.act_bits}"
            expected = [f"r{recipe.rank}"] * (recipe.rank > 0) + [f"s{recipe.alpha:.0%}"[:-1]] * (
                recipe.alpha > 0
            )
            assert rest == expected


def test_names_are_unique_and_each_recipe_says_what_it_is_and_where_from():
    assert len({recipe.name for recipe in recipes()}) == len(recipes())
    assert all(recipe.summary and recipe.source for recipe in recipes())


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(UnknownRecipe) as caught:
        get_recipe("rtn-w3a3")
    assert all(recipe.name in str(caught.value) for recipe in recipes())


def test_a_recipe_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        get_recipe("rtn-w8a8").weight_bits = 4


@pytest.mark.parametrize(
    "change",
    [
        {"weight_bits": 5},
        {"act_bits": 0},
        {"factor_bits": 4},
        {"weight_clip": "percentile"},
        {"rank": -1},
        {"alpha": 1.0},
        {"outlier_sigma": 0.0},
        {"weight_bits": 16, "act_bits": 4},
    ],
)
def test_a_field_out_of_range_is_refused(change):
    with pytest.raises(ValueError, match="odd"):
        dataclasses.replace(Recipe("odd", 4, 4), **change)


@pytest.mark.parametrize("change", [{"colour": 1}, {"rank": None}])
def test_a_stored_recipe_with_a_wrong_key_or_type_is_refused(change):
    values = Recipe("odd", 4, 4).to_dict() | change
    with pytest.raises((ValueError, TypeError)):
        Recipe.from_dict(values)
