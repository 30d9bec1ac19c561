"""Split matrices into a low-rank and an alpha-sparse part (robust PCA) by principal component pursuit.

Guarantees: every returned S has at most `budget(alpha, d)` non-zeros in each row and column of length d; a
matrix doesn't feel its companions in the batch; never worse than the truncated SVD of W - T_alpha(W).
Knows nothing of: quantization. Computes in float64 on the device of its input.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from bitdgdm.quant.robust_pca import LowRankSparse, norm, polish, spectrum, truncated_svd, without_sparse

GROWTH = 1.2
"""Factor of the penalty from one step to the next: rho of the source, which takes 1.5 and ends further from
the optimum."""

LARGEST = 1e7
"""Largest penalty, relative to the first one."""


def principal_component_pursuit(
    w: Tensor, rank: int, alpha: float, *, steps: int = 100, tolerance: float = 1e-7
) -> LowRankSparse:
    """Minimise ||L||_* + lambda ||S||_1 over L + S = W, lambda = 1 / sqrt(max(out, in)); then cut to rank
    and alpha.

    w: float[B, out, in], finite. The convex problem knows neither rank nor alpha: of a matrix that isn't
    low-rank plus sparse it leaves an L of high rank, of which the leading `rank` directions are kept.
    Source: Candes, Li, Ma, Wright, J. ACM 58(3), 2011 (problem and lambda); Lin, Chen, Ma, arXiv:1009.5055,
    algorithm 5 (inexact augmented Lagrange multipliers, an ADMM with growing penalty).
    """
    if alpha <= 0.0:
        return without_sparse(w, rank)
    weight = max(w.shape[-2:]) ** -0.5
    low, taken = minimise(w, weight, _largest_entry, _shrink_entries, steps=steps, tolerance=tolerance)
    left, right = truncated_svd(low.to(w.dtype), rank)
    return polish(w, left, right, alpha, taken)


def minimise(
    w: Tensor,
    weight: float,
    dual_norm: Callable[[Tensor], Tensor],
    shrink: Callable[[Tensor, Tensor], Tensor],
    *,
    steps: int,
    tolerance: float,
) -> tuple[Tensor, Tensor]:
    """argmin ||L||_* + weight ||W - L||_p by an inexact augmented Lagrangian; L float64[B, out, in], steps
    int64[B].

    shrink(a, level[B]): the proximal map of level ||.||_p; dual_norm(a): float64[B], its dual norm.
    """
    a = w.double()
    whole, top = norm(a), _largest_singular_value(a).clamp_min(torch.finfo(torch.float64).tiny)
    y = (
        a
        / torch.maximum(top, dual_norm(a) / weight).clamp_min(torch.finfo(torch.float64).tiny)[:, None, None]
    )
    penalty = 1.25 / top
    limit = LARGEST * penalty
    low, rest = torch.zeros_like(a), torch.zeros_like(a)
    active = whole > 0
    taken = torch.zeros(w.shape[0], dtype=torch.int64, device=w.device)
    for _ in range(steps):
        mu = penalty[:, None, None]
        new_low = _shrink_singular_values(a - rest + y / mu, 1.0 / penalty)
        new_rest = shrink(a - new_low + y / mu, weight / penalty)
        gap = a - new_low - new_rest
        moving = active[:, None, None]
        low, rest = torch.where(moving, new_low, low), torch.where(moving, new_rest, rest)
        y = torch.where(moving, y + mu * gap, y)
        taken += active
        penalty = torch.minimum(GROWTH * penalty, limit)
        active = active & (norm(gap) > tolerance * whole)
        if not bool(active.any()):
            break
    return low, taken


def _shrink_singular_values(a: Tensor, level: Tensor) -> Tensor:
    """Each singular value less level[B], none below zero."""
    if a.shape[-2] < a.shape[-1]:
        return _shrink_singular_values(a.mT, level).mT
    sigma, v = spectrum(a)
    kept = (sigma - level[:, None]).clamp_min(0.0)
    return (a @ v) * torch.where(kept > 0, kept / sigma, 0.0)[:, None, :] @ v.mT


def _largest_singular_value(a: Tensor) -> Tensor:
    return spectrum(a if a.shape[-2] >= a.shape[-1] else a.mT)[0][:, 0]


def _largest_entry(a: Tensor) -> Tensor:
    return a.abs().amax(dim=(-2, -1))


def _shrink_entries(a: Tensor, level: Tensor) -> Tensor:
    return a - a.clamp(-level[:, None, None], level[:, None, None])
