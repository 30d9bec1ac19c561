"""Split matrices into a low-rank and an alpha-sparse part (robust PCA) by alternating projections.

Guarantees: every returned S has at most `budget(alpha, d)` non-zeros in each row and column of length d; a
matrix doesn't feel its companions in the batch; never worse than the truncated SVD of W - T_alpha(W).
Knows nothing of: quantization. Computes in float64 on the device of its input.
"""

import torch
from torch import Tensor

from bitdgdm.quant.robust_pca import LowRankSparse, norm, polish, spectrum, transposed, without_sparse


def alternating_projections(
    w: Tensor, rank: int, alpha: float, *, incoherence: float = 1.0, steps: int = 40, tolerance: float = 1e-8
) -> LowRankSparse:
    """Project in turn on rank-k matrices and on matrices without small entries, with k growing to `rank`.

    w: float[B, out, in], finite. incoherence: mu of the factors, 1 for the flattest; beta = 4 mu^2 rank /
    sqrt(out in) turns a singular value into the largest entry that a low-rank part with it can have. `steps`
    bounds each stage; a matrix leaves a stage once the falling part of its threshold is an eighth of the
    resting one, or below `tolerance` of its norm.
    Stages are k = 1, 2, 4, ..., rank where the source takes every k; the falling part of stage k begins at
    sigma_(j+1), j the stage before, which is the source's sigma_k where j = k - 1.
    Source: Netrapalli, Niranjan, Sanghavi, Anandkumar, Jain, NeurIPS 2014, algorithm 1 (AltProj); alpha
    plays no part in it and is imposed by `polish`.
    """
    if alpha <= 0.0:
        return without_sparse(w, rank)
    if w.shape[-2] < w.shape[-1]:
        return transposed(
            alternating_projections(
                w.mT, rank, alpha, incoherence=incoherence, steps=steps, tolerance=tolerance
            )
        )
    a = w.double()
    whole = norm(a)
    taken = torch.zeros(w.shape[0], dtype=torch.int64, device=w.device)
    low = torch.zeros_like(a)
    factors = a.new_zeros(*a.shape[:-2], a.shape[-1], 0)
    beta = 4.0 * incoherence**2 * rank / (a.shape[-2] * a.shape[-1]) ** 0.5
    sparse = _without_small(a, beta * spectrum(a)[0][:, 0])
    before = 0
    for k in _stages(min(rank, a.shape[-1])):
        active = whole > 0
        factors = a.new_zeros(*a.shape[:-2], a.shape[-1], k)
        for t in range(steps):
            sigma, v = spectrum(a - sparse)
            sigma = torch.nn.functional.pad(sigma, (0, 1))
            resting, falling = sigma[:, k], 0.5**t * sigma[:, before]
            moving = active[:, None, None]
            factors = torch.where(moving, v[..., :k], factors)
            low = torch.where(moving, (a - sparse) @ factors @ factors.mT, low)
            sparse = torch.where(moving, _without_small(a - low, beta * (resting + falling)), sparse)
            taken += active
            active = active & (falling > torch.maximum(resting / 8, tolerance * whole))
            if not bool(active.any()):
                break
        before = k
    left = low @ factors
    pad = (0, rank - factors.shape[-1])
    left, right = (torch.nn.functional.pad(f, pad).to(w.dtype) for f in (left, factors))
    return polish(w, left, right, alpha, taken)


def _stages(rank: int) -> list[int]:
    """1, 2, 4, ... and the rank itself."""
    powers = [2**i for i in range(rank.bit_length())]
    return [*(p for p in powers if p < rank), rank] if rank > 0 else []


def _without_small(a: Tensor, level: Tensor) -> Tensor:
    """HT_level: entries of size at most level[B] become zero."""
    return torch.where(a.abs() > level[:, None, None], a, 0.0)
