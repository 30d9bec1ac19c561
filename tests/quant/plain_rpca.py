"""Robust PCA in plain NumPy float64, one matrix at a time, from the formulas: what the batched solvers are
held against.

Nothing is shared with the code under test but `budget`, which says how many entries alpha stands for.
"""

import numpy as np

from bitdgdm.quant.robust_pca import budget


def hadamard(n):
    h = np.ones((1, 1))
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return h / np.sqrt(n)


def low_rank_plus_sparse(n, rank, kappa, seed=0):
    """X as incoherent as can be, condition number kappa; S with two outliers in each row and column."""
    rng = np.random.default_rng(seed)
    rows, columns = rng.permutation(n), rng.permutation(n)
    h = hadamard(n)
    x = h[rows][:, :rank] * np.logspace(0, -np.log10(kappa), rank) @ h[columns][:, rank : 2 * rank].T
    s = np.zeros((n, n))
    first = rng.permutation(n)
    for permutation in (first, np.roll(first, 1)):
        s[np.arange(n), permutation] = rng.choice((-1, 1), n) * rng.uniform(1, 2, n) * np.abs(x).max()
    return x, s


def random_low_rank(rows, columns, rank, kappa, rng):
    u, v = (np.linalg.qr(rng.standard_normal((n, rank)))[0] for n in (rows, columns))
    return u * np.logspace(0, -np.log10(kappa), rank) @ v.T


def keep_largest(a, alpha):
    """Sort every row and every column; of equal entries the first wins."""
    keep = np.ones(a.shape, bool)
    for axis, length in ((0, a.shape[0]), (1, a.shape[1])):
        order = np.argsort(np.argsort(-np.abs(a), axis=axis, kind="stable"), axis=axis, kind="stable")
        keep &= order < budget(alpha, length)
    return np.where(keep, a, 0.0)


def best_of_rank(a, rank):
    u, sigma, vt = np.linalg.svd(a, full_matrices=False)
    return (u[:, :rank] * sigma[:rank]) @ vt[:rank]


def polished(w, low, rank, alpha):
    """(L R^T, S): S cut to alpha, the product refitted, S again."""
    low = best_of_rank(w - keep_largest(w - low, alpha), rank)
    return low, keep_largest(w - low, alpha)


def balanced(a, rank):
    u, sigma, vt = np.linalg.svd(a, full_matrices=False)
    root = np.sqrt(sigma[:rank])
    return u[:, :rank] * root, vt[:rank].T * root


def scaled_gd(w, rank, alpha, steps, eta):
    """L_t R_t^T for t = 0 .. steps. Tong, Ma, Chi 2021, algorithm 2."""
    l, r = balanced(w - keep_largest(w, alpha), rank)
    products = [l @ r.T]
    for _ in range(steps):
        d = l @ r.T + keep_largest(w - l @ r.T, 2 * alpha) - w
        l, r = (
            l - eta * d @ r @ np.linalg.inv(r.T @ r),
            r - eta * d.T @ l @ np.linalg.inv(l.T @ l),
        )
        products.append(l @ r.T)
    return products


def alternating_projections(w, rank, beta, steps):
    """Low-rank iterates of Netrapalli et al. 2014, algorithm 1, with `steps` iterations in each stage k = 1
    .. rank."""

    def without_small(a, level):
        return np.where(np.abs(a) > level, a, 0.0)

    s = without_small(w, beta * np.linalg.norm(w, 2))
    products = []
    for k in range(1, rank + 1):
        for t in range(steps):
            sigma = np.append(np.linalg.svd(w - s, compute_uv=False), 0.0)
            low = best_of_rank(w - s, k)
            s = without_small(w - low, beta * (sigma[k] + 0.5**t * sigma[k - 1]))
            products.append(low)
    return products


def learned_rpca(w, rank, zeta, eta):
    """L_k R_k^T for k = 0 .. K. Cai, Liu, Yin 2021, algorithm 1."""

    def soft(a, level):
        return np.sign(a) * np.maximum(np.abs(a) - level, 0.0)

    l, r = balanced(w - soft(w, zeta[0]), rank)
    products = [l @ r.T]
    for level, size in zip(zeta[1:], eta, strict=True):
        d = l @ r.T + soft(w - l @ r.T, level) - w
        l, r = (
            l - size * d @ r @ np.linalg.inv(r.T @ r),
            r - size * d.T @ l @ np.linalg.inv(l.T @ l),
        )
        products.append(l @ r.T)
    return products


def pursue(w, weight, shrink, steps=4000):
    """argmin ||L||_* + weight ||W - L||_p by an ADMM with a fixed penalty, which converges for any convex
    problem."""
    mu = w.size / (4 * np.abs(w).sum())
    y, s = np.zeros_like(w), np.zeros_like(w)
    for _ in range(steps):
        u, sigma, vt = np.linalg.svd(w - s + y / mu, full_matrices=False)
        low = (u * np.maximum(sigma - 1 / mu, 0.0)) @ vt
        s = shrink(w - low + y / mu, weight / mu)
        gap = w - low - s
        y = y + mu * gap
        if np.linalg.norm(gap) <= 1e-11 * np.linalg.norm(w):
            break
    return low


def shrink_entries(a, level):
    return np.sign(a) * np.maximum(np.abs(a) - level, 0.0)


def shrink_columns(a, level):
    length = np.maximum(np.linalg.norm(a, axis=0), 1e-300)
    return a * np.maximum(1 - level / length, 0.0)
