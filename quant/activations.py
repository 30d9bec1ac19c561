"""The grids of a layer's input at run time: which entries stay in 16 bit, and the codes of the others.

Guarantees: all shapes depend on the input's shape only (no host synchronisation, CUDA-graph safe); a token that isn't
finite has a scale that isn't, so its output isn't finite either and no other token feels it.
Knows nothing of: the weight, and where a static table came from.

Codes, in float32 with one rounding per operation, t the token without its outliers:
    symmetric    s = max|t| * (1/top),                          q = clamp(rint(t * (1/s)), -top, top)
    asymmetric   s = (max(t, 0) - min(t, 0)) * (1/levels),      z = rint(min(t, 0) * (1/s)),
                 q = clamp(rint(t * (1/s)), z, z + levels)
    fp8          s = max|t| * (1/448),                          q = e4m3(clamp(t * (1/s), -448, 448))
    log          s = max(t, 0),  q = the power of 2^(-1/4) nearest in the exponent to t * (1/s), of 2^bits - 1 of them; 0 below
    static       the same with the table's low and high in place of the token's smallest and largest entry
    group        as above, of each group of a token's entries
    one          s = 1 (fp8 only)
with top = 2^(bits-1) - 1, levels = 2^bits - 1, s at least the smallest normal number.
The constants 1/top, 1/levels and 1/448 are factors because a GPU divides by a constant in another way than a CPU.
q is already centred: the unsigned code is u = q - z in [0, levels], and u codes^T + z rowsum(codes) is the
same integer.
"""

import math

import torch
from torch import Tensor

from bitdgdm.quant.recipe import Recipe

FP8_TOP = 448.0
"""Largest e4m3 number."""

GRANULARITY = 4
"""Steps of a log grid within a factor of two."""

_TINY = float(torch.finfo(torch.float32).tiny)


def code_top(recipe: Recipe) -> int:
    """The largest |q| of integer codes: a centred asymmetric code lies anywhere in [-levels, levels]."""
    return 2**recipe.act_bits - 1 if recipe.act_asymmetric else 2 ** (recipe.act_bits - 1) - 1


def quantize_tokens(t: Tensor, bits: int, asymmetric: bool) -> tuple[Tensor, Tensor]:
    """One scale per row. t: float32[M, K] -> centred codes (integers as float32[M, K]), scale [M, 1]."""
    if asymmetric:
        levels = 2**bits - 1
        low, high = t.amin(dim=-1, keepdim=True).clamp_max_(0.0), t.amax(dim=-1, keepdim=True).clamp_min_(0.0)
        scale = ((high - low) * (1 / levels)).clamp_min(_TINY)
        inverse = scale.reciprocal()
        zero = (low * inverse).round_()
        q = t.mul(inverse).round_()  # never below zero: multiplication and rounding are monotone
        return torch.minimum(q, zero + levels), scale
    top = 2 ** (bits - 1) - 1
    scale = (t.abs().amax(dim=-1, keepdim=True) * (1 / top)).clamp_min(_TINY)
    return t.mul(scale.reciprocal()).round_().clamp_(-top, top), scale


def quantize_static(
    t: Tensor, low: Tensor, high: Tensor, bits: int, asymmetric: bool
) -> tuple[Tensor, Tensor]:
    """As `quantize_tokens` on a given range, beyond which entries saturate. low, high: float32[1], low <= 0 <= high."""
    if asymmetric:
        levels = 2**bits - 1
        scale = ((high - low) * (1 / levels)).clamp_min(_TINY)
        inverse = scale.reciprocal()
        zero = (low * inverse).round_()
        q = torch.minimum(torch.maximum(t.mul(inverse).round_(), zero), zero + levels)
        return q, _poisoned(scale, t)
    top = 2 ** (bits - 1) - 1
    scale = (torch.maximum(high, -low) * (1 / top)).clamp_min(_TINY)
    return t.mul(scale.reciprocal()).round_().clamp_(-top, top), _poisoned(scale, t)


def quantize_fp8(t: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 values as float32[M, K] and the scale [M, 1]. scale: float32[M, 1] or [1]."""
    q = t.mul(scale.reciprocal()).clamp_(-FP8_TOP, FP8_TOP).to(torch.float8_e4m3fn).to(torch.float32)
    return q, _poisoned(scale, t)


def quantize_log(t: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Values in [0, 1] of a log grid, float32[M, K], and the scale [M, 1]; negative entries become 0.

    The code k of 0 .. 2^bits - 2 stands for 2^(-k / GRANULARITY), the last one for zero.
    """
    scale = t.amax(dim=-1, keepdim=True).clamp_min(_TINY)
    k = torch.arange(2**bits - 2, -1, -1, dtype=torch.float64, device=t.device)
    values = torch.nn.functional.pad(torch.exp2(-k / GRANULARITY).float(), (1, 0))
    borders = torch.exp2(-(k + 0.5) / GRANULARITY).float()
    q = values[torch.bucketize(t.mul(scale.reciprocal()), borders, right=True)]
    return q, _poisoned(scale, t)


def quantize(t: Tensor, recipe: Recipe, low: Tensor | None, high: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes float32[M, K] and scale float32[M, 1] as `recipe` says. low, high: float32[1], a static scale's range."""
    if recipe.act_format == "int":
        if low is None or high is None:
            return quantize_tokens(t, recipe.act_bits, recipe.act_asymmetric)
        return quantize_static(t, low, high, recipe.act_bits, recipe.act_asymmetric)
    if recipe.act_format == "log":
        return quantize_log(t, recipe.act_bits)
    if recipe.act_scale == "one":
        return quantize_fp8(t, t.new_ones(1))
    largest = t.abs().amax(dim=-1, keepdim=True)
    if low is not None and high is not None:
        largest = torch.maximum(high, -low)
    return quantize_fp8(t, (largest * (1 / FP8_TOP)).clamp_min(_TINY))


def row_threshold(x: Tensor, sigma: float) -> Tensor:
    """sigma times the root mean square of each row, float32[M, 1]; fewer than K / sigma^2 of K exceed it."""
    # float64: 1e30 squared must not overflow
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float64)
    return norm.mul_(sigma / math.sqrt(x.shape[-1])).to(torch.float32)


def largest_entries(x: Tensor, count: int) -> Tensor:
    """x where it is among the `count` largest |x| of its row, else 0; of equal entries those with the smaller index."""
    if count >= x.shape[-1]:
        return x
    size = x.abs()
    limit = size.topk(count, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
    above, equal = size > limit, size == limit
    room = count - above.sum(dim=-1, keepdim=True)
    return torch.where(above | (equal & (equal.cumsum(dim=-1) <= room)), x, 0.0)


def split_outliers(x: Tensor, recipe: Recipe, tau: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(x_D, x_S) with x = x_D + x_S; x_S is None if the recipe keeps no outliers.

    tau: thresholds of |x| per channel, float32[K]; None takes `outlier_sigma` times each token's root mean square.
    """
    if recipe.outlier_budget:
        outliers = largest_entries(x, recipe.outlier_budget)
        return x - outliers, outliers
    if recipe.outlier_sigma is None:
        return x, None
    limit = row_threshold(x, recipe.outlier_sigma) if tau is None else tau
    inliers = x.abs().le_(limit).mul_(x)  # a 0/1 factor: a boolean mask costs three times as much
    return inliers, x - inliers


def _poisoned(scale: Tensor, t: Tensor) -> Tensor:
    """The scale of each row, NaN for a row that isn't finite: saturation would hide it. float32[M, 1]."""
    return scale + (t * 0.0).sum(dim=-1, keepdim=True)
