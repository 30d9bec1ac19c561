"""Inputs and recipes for tests: statistics of made-up rows, and every recipe of the book as layers meet it."""

import dataclasses

import numpy as np
import torch

from bitdgdm.quant.recipe_book import recipes
from bitdgdm.quant.stats import stats_of_rows

T = 50


def any_stats(width, seed=0):
    """Heavy-tailed rows whose channels and times differ in size."""
    rng = np.random.default_rng(seed)
    time = torch.from_numpy(rng.integers(1, T + 1, 64))
    sample = rng.standard_t(3, (64, width)) * rng.uniform(0.2, 3, width) * (1 + time.numpy()[:, None] / T)
    return stats_of_rows(torch.from_numpy(sample), time, T)


def needed(recipe, width, seed=0):
    return any_stats(width, seed) if recipe.needs_calibration else None


def layer_recipes():
    """Every recipe of the book resolved for a layer, and once more for the layers of each different override."""
    found = []
    for recipe in recipes():
        layers = ["layer", *(pattern.replace("*", "layer") for pattern, _ in recipe.overrides)]
        kinds = {recipe.for_layer(layer): layer for layer in reversed(layers)}
        found += [
            r if layer == "layer" else dataclasses.replace(r, name=f"{r.name}: {layer}")
            for r, layer in kinds.items()
        ]
    return found
