"""Run: .venv/bin/python -m pytest tests/quant/test_recipe.py"""

import dataclasses
import json

import pytest

from bitdgdm.quant.recipe import Recipe

RICH = Recipe(
    "rich", 4, 4, rank=8, alpha=0.02, factor_bits=8, act_asymmetric=True, outlier_budget=3, act_scale="static",
    act_bins=4, premul="smooth", rounding="gptq", calibration="uniform",
    overrides=(("*.e_out", (("act_bits", 8), ("rank", 0))), ("mlp_*", (("weight_bits", 16), ("act_bits", 16)))),
)  # fmt: skip


def test_a_recipe_survives_json_with_its_overrides_and_stays_hashable():
    back = Recipe.from_dict(json.loads(json.dumps(RICH.to_dict())))
    assert back == RICH and hash(back) == hash(RICH)


def test_a_stored_recipe_without_the_newer_keys_means_what_it_meant():
    old = {"name": "old", "weight_bits": 4, "act_bits": 4, "rank": 2, "alpha": 0.1, "factor_bits": 8}
    old |= {
        "act_asymmetric": True,
        "outlier_sigma": 3.0,
        "weight_clip": "mse",
        "summary": "",
        "source": "",
        "version": 1,
    }
    expected = Recipe("old", 4, 4, 2, 0.1, 8, act_asymmetric=True, outlier_sigma=3.0, weight_clip="mse")
    assert Recipe.from_dict(old) == expected


def test_the_first_pattern_that_matches_a_layer_decides():
    recipe = dataclasses.replace(
        RICH, overrides=(("tf.*.e_out", (("act_bits", 8),)), ("tf.*", (("act_bits", 6),)))
    )
    bits = [recipe.for_layer(name).act_bits for name in ("tf.1.e_out", "tf.1.q", "head")]
    assert bits == [8, 6, 4]
    assert all(recipe.for_layer(name).overrides == () for name in ("tf.1.e_out", "tf.1.q", "head"))


def test_a_layer_that_is_kept_in_full_precision_keeps_no_part_of_the_recipe():
    assert RICH.for_layer("mlp_in") == Recipe("rich", 16, 16)


def test_calibration_follows_the_layer_that_needs_it():
    recipe = Recipe(
        "mixed", 4, 4, calibration="skewed", overrides=(("a", (("act_scale", "static"), ("act_bins", 8))),)
    )
    assert recipe.needs_calibration
    assert recipe.for_layer("a").calibration == "skewed" and recipe.for_layer("b").calibration == "none"
    with pytest.raises(ValueError, match="calibration"):
        dataclasses.replace(recipe, calibration="none")
    with pytest.raises(ValueError, match="calibration"):
        Recipe("idle", 4, 4, calibration="uniform")


def test_a_recipe_without_overrides_is_its_own_layer_recipe():
    recipe = Recipe("plain", 8, 8)
    assert recipe.for_layer("any") is recipe


def test_a_recipe_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RICH.weight_bits = 8


@pytest.mark.parametrize(
    "change",
    [
        {"weight_bits": 5},
        {"act_bits": 0},
        {"factor_bits": 3},
        {"weight_clip": "percentile"},
        {"rank": -1},
        {"rank": 2.0},
        {"remainder": 1},
        {"alpha": 1.0},
        {"outlier_sigma": 0.0},
        {"weight_bits": 16, "act_bits": 4},
        {"weight_bits": 16, "act_bits": 16, "premul": "hadamard"},
        {"weight_bits": 1},
        {"weight_format": "fp8"},
        {"weight_format": "codebook"},
        {"weight_format": "codebook", "act_bits": 16, "rounding": "gptq", "calibration": "uniform"},
        {"weight_clip": "output"},
        {"act_format": "log", "act_asymmetric": True},
        {"act_format": "log", "act_scale": "static", "calibration": "uniform"},
        {"act_format": "log", "premul": "hadamard"},
        {"remainder": False},
        {"solver": "pca"},
        {"low_rank_metric": "output", "rank": 4, "calibration": "uniform"},
        {"low_rank_metric": "input", "solver": "svd", "calibration": "uniform"},
        {"low_rank_metric": "input", "solver": "svd", "rank": 4, "alpha": 0.1, "calibration": "uniform"},
        {"sparse_choice": "magnitude"},
        {"solver": "outlier-pursuit"},
        {"act_format": "fp8"},
        {"act_scale": "one", "act_bits": 8},
        {"act_scale": "group"},
        {"act_scale": "group", "weight_group": 64, "act_bits": 16},
        {"act_scale": "group", "weight_group": 64, "act_bits": 8, "act_format": "fp8"},
        {"act_bins": 4},
        {"act_range": "mse"},
        {"act_scale": "static"},
        {"outlier_sigma": 3.0, "outlier_budget": 2},
        {"act_bits": 16, "outlier_budget": 2},
        {"repair_rank": 4},
        {"repair_rank": 4, "repair_steps": 9, "calibration": "uniform", "remainder": False, "rank": 2},
        {"smooth_strength": 1.5},
        {"overrides": (("*", (("weight_bits", 5),)),)},
        {"overrides": (("*", (("colour", 1),)),)},
        {"overrides": (("*", (("premul", "smooth"),)),)},
    ],
    ids=str,
)
def test_what_no_layer_could_run_is_refused(change):
    with pytest.raises(ValueError, match="odd"):
        dataclasses.replace(Recipe("odd", 4, 4), **change)


@pytest.mark.parametrize("change", [{"colour": 1}, {"rank": None}, {"overrides": 3}])
def test_a_stored_recipe_with_a_wrong_key_or_type_is_refused(change):
    values = Recipe("odd", 4, 4).to_dict() | change
    with pytest.raises((ValueError, TypeError)):
        Recipe.from_dict(values)
