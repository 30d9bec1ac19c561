"""Split matrices into a low-rank and an alpha-sparse part (robust PCA) by scaled gradient descent.

Guarantees: every returned S has at most `budget(alpha, d)` non-zeros in each row and column of length d; the
result for one matrix doesn't depend on the others in its batch being there, and is never worse than its own
starting point; ties are decided by position. NaN or infinity in the input gives undefined results: callers
check first.
Knows nothing of: quantization. Works in the dtype and on the device of its input.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

JITTER = 1e-9
"""Added to the diagonal of a Gram matrix, relative to its mean diagonal."""


@dataclass(frozen=True)
class LowRankSparse:
    """W ~ left right^T + sparse. left [B, out, R], right [B, in, R], sparse [B, out, in], steps int64[B]."""

    left: Tensor
    right: Tensor
    sparse: Tensor
    steps: Tensor


def budget(alpha: float, length: int) -> int:
    """Largest number of non-zeros of S in a row or column of this length: ceil(alpha * length), at least 2.

    Below 2 a matrix with one outlier too many in a row does worse than with none allowed. alpha = 0 allows
    none.
    """
    if alpha <= 0.0:
        return 0
    return min(length, max(2, math.ceil(alpha * length - 1e-9)))


def keep_largest(a: Tensor, alpha: float) -> Tensor:
    """T_alpha: keep an entry if it is among the largest of its row AND among the largest of its column, else
    0.

    a: float[..., out, in]. `budget(alpha, in)` entries count as largest in a row, `budget(alpha, out)` in a
    column; of equal entries those with the smaller index. The result is an intersection, so usually sparser
    than alpha.
    Source: Tong, Ma, Chi, JMLR 22(150), 2021, section 3.2.
    """
    size = a.abs()
    mask = _largest_of_row(size, budget(alpha, a.shape[-1]))
    mask &= _largest_of_row(size.mT.contiguous(), budget(alpha, a.shape[-2])).mT
    return torch.where(mask, a, 0.0)


def _largest_of_row(size: Tensor, k: int) -> Tensor:
    """bool like size: the k largest non-zero entries of each row, ties by index."""
    if k == 0:
        return torch.zeros_like(size, dtype=torch.bool)
    threshold = size.topk(k, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
    mask = (size >= threshold) & (size > 0)
    if not size.is_cuda and not bool((mask.sum(dim=-1) > k).any()):  # a GPU would have to be waited for
        return mask
    above, equal = size > threshold, size == threshold
    room = k - above.sum(dim=-1, keepdim=True)
    return mask & (above | (equal.cumsum(dim=-1) <= room))


def spectrum(w: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values float64[B, in], falling, and right vectors float64[B, in, in] of w [B, out, in], out
    >= in.

    From the Gram matrix in float64: values below 1e-8 of the largest one are noise.
    """
    wide = w.double()
    values, vectors = torch.linalg.eigh(wide.mT @ wide)
    return values.flip(-1).clamp_min(0.0).sqrt(), vectors.flip(-1)


def truncated_svd(w: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Balanced factors U sqrt(Sigma), V sqrt(Sigma) of the best rank-`rank` approximation.

    w: float[B, out, in] -> [B, out, rank], [B, in, rank]; directions below 1e-7 of the largest one are zero.
    From the eigenvectors of the smaller Gram matrix in float64 (`spectrum`): a tenth of the time of a full
    SVD, and accurate here because directions smaller than 1e-7 are dropped. The largest entry of a left
    vector is positive.
    """
    if w.shape[-2] < w.shape[-1]:
        right, left = truncated_svd(w.mT, rank)
        return left, right
    rank_found = min(rank, w.shape[-1])
    wide = w.double()
    sigma, v = (part[..., :rank_found] for part in spectrum(wide))
    alive = sigma > 1e-7 * sigma[..., :1]
    root = torch.where(alive, sigma, 1.0).sqrt()
    left = torch.where(alive.unsqueeze(-2), (wide @ v) / root.unsqueeze(-2), 0.0)
    right = torch.where(alive.unsqueeze(-2), v * root.unsqueeze(-2), 0.0)
    largest = left.gather(-2, left.abs().argmax(dim=-2, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0)
    pad = (0, rank - rank_found)
    left, right = (torch.nn.functional.pad(f * sign, pad).to(w.dtype) for f in (left, right))
    return left, right


def without_sparse(w: Tensor, rank: int) -> LowRankSparse:
    """What alpha = 0 allows: nothing is better than the truncated SVD."""
    left, right = truncated_svd(w, rank)
    return LowRankSparse(
        left, right, torch.zeros_like(w), torch.zeros(len(w), dtype=torch.int64, device=w.device)
    )


def transposed(found: LowRankSparse) -> LowRankSparse:
    """The split of W^T, of W."""
    return LowRankSparse(found.right, found.left, found.sparse.mT.contiguous(), found.steps)


def scaled_gd(
    w: Tensor, rank: int, alpha: float, *, steps: int = 60, eta: float = 0.5, tolerance: float = 1e-4
) -> LowRankSparse:
    """Split each matrix of a batch into a rank-`rank` product and an alpha-sparse remainder.

    w: float[B, out, in], finite. eta: step, 0.1 to 2/3. A matrix stops once ||D|| changes by less than
    `tolerance` ||W|| in a step, D = L R^T + S - W; 0 runs all steps.
    Source: Tong, Ma, Chi, JMLR 22(150), 2021, algorithm 2; the polish is ours.
    """
    if alpha <= 0.0:
        return without_sparse(w, rank)
    first_left, first_right = truncated_svd(w - keep_largest(w, alpha), rank)
    left, right = first_left, first_right
    norm_w = norm(w)
    before = torch.full_like(norm_w, torch.inf)
    active = norm_w > 0
    taken = torch.zeros(w.shape[0], dtype=torch.int64, device=w.device)
    for _ in range(steps if rank > 0 else 0):
        if not bool(active.any()):
            break
        rest = w - left @ right.mT
        # twice alpha inside the loop: the published proof needs the slack
        d = keep_largest(rest, 2 * alpha) - rest
        now = norm(d)
        active = active & ((now - before).abs() >= tolerance * norm_w)
        before = now
        new_left = left - eta * times_inverse(d @ right, right)  # both factors from the old values
        new_right = right - eta * times_inverse(d.mT @ left, left)
        moving = active[:, None, None]
        left, right = torch.where(moving, new_left, left), torch.where(moving, new_right, right)
        taken += active
    return polish(w, left, right, alpha, taken, start=(first_left, first_right))


def polish(
    w: Tensor,
    left: Tensor,
    right: Tensor,
    alpha: float,
    steps: Tensor,
    *,
    start: tuple[Tensor, Tensor] | None = None,
) -> LowRankSparse:
    """Turn the factors at which a solver ended into a split that obeys alpha and is no worse than its start.

    S is cut to alpha, the factors are refitted to W - S, and S to what they leave. Without the refit the
    entries that lost their place in S stay in the remainder at full size, and a 4-bit remainder has 1.2
    times the error.
    start: the factors to fall back to, by default the truncated SVD of W - T_alpha(W).
    """
    rank = left.shape[-1]
    first_left, first_right = truncated_svd(w - keep_largest(w, alpha), rank) if start is None else start
    finite = (left @ right.mT).isfinite().all(dim=-1).all(dim=-1)[:, None, None]  # an iterate may run away
    left, right = torch.where(finite, left, first_left), torch.where(finite, right, first_right)
    if rank > 0:
        left, right = truncated_svd(w - keep_largest(w - left @ right.mT, alpha), rank)
    sparse = keep_largest(w - left @ right.mT, alpha)
    first_sparse = keep_largest(w - first_left @ first_right.mT, alpha)
    gained = norm(left @ right.mT + sparse - w) <= norm(first_left @ first_right.mT + first_sparse - w)
    gained = gained[:, None, None]
    return LowRankSparse(
        torch.where(gained, left, first_left),
        torch.where(gained, right, first_right),
        torch.where(gained, sparse, first_sparse),
        steps,
    )


def norm(a: Tensor) -> Tensor:
    """Frobenius norm, float64[B]: rows first, so that it doesn't depend on the number of threads."""
    return a.double().square().sum(dim=-1).sum(dim=-1).sqrt()


def times_inverse(a: Tensor, factor: Tensor) -> Tensor:
    """a (F^T F)^-1 for a [B, n, R], F [B, m, R]; the R x R system is solved in float64."""
    wide = factor.double()
    gram = wide.mT @ wide
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(dim=-1)
    gram.diagonal(dim1=-2, dim2=-1).add_((JITTER * mean + torch.finfo(torch.float64).tiny)[:, None])
    chol, _ = torch.linalg.cholesky_ex(gram)
    return torch.cholesky_solve(a.double().mT, chol).mT.to(a.dtype)
