"""What each part of a quantized layer costs and what it is worth.

Guarantees: a pure function of the artifact: stored tensors give the cost, the report written when it was made gives the
errors; nothing is measured again.
Knows nothing of: how parts are found, how a table looks.

A part is worth log2(error without it / error with it) bits: one more bit of the remainder halves the error of rounding,
so a part that stores more bits a weight than it is worth is better spent on the remainder. Errors are those of the
layer's output where the recipe saw inputs, else those of the weight; without a part the others were found anew.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bitdgdm.models.layer_errors import kind_of
from bitdgdm.quant.artifact import Artifact
from bitdgdm.quant.layer_report import LayerReport
from bitdgdm.quant.parts import LinearParts

_TENSORS: Mapping[str, tuple[str, ...]] = {
    "low rank": ("proj_up", "proj_down", "proj_up_scale", "proj_down_scale"),
    "sparse": ("sparse_index", "sparse_value"),
    "columns": ("column_index", "column_value"),
}


@dataclass(frozen=True)
class Part:
    """One part of one layer. bits: stored, a weight. without: relative error if it were left out, None if unknown.

    worth: bits a weight that the remainder would need instead; None if unknown. earns: worth its bits; None if unknown
    or if it stores nothing (the outlier branch costs time, not bits).
    """

    name: str
    bits: float
    without: float | None
    worth: float | None
    earns: bool | None


@dataclass(frozen=True)
class LayerParts:
    """One layer. error: with all parts, of the output or of the weight as `of` says. rest: bits of everything else."""

    layer: str
    kind: str
    weights: int
    of: str
    error: float
    rest: float
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class KindParts:
    """All layers of a kind: bits a weight and worth as means over weights, and in how many layers a part earns its cost."""

    kind: str
    layers: int
    error: float
    parts: tuple[
        tuple[str, float, float | None, int], ...
    ]  # name, bits, worth, layers in which it earns its cost


def layer_parts(artifact: Artifact) -> list[LayerParts]:
    """Return one entry a quantized layer, in the artifact's order."""
    sigma = artifact.header.recipe.outlier_sigma is not None or bool(artifact.header.recipe.outlier_budget)
    return [
        _layer(name, artifact.layers[name][0], report, sigma)
        for name, report in artifact.header.layers.items()
    ]


def _layer(name: str, parts: LinearParts, report: LayerReport, outliers: bool) -> LayerParts:
    weights, tensors = report.shape[0] * report.shape[1], parts.tensors()
    stored = {
        part: sum(8 * tensors[t].numel() * tensors[t].element_size() for t in names if t in tensors) / weights
        for part, names in _TENSORS.items()
    }
    of, error = report.of, report.error
    without = {
        "low rank": (report.error_without_low_rank, report.output_error_without_low_rank),
        "sparse": (report.error_without_sparse, report.output_error_without_sparse),
        "columns": (None, None),
    }
    if stored["low rank"] + stored["sparse"] and not stored["low rank"] * stored["sparse"]:
        alone = "low rank" if stored["low rank"] else "sparse"  # the dense part alone is what it leaves
        without[alone] = (report.error_dense, without[alone][1])
    found = [_part(part, bits, error, without[part][of == "output"]) for part, bits in stored.items() if bits]
    if outliers:
        found.append(_part("outliers of the input", 0.0, error, report.output_error_without_outliers))
    rest = report.stored_bits / weights - sum(stored.values())
    return LayerParts(name, kind_of(name), weights, of, error, rest, tuple(found))


def _part(name: str, bits: float, error: float, without: float | None) -> Part:
    worth = math.log2(without / error) if without and error > 0 else None
    return Part(name, bits, without, worth, None if worth is None or not bits else worth >= bits)


def by_kind(layers: Sequence[LayerParts]) -> list[KindParts]:
    """Return one entry a kind of layer, the largest error first."""
    kinds: dict[str, list[LayerParts]] = {}
    for layer in layers:
        kinds.setdefault(layer.kind, []).append(layer)
    found = []
    for kind, of in kinds.items():
        parts = []
        for name in dict.fromkeys(p.name for layer in of for p in layer.parts):
            here = [(layer.weights, p) for layer in of for p in layer.parts if p.name == name]
            total = sum(layer.weights for layer in of)
            known = [(w, p.worth) for w, p in here if p.worth is not None]
            worth = sum(w * v for w, v in known) / sum(w for w, _ in known) if known else None
            parts.append(
                (name, sum(w * p.bits for w, p in here) / total, worth, sum(p.earns is True for _, p in here))
            )
        mean = math.sqrt(
            sum(layer.weights * layer.error**2 for layer in of) / sum(layer.weights for layer in of)
        )
        found.append(KindParts(kind, len(of), mean, tuple(parts)))
    return sorted(found, key=lambda k: -k.error)
