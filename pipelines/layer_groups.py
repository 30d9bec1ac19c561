"""Which Linears are decomposed together: one group is one task, and what a killed job can take over.

Guarantees: the groups are a function of the network's shapes and the recipe alone, so the parts don't depend on how
many workers there are or on what an earlier run had finished.
Knows nothing of: how a group is decomposed or stored.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import ceil

from torch import Tensor

from bitdgdm.quant.recipe import Recipe

MOST_LAYERS = 8
MOST_WEIGHTS = 2**19
MOST_MOMENTS = 2**22
"""Bounds of a group. Larger ones save launches on a GPU; smaller ones balance better, lose less when a job is killed and
hold fewer second moments of inputs (in x in each, ten times over while gptq runs). A weight that is larger than the
bounds is a group of its own."""


@dataclass(frozen=True)
class LayerGroup:
    """Linears of one shape under one recipe (of a layer, without overrides), in the order of the network."""

    names: tuple[str, ...]
    shape: tuple[int, int]
    recipe: Recipe

    @property
    def weights(self) -> int:
        return len(self.names) * self.shape[0] * self.shape[1]


def layer_groups(weights: Mapping[str, Tensor], recipe: Recipe) -> list[LayerGroup]:
    """Every name in exactly one group; the groups with the most weights first, so that workers end together."""
    alike: dict[tuple[tuple[int, ...], Recipe], list[str]] = {}
    for name, weight in weights.items():
        alike.setdefault((tuple(weight.shape), recipe.for_layer(name)), []).append(name)
    found = []
    for (shape, own), names in alike.items():
        most = min(MOST_LAYERS, MOST_WEIGHTS // (shape[0] * shape[1]))
        if own.needs_calibration:
            most = min(most, MOST_MOMENTS // shape[1] ** 2)
        pieces = ceil(len(names) / max(1, most))
        bounds = [len(names) * i // pieces for i in range(pieces + 1)]  # pieces of nearly equal length
        found += [LayerGroup(tuple(names[a:b]), (shape[0], shape[1]), own) for a, b in pairwise(bounds)]
    return sorted(found, key=lambda group: -group.weights)
