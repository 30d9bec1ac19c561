"""The low-rank part of a batch of weights: which solver finds it, in which metric, and how its factors are stored.

Guarantees: works on batches, one matrix not feeling the others; stored factors are what their product is taken from,
so what comes after them is fitted to what they really leave.
Knows nothing of: how the remainder is rounded, and where statistics of the inputs came from.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bitdgdm.quant.altproj import alternating_projections
from bitdgdm.quant.lrpca import learned_rpca, trained
from bitdgdm.quant.outlier_pursuit import outlier_pursuit
from bitdgdm.quant.packing import pack
from bitdgdm.quant.pcp import principal_component_pursuit
from bitdgdm.quant.recipe import Recipe
from bitdgdm.quant.robust_pca import LowRankSparse, keep_largest, scaled_gd, truncated_svd
from bitdgdm.quant.rounding import round_weights

ROUNDS = 3
"""Turns between the low-rank and the sparse part where both are chosen by the output's error."""

DAMPING = 1e-3
"""Added to the second moment, in parts of its mean diagonal: directions that calibration never saw still count."""


def _svd(w: Tensor, rank: int, alpha: float) -> LowRankSparse:
    """Rank first, then S of what it leaves: SVDQuant's order, with S on top where alpha asks for it."""
    left, right = truncated_svd(w, rank)
    sparse = keep_largest(w - left @ right.mT, alpha)
    return LowRankSparse(left, right, sparse, torch.zeros(len(w), dtype=torch.int64, device=w.device))


SOLVERS: dict[str, Callable[[Tensor, int, float], LowRankSparse]] = {
    "scaledgd": scaled_gd,
    "altproj": alternating_projections,
    "lrpca": learned_rpca,
    "lrpca-trained": lambda w, rank, alpha: learned_rpca(w, rank, alpha, schedule=trained()),
    "pcp": principal_component_pursuit,
    "outlier-pursuit": outlier_pursuit,
    "svd": _svd,
}


def split(w: Tensor, recipe: Recipe, moment: Tensor | None) -> LowRankSparse:
    """L R^T and S of each matrix of float32[B, out, in] by the recipe's solver.

    moment: float64[B, in, in], the second moment of the inputs; needed where the recipe's metric is the output.
    S is the solver's own; a recipe that chooses S before the low-rank part hands in what S leaves, and gets S = 0.
    """
    alpha = recipe.alpha if recipe.sparse_choice == "residual" else 0.0
    if recipe.low_rank_metric == "weight":
        return SOLVERS[recipe.solver](w, recipe.rank, alpha)
    assert moment is not None
    root, inverse = _roots(moment)
    fit = partial(_whitened_svd, rank=recipe.rank, root=root, inverse=inverse)
    left, right = fit(w)
    for _ in range(ROUNDS if alpha else 0):
        left, right = fit(w - keep_largest(w - left @ right.mT, alpha))
    sparse = keep_largest(w - left @ right.mT, alpha)
    return LowRankSparse(left, right, sparse, torch.zeros(len(w), dtype=torch.int64, device=w.device))


def principal(moment: Tensor, rank: int) -> Tensor:
    """The directions that hold most of the inputs' energy: orthonormal float32[B, in, R].

    moment: float64[B, in, in]. The sign of a direction is that of its largest entry, the first of equal ones.
    """
    vectors = torch.linalg.eigh(moment).eigenvectors.flip(-1)[..., :rank]
    largest = vectors.gather(-2, vectors.abs().argmax(dim=-2, keepdim=True))
    return (vectors * torch.where(largest < 0, -1.0, 1.0)).float().contiguous()


def store_factors(left: Tensor, right: Tensor, bits: int) -> dict[str, Tensor]:
    """The stored form of L [out, R] and R [in, R], as in LinearParts."""
    if bits == 16:
        return {"proj_up": left.to(torch.bfloat16), "proj_down": right.to(torch.bfloat16)}
    stored = {}
    for name, factor in (("proj_up", left), ("proj_down", right)):
        codes, stored[f"{name}_scale"] = round_weights(factor.T.contiguous(), bits, "absmax")
        stored[name] = codes.T.contiguous() if bits == 8 else pack(codes.T.contiguous(), bits)
    return stored


def _whitened_svd(w: Tensor, *, rank: int, root: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Factors that minimise ||(W - L R^T) C^1/2||, balanced. root, inverse: C^1/2 and C^-1/2, float64[B, in, in]."""
    left, right = truncated_svd(w.double() @ root, rank)
    right = inverse @ right
    # the two factors are rounded apart: components of equal length on both sides lose least
    sizes = [f.norm(dim=-2, keepdim=True) for f in (left, right)]
    alive = (sizes[0] > 0) & (sizes[1] > 0)
    ratio = torch.where(alive, sizes[1] / torch.where(alive, sizes[0], 1.0), 1.0).sqrt()
    return (left * ratio).to(w.dtype), (right / ratio).to(w.dtype)


def _roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """C^1/2 and C^-1/2, symmetric float64[B, in, in], of the damped C."""
    wide = moment.double()
    mean = wide.diagonal(dim1=-2, dim2=-1).mean(dim=-1)
    damping = DAMPING * torch.where(mean > 0, mean, 1.0)
    values, vectors = torch.linalg.eigh(wide)
    values = (values.clamp_min(0.0) + damping[:, None]).sqrt().unsqueeze(-2)
    return (vectors * values) @ vectors.mT, (vectors / values) @ vectors.mT
