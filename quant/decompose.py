"""Decompose Linears: the unit of work of `bitdgdm quantize`.

Guarantees: the parts depend on (weights of the group, recipe, statistics) only; a retry returns the same bytes on the
same kind of processor, with any number of threads. Each part is rounded to its stored form before the next one is
fitted to what it leaves, so a coarse factor costs a slightly larger remainder and no error of its own.
Knows nothing of: which model the weights are from, where the result is stored.

Order: W' = W T^-1; columns and, where it is chosen by W' alone, S; L R^T of the rest; the column block; S of what is
left; D of what is left then; the ranges of a static activation table on the inputs that D meets. With the metric
"input", L R^T belongs to directions of the inputs, which D doesn't meet, and nothing is taken from W'.
"""

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bitdgdm.infra.errors import NotFinite
from bitdgdm.quant import rotate
from bitdgdm.quant.choices import kept_channels, sparse_mask
from bitdgdm.quant.inputs import Inputs, inputs_of
from bitdgdm.quant.layer_report import LayerReport, output_error, report, weight_error
from bitdgdm.quant.low_rank import principal, split, store_factors
from bitdgdm.quant.parts import LinearParts, dense, factors, index_dtype, low_rank, narrow, parts_of
from bitdgdm.quant.recipe import Recipe
from bitdgdm.quant.remainder import round_remainder
from bitdgdm.quant.robust_pca import keep_largest
from bitdgdm.quant.smooth import smooth_scale
from bitdgdm.quant.static_table import static_table
from bitdgdm.quant.stats import LayerStats
from bitdgdm.quant.transform import into, transform_of

Stored = dict[str, Any]
"""The tensors of one LinearParts, by name."""


def decompose(
    weight: Tensor, recipe: Recipe, stats: LayerStats | None = None, *, contributions: bool = True
) -> tuple[LinearParts, LayerReport]:
    """Split and round one weight; see `decompose_group`."""
    seen = None if stats is None else [stats]
    return decompose_group([weight], recipe, seen, contributions=contributions)[0]


def decompose_group(
    weights: Sequence[Tensor],
    recipe: Recipe,
    stats: Sequence[LayerStats] | None = None,
    *,
    contributions: bool = True,
) -> list[tuple[LinearParts, LayerReport]]:
    """Split and round weights of one shape together, as `recipe` (resolved by `Recipe.for_layer`) says.

    weights: float[out, in] each, on one device; the parts are on the CPU. stats: of each layer's inputs; needed where
    `recipe.needs_calibration`, otherwise only the report reads them. contributions: also measure what each part buys
    (up to three more decompositions); it doesn't change the parts.
    Raises: NotFinite if a weight holds NaN or infinity; ValueError if one isn't a matrix or is empty, if shapes
    differ, if the recipe has overrides, or if it needs statistics and there are none.
    """
    begin = time.perf_counter()
    w = _checked(weights, recipe, stats)
    if recipe.weight_quantized:
        seen = inputs_of(stats, w.device) if stats is not None and recipe.needs_calibration else None
        parts, steps = _split(w, recipe, seen)
    else:
        plain = [narrow(m) if recipe.weight_bits == 16 else m for m in w]
        parts = [parts_of(_shape(w), {"qweight": m.cpu().clone()}, recipe) for m in plain]
        seen, steps = None, [0] * len(parts)
    extras: list[dict[str, Any]] = [{"steps": taken} for taken in steps]
    if stats is not None:
        for e, m, p, seen_here in zip(extras, w, parts, stats, strict=True):
            e["output_error"] = output_error(m, p, recipe, seen_here)
    if contributions and recipe.weight_quantized:
        found = {recipe: parts}  # without its only part a recipe is the same as without all of them
        for field, smaller in _without(recipe).items():
            if field == "outliers" and recipe.act_scale != "static":
                found[smaller] = parts
            if smaller not in found:
                found[smaller], _ = _split(w, smaller, seen)
            _measure(field, extras, w, smaller, found[smaller], stats)
    seconds = (time.perf_counter() - begin) / len(parts)
    return [(p, report(m, p, seconds=seconds, **e)) for m, p, e in zip(w, parts, extras, strict=True)]


def _checked(weights: Sequence[Tensor], recipe: Recipe, stats: Sequence[LayerStats] | None) -> Tensor:
    """The weights as float32[B, out, in]."""
    for weight in weights:
        if weight.ndim != 2 or weight.numel() == 0:
            raise ValueError(f"a weight is a non-empty matrix, not {list(weight.shape)}")
        if weight.shape != weights[0].shape:
            raise ValueError(
                f"weights of a group have one shape, not {list(weight.shape)} and {list(weights[0].shape)}"
            )
    if not weights or (stats is not None and len(stats) != len(weights)):
        raise ValueError(f"{len(weights)} weights, {0 if stats is None else len(stats)} statistics")
    if recipe.overrides:
        raise ValueError(f"{recipe.name} says something else per layer; resolve it by for_layer")
    if recipe.needs_calibration and stats is None:
        raise ValueError(f"{recipe.name} needs statistics of the layer's inputs; calibrate the network first")
    w = torch.stack([weight.detach().to(torch.float32) for weight in weights]).contiguous()
    if not bool(torch.isfinite(w).all()):
        raise NotFinite(f"a weight of shape {list(weights[0].shape)}")
    for s in stats or ():
        if s.width != w.shape[2]:
            raise ValueError(f"statistics of {s.width} inputs don't fit a weight of {w.shape[2]}")
    return w


def _split(w: Tensor, recipe: Recipe, seen: Inputs | None) -> tuple[list[LinearParts], list[int]]:
    """The parts of float32[B, out, in], and how many steps the solver took."""
    stored: list[Stored] = [{} for _ in w]
    w, seen = _transformed(w, recipe, seen, stored)
    keep = kept_channels(w, recipe, seen)
    mask = torch.zeros_like(w, dtype=torch.bool)
    if recipe.sparse_choice != "residual":
        mask = sparse_mask(w * keep, recipe, seen)
    rest, steps = w, [0] * len(w)
    if recipe.low_rank_metric == "input":
        assert seen is not None
        seen = _deflated(w, recipe, seen, stored)
    elif recipe.rank:
        found = split(torch.where(mask, 0.0, w) * keep, recipe, None if seen is None else seen.moment)
        steps = found.steps.tolist()
        for i, s in enumerate(stored):
            s |= store_factors(found.left[i], found.right[i], recipe.factor_bits)
            rest[i] -= _product(_shape(w), s)
        if recipe.solver == "outlier-pursuit":
            keep = 1.0 - (found.sparse != 0).any(dim=1, keepdim=True).float()
    if recipe.columns or recipe.solver == "outlier-pursuit":
        for s, m, k in zip(stored, rest, keep, strict=True):
            index = (k.view(-1) == 0).nonzero().view(-1)
            s |= {"column_index": index.to(torch.int32), "column_value": m[:, index].to(torch.bfloat16)}
        rest, seen = rest * keep, None if seen is None else seen.hiding(keep)
    if recipe.alpha and recipe.solver != "outlier-pursuit" and recipe.sparse_choice == "residual":
        mask = keep_largest(rest, recipe.alpha) != 0
    if recipe.remainder:
        taken = mask | (keep == 0)
        for s, d in zip(
            stored, round_remainder(torch.where(mask, 0.0, rest), recipe, taken, seen), strict=True
        ):
            s |= d
    if recipe.alpha and recipe.solver != "outlier-pursuit":
        for s, m, chosen in zip(stored, rest, mask, strict=True):
            s |= _store_sparse(m, chosen, parts_of(_shape(w), s, recipe))
    if recipe.act_scale == "static":
        assert seen is not None
        for i, s in enumerate(stored):
            s |= static_table(seen, i, recipe)
    everything = [{name: t.cpu().contiguous() for name, t in s.items()} for s in stored]
    return [parts_of(_shape(w), s, recipe) for s in everything], steps


def _transformed(
    w: Tensor, recipe: Recipe, seen: Inputs | None, stored: list[Stored]
) -> tuple[Tensor, Inputs | None]:
    """W' of each matrix and the inputs that it meets; what T needs goes to `stored`."""
    if recipe.premul == "none":
        return w.clone(), seen
    transforms = []
    for i, (m, s) in enumerate(zip(w, stored, strict=True)):
        if recipe.premul == "smooth" and seen is not None:
            s["smooth"] = smooth_scale(m, seen.absmax[i], recipe.smooth_strength).to(torch.bfloat16)
        elif recipe.premul == "duquant" and seen is not None:
            rotation = rotate.duquant(seen.samples[i])
            s |= {"permutation": rotation.permutation, "swaps": rotation.swaps}
        tables = (s.get(name) for name in ("smooth", "permutation", "swaps"))
        transforms.append(transform_of(recipe.premul, w.shape[2], *tables).to(w.device))
    changed = torch.stack([into(m, t) for m, t in zip(w, transforms, strict=True)])
    return changed, None if seen is None else seen.transformed(transforms)


def _deflated(w: Tensor, recipe: Recipe, seen: Inputs, stored: list[Stored]) -> Inputs:
    """The inputs without their principal directions R; R and L = W' R, R in its stored form, go to `stored`."""
    bases = []
    for m, directions, s in zip(w, principal(seen.moment, recipe.rank), stored, strict=True):
        s |= store_factors(m @ directions, directions, recipe.factor_bits)
        both = factors(LinearParts(_shape(w), **s))
        assert both is not None
        s |= store_factors(m @ both[1], directions, recipe.factor_bits)
        bases.append(both[1])
    return seen.deflated(bases)


def _store_sparse(rest: Tensor, chosen: Tensor, parts: LinearParts) -> Stored:
    """S = what D leaves of the chosen entries; codes that can't be zero (a codebook's, binary ones) count there too."""
    left = rest if parts.qweight is None else rest - dense(parts)
    s = torch.where(chosen, left, 0.0).to(torch.bfloat16).view(-1)
    index = s.nonzero().view(-1)
    return {"sparse_index": index.to(index_dtype(*parts.shape)), "sparse_value": s[index]}


def _product(shape: tuple[int, int], stored: Stored) -> Tensor:
    """L R^T from the stored factors, float32[out, in]."""
    factors = {name: t for name, t in stored.items() if name.startswith("proj_")}
    product = low_rank(LinearParts(shape, **factors))
    assert product is not None
    return product


def _shape(w: Tensor) -> tuple[int, int]:
    return w.shape[-2], w.shape[-1]


def _without(recipe: Recipe) -> dict[str, Recipe]:
    """The recipe without one of its parts, by the name of the part; "dense" is without all of them."""
    no_rank: dict[str, Any] = {"rank": 0, "low_rank_metric": "weight", "solver": "scaledgd"}
    no_sparse: dict[str, Any] = {"alpha": 0.0, "sparse_choice": "residual"}
    smaller: dict[str, Recipe] = {}
    if recipe.solver == "outlier-pursuit":
        no_sparse["solver"] = "svd"
        no_rank |= {"alpha": 0.0, "columns": 1, "column_choice": "weight"}
    if recipe.remainder and (recipe.rank or recipe.alpha or recipe.columns):
        smaller["dense"] = recipe.changed(**no_rank | no_sparse | {"columns": 0, "solver": "scaledgd"})
    if recipe.remainder and recipe.rank:
        smaller["low_rank"] = recipe.changed(**no_rank)
    if recipe.alpha:
        smaller["sparse"] = recipe.changed(**no_sparse)
    if recipe.act_quantized and (recipe.outlier_sigma is not None or recipe.outlier_budget):
        smaller["outliers"] = recipe.changed(outlier_sigma=None, outlier_budget=0)
    return smaller


def _measure(
    field: str, extras: list[dict[str, Any]], w: Tensor, recipe: Recipe, parts: list[LinearParts],
    stats: Sequence[LayerStats] | None,
) -> None:  # fmt: skip
    """Write the errors of layers that lack one part into `extras`."""
    for i, (e, m, p) in enumerate(zip(extras, w, parts, strict=True)):
        if field != "outliers":
            e["error_dense" if field == "dense" else f"error_without_{field}"] = weight_error(m, p)
        if stats is not None and field != "dense":
            e[f"output_error_without_{field}"] = output_error(m, p, recipe, stats[i])
