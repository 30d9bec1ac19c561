"""Split matrices into a low-rank part and a few whole columns (robust PCA with column-sparse outliers).

Guarantees: S holds at most `budget(alpha, in)` columns that aren't zero, each a column of W as it is, and L
R^T is zero there. It does NOT obey alpha down a column, where it is dense: alpha bounds its rows only. A
matrix doesn't feel its companions in the batch.
Knows nothing of: quantization. Computes in float64 on the device of its input.
"""

import torch
from torch import Tensor

from bitdgdm.quant.pcp import minimise
from bitdgdm.quant.robust_pca import LowRankSparse, budget, truncated_svd, without_sparse


def outlier_pursuit(
    w: Tensor, rank: int, alpha: float, *, steps: int = 100, tolerance: float = 1e-7
) -> LowRankSparse:
    """Minimise ||L||_* + lambda ||C||_1,2 over L + C = W, lambda = 3 / (7 sqrt(columns)); keep the largest
    columns.

    w: float[B, out, in], finite; a column is an input of the layer. columns = `budget(alpha, in)`, gamma n
    of the source. ||C||_1,2: sum of the lengths of the columns of C. Columns of zeros in C aren't taken, so
    S may hold fewer.
    Source: Xu, Caramanis, Sanghavi, IEEE Trans. Inf. Theory 58(5), 2012 (NeurIPS 2010), section 2; solved by
    the inexact augmented Lagrangian of pcp.py.
    """
    if alpha <= 0.0:
        return without_sparse(w, rank)
    most = budget(alpha, w.shape[-1])
    weight = 3.0 / (7.0 * most**0.5)
    low, taken = minimise(w, weight, _longest_column, _shrink_columns, steps=steps, tolerance=tolerance)
    # C of a matrix without outlying columns holds what the last step left over, not zeros
    length, longest = _lengths(w - low), _lengths(w).amax(dim=-1, keepdim=True)
    length = torch.where(length > 10 * tolerance * longest, length, 0.0)
    order = length.argsort(dim=-1, descending=True, stable=True)[..., :most]
    chosen = torch.zeros_like(w[..., :1, :], dtype=torch.bool)
    chosen.scatter_(-1, order, length.gather(-1, order) > 0)
    left, right = truncated_svd(torch.where(chosen, 0.0, w), rank)
    return LowRankSparse(left, right, torch.where(chosen, w, 0.0), taken)


def _lengths(a: Tensor) -> Tensor:
    """float64[B, 1, in]."""
    return a.double().square().sum(dim=-2, keepdim=True).sqrt()


def _longest_column(a: Tensor) -> Tensor:
    return _lengths(a)[:, 0].amax(dim=-1)


def _shrink_columns(a: Tensor, level: Tensor) -> Tensor:
    length = _lengths(a)
    return a * torch.where(length > level[:, None, None], 1.0 - level[:, None, None] / length, 0.0)
