"""Eigenvalues and eigenvectors of small symmetric matrices, the same whatever else is in the batch.

Guarantees: elementwise float64 arithmetic in a fixed order, so a matrix's result is a function of that
matrix only; no host synchronisation. `basis_vectors` depends on the matrix and the order of its rows, not on
a solver: the basis of a degenerate eigenspace and the sign of every vector follow the rule written there.
Knows nothing of: masks, molecules, what the network does with a spectrum.
"""

import math

import torch
from torch import Tensor

CLUSTER = 1e-6  # eigenvalues nearer than this are one eigenvalue; Laplacians of graphs have integer entries
TIE = 2e-4  # squares this near (relative), that is magnitudes within 1e-4, are equal


def sweeps_for(n: int) -> int:
    """Jacobi sweeps that bring graph Laplacians of n nodes below 1e-8 (measured on random graphs)."""
    return max(4, int(2.5 * math.log2(max(n, 2))))


def symmetric_eigen(a: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues in ascending order and eigenvectors in columns, by cyclic Jacobi with parallel rotations.

    a: [B, n, n] symmetric. Returns float64[B, n], float64[B, n, n].
    Source: Golub and Van Loan, Matrix Computations, 8.5 (2 x 2 symmetric Schur, round-robin ordering).
    """
    batch, n, _ = a.shape
    m = n + n % 2  # an odd size gets a player who rests: his rotations are identities
    h = m // 2
    # Rows 0..m-1 hold A, the rest V, so that one column update serves both; the batch comes last, so that
    # every operation is a few long loops
    work = a.new_zeros((m + n, m, batch), dtype=torch.float64)
    work[:n, :n] = a.to(torch.float64).permute(1, 2, 0)
    work[m:, :n] = torch.eye(n, dtype=torch.float64, device=a.device)[..., None]
    for _ in range(sweeps_for(n) * (m - 1)):
        work = _round(work, h)
    values = torch.diagonal(work[:n, :n])  # [B, n]: m - 1 rounds bring everyone back to his place
    values, order = values.sort(dim=-1, stable=True)
    vectors = work[m:, :n].permute(2, 0, 1)
    return values, vectors.gather(2, order[:, None].expand(-1, n, -1))


def _round(work: Tensor, h: int) -> Tensor:
    """Annihilate the entries (i, i + h), then move on to the next pairing (seat 0 stays, the others rotate)."""
    a_pp = torch.diagonal(work[:h, :h]).T
    a_qq = torch.diagonal(work[h : 2 * h, h:]).T
    a_pq = torch.diagonal(work[:h, h:]).T
    d = a_qq - a_pp
    root = (d * d + 4 * a_pq * a_pq).sqrt() + 1e-300  # so that nothing to do is 0 / 1e-300 and not 0 / 0
    t = 2 * a_pq / torch.where(d < 0, d - root, d + root)
    c = (t * t + 1).rsqrt()
    s = t * c

    c, s = c[:, None], s[:, None]
    p, q = work[:h], work[h : 2 * h]
    p, q = c * p - s * q, s * p + c * q
    work = torch.cat((*_next_seats(p, q, 0), work[2 * h :]))
    c, s = c.transpose(0, 1), s.transpose(0, 1)
    p, q = work[:, :h], work[:, h:]
    return torch.cat(_next_seats(c * p - s * q, s * p + c * q, 1), dim=1)


def _next_seats(p: Tensor, q: Tensor, dim: int) -> tuple[Tensor, ...]:
    h = p.shape[dim]
    if h == 1:
        return p, q
    part = [(0, 1), (1, h - 2), (h - 1, 1)]
    p_first, p_middle, p_last = (p.narrow(dim, *at) for at in part)
    return p_first, q.narrow(dim, 0, 1), p_middle, q.narrow(dim, 1, h - 1), p_last


def pivot(diagonal: Tensor) -> Tensor:
    """The first index whose value is within TIE of the largest. diagonal: [B, n] >= 0 -> int64[B, 1]."""
    near = diagonal >= (1 - TIE) * diagonal.amax(-1, keepdim=True)
    return near.to(torch.int8).argmax(-1, keepdim=True)


def projector_diagonal(vectors: Tensor, member: Tensor) -> Tensor:
    """Diagonal of the projector on the eigenvectors marked in member: float64[B, n]. -> [B, n]."""
    return (vectors * vectors * member[:, None]).sum(-1)


def projector_column(vectors: Tensor, member: Tensor, index: Tensor) -> Tensor:
    """Column `index` (int64[B, 1]) of the same projector -> [B, n]."""
    row = vectors.gather(1, index[..., None].expand(-1, 1, vectors.shape[2]))
    return (vectors * row * member[:, None]).sum(-1)


def basis_vectors(values: Tensor, vectors: Tensor, first: Tensor) -> Tensor:
    """Eigenvectors number `first` and `first + 1` in the canonical basis of their eigenspaces.

    The rule: with P the projector on an eigenspace, take the pivot p, the first index whose P_pp is within
    1e-4 of the largest (as a magnitude, relative); the first vector is P e_p / sqrt(P_pp); the next one is
    the same for P minus what is taken. So a vector's first component of (nearly) largest magnitude is
    positive. P is a function of the matrix alone, and so is the result. `first` must be the first number of
    its eigenspace.

    values: float64[B, n] ascending, vectors: float64[B, n, n], first: int64[B]. Returns float64[B, n, 2];
    zeros where the number is n or more.
    """
    n = values.shape[1]
    taken, level, result = torch.zeros_like(values), None, []
    for number in (first[:, None], first[:, None] + 1):
        value = values.gather(1, number.clamp(max=n - 1))
        member = ((values - value).abs() <= CLUSTER).to(values.dtype)
        if level is not None:  # a new eigenspace starts with nothing taken
            taken = taken * ((level - value).abs() <= CLUSTER)
        diagonal = projector_diagonal(vectors, member) - taken * taken
        p = pivot(diagonal)
        column = projector_column(vectors, member, p) - taken * taken.gather(1, p)
        vector = column * diagonal.gather(1, p).clamp(min=1e-30).rsqrt()
        taken, level = vector, value
        result.append(vector * (number < n))
    return torch.stack(result, dim=-1)
