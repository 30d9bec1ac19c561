"""What the network loses when some of its Linears are replaced.

Guarantees: nothing but the named Linears differs from full precision; the loss is the KL divergence of divergence.py.
Knows nothing of: how the replacements were made, and what is done with the losses.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from bitdgdm.models.digress import build, thresholds
from bitdgdm.models.divergence import Divergence, Predictions, States, divergence
from bitdgdm.models.engine import TorchEngine
from bitdgdm.models.source import SourceModel
from bitdgdm.quant.linear import QuantLinear
from bitdgdm.quant.parts import LinearParts
from bitdgdm.quant.recipe import Recipe


def layers_of(
    source: SourceModel, parts: Mapping[str, LinearParts], recipe: Recipe
) -> dict[str, QuantLinear]:
    """The Linears of `parts` as an artifact of `recipe` has them, by name: with bias, and tau behind a LayerNorm."""
    found = {}
    for name, p in parts.items():
        own = recipe.for_layer(name)
        tau = None
        if own.outlier_sigma is not None:
            tau = thresholds(source.weights, source.config, own.outlier_sigma).get(name)
        bias = source.weights.get(f"{name}.bias")
        found[name] = QuantLinear.from_parts(p, bias, own, tau)
    return found


def replaced(
    source: SourceModel, layers: Mapping[str, nn.Module], device: torch.device | str = "cpu"
) -> TorchEngine:
    """The full-precision engine with some Linears replaced."""
    network = build(source.config, source.weights, source.name)
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, layer)
    return TorchEngine(network, source.config, device, name=source.name)


def loss(
    source: SourceModel, layers: Mapping[str, nn.Module], reference: Predictions, states: Sequence[States],
    device: torch.device | str = "cpu",
) -> Divergence:  # fmt: skip
    """KL to full precision with nothing but `layers` replaced. reference: what full precision predicts on `states`."""
    return divergence(reference, replaced(source, layers, device), states)


_NODE = {"q", "k", "v", "x_out", "linX1", "linX2"}
_EDGE = {"e_add", "e_mul", "e_out", "linE1", "linE2"}


def rows_a_graph(name: str, states: Sequence[States]) -> float:
    """How many rows the Linear `name` sees a graph, on average over `states`: nodes, ordered pairs or 1."""
    n = torch.cat([s.mask.sum(1) for s in states]).double()
    kind = name.rpartition(".")[2]
    if kind in _NODE:
        return float(n.mean())
    return float((n * n).mean()) if kind in _EDGE else 1.0
