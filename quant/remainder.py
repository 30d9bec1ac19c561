"""The dense low-bit part D of a batch of weights, by the recipe's format and rounding.

Guarantees: each matrix is rounded as if it were alone; entries of `taken` (those a sparse part or a column block
holds) cost nothing and take no part in a scale that could leave them out.
Knows nothing of: the low-rank part and how the inputs were seen.
"""

import torch
from torch import Tensor

from bitdgdm.quant.adaround import adaround_moment
from bitdgdm.quant.binary import binarize
from bitdgdm.quant.codebook import kmeans_rows
from bitdgdm.quant.gptq import gptq_fp8, gptq_round
from bitdgdm.quant.inputs import Inputs
from bitdgdm.quant.packing import WIDEST, pack
from bitdgdm.quant.recipe import Recipe
from bitdgdm.quant.rounding import absmax_scale, round_weights

FP8_TOP = 448.0


def round_remainder(
    rest: Tensor, recipe: Recipe, taken: Tensor, seen: Inputs | None
) -> list[dict[str, Tensor]]:
    """The stored form of D of each matrix, as in LinearParts (qweight, scale, book).

    rest: float32[B, out, in], zero where `taken`, bool like it. seen: the transformed inputs, zero in the channels of
    a column block.
    """
    if recipe.weight_format == "fp8":
        return _fp8(rest, None if recipe.rounding == "nearest" or seen is None else seen.moment)
    if recipe.weight_format == "codebook":
        return _codebook(rest, recipe, taken, None if seen is None else seen.moment)
    if recipe.weight_format == "binary":
        codes, scale = binarize(rest, taken)
    elif recipe.rounding == "gptq":
        assert seen is not None
        codes, scale = gptq_round(
            rest, seen.moment, recipe.weight_bits, recipe.weight_clip, recipe.weight_group
        )
    elif recipe.rounding == "adaround":
        assert seen is not None
        codes, scale = adaround_moment(rest, seen.moment, recipe.weight_bits, recipe.weight_clip)
    else:
        codes, scale = _nearest(rest, recipe)
    return [
        {"qweight": _stored(q, recipe.weight_bits), "scale": s} for q, s in zip(codes, scale, strict=True)
    ]


def _nearest(rest: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Codes int8[B, out, in] and scale bfloat16[B, out] or [B, out, groups]."""
    batch, rows, width = rest.shape
    bits, group = recipe.weight_bits, recipe.weight_group
    if not group:
        codes, scale = round_weights(rest.reshape(-1, width), bits, recipe.weight_clip)
        return codes.view(rest.shape), scale.view(batch, rows)
    pieces = -(-width // group)
    padded = torch.nn.functional.pad(rest, (0, pieces * group - width)).reshape(-1, group)
    codes, scale = round_weights(padded, bits, recipe.weight_clip)
    return codes.view(batch, rows, -1)[..., :width].contiguous(), scale.view(batch, rows, pieces)


def _fp8(rest: Tensor, moment: Tensor | None) -> list[dict[str, Tensor]]:
    """One scale a row, no entry beyond the largest e4m3 number; rounded by gptq where there is a second moment."""
    scale = absmax_scale(rest.abs().amax(dim=2, keepdim=True), FP8_TOP)
    if moment is None:
        codes = (rest / scale).to(torch.float8_e4m3fn)
    else:
        codes = gptq_fp8(rest, moment, scale.squeeze(2))
    stored = scale.squeeze(2).to(torch.bfloat16)
    return [{"qweight": q, "scale": s} for q, s in zip(codes, stored, strict=True)]


def _codebook(rest: Tensor, recipe: Recipe, taken: Tensor, moment: Tensor | None) -> list[dict[str, Tensor]]:
    """Clustered with the mean square of each input as weight where it is known, and none for entries `taken`."""
    weight = torch.where(taken, 0.0, 1.0)
    if moment is not None:
        weight = weight * moment.diagonal(dim1=-2, dim2=-1).unsqueeze(-2)
    codes, book = kmeans_rows(rest, recipe.weight_bits, weight)
    half = 2 ** (recipe.weight_bits - 1)
    signed = (codes.to(torch.int16) - half).to(torch.int8)
    return [{"qweight": pack(q, recipe.weight_bits), "book": b} for q, b in zip(signed, book, strict=True)]


def _stored(codes: Tensor, bits: int) -> Tensor:
    return pack(codes, bits) if bits <= WIDEST else codes
