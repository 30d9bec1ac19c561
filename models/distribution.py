"""How far generated molecules are from a reference set, as a whole.

Guarantees: every figure comes with a 95 % interval for the drawing of the generated molecules (the reference counts
as given): Wilson's for shares, value +- 1.96 bootstrap standard errors for distances, because the percentiles of a
bootstrapped distance lie above the distance itself. The same molecules and seed give the same figures.
Knows nothing of: where molecules come from, what is computed of each (profile.py).

Source: MOSES (Polykovskiy et al., 2020): similarity of scaffolds and fragments is the cosine of their counts, SNN the
mean Tanimoto similarity to the nearest reference molecule, a property's distance Wasserstein-1; Fréchet distance of
ChemNet features: Preuer et al., 2018.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from bitdgdm.models.profile import BITS, PROPERTIES, Floats, Profile

Z95 = 1.959963984540054
REPEATS = 200
FCD_REPEATS = 40  # each costs a 512 x 512 eigenproblem
_ROWS = 512  # fingerprints compared at a time


@dataclass(frozen=True)
class Measure:
    """One figure. low, high: 95 % interval, None where there is none. n: molecules behind it."""

    metric: str
    value: float
    low: float | None
    high: float | None
    unit: str
    n: int


def wilson(hits: int, n: int) -> tuple[float, float]:
    """Return the 95 % interval of a share. Source: Wilson, J. Am. Stat. Assoc. 22, 1927."""
    if not n:
        return 0.0, 1.0
    p, z2 = hits / n, Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def share(metric: str, hits: int, n: int) -> Measure:
    """Return a share in percent; of nothing it is 0 with an interval of everything."""
    low, high = wilson(hits, n)
    return Measure(metric, 100 * hits / n if n else 0.0, 100 * low, 100 * high, "%", n)


def resamples(n: int, repeats: int, seed: int = 0) -> NDArray[np.float64]:
    """Return how often each of n molecules is drawn in each bootstrap repeat: float64[repeats, n]."""
    drawn = np.random.default_rng(seed).integers(0, n, (repeats, n))
    offsets = n * np.arange(repeats)[:, None]
    return (
        np.bincount((drawn + offsets).ravel(), minlength=repeats * n).reshape(repeats, n).astype(np.float64)
    )


def distances(
    generated: Profile, reference: Profile, *, seed: int = 0, repeats: int = REPEATS
) -> list[Measure]:
    """Return every distance and similarity that both profiles allow; nothing if either is empty.

    Similarities are undefined, and left out, where one set has no scaffold or no fragment.
    """
    n = len(generated)
    if n < 2 or len(reference) < 2:
        return []
    drawn = resamples(n, repeats, seed)
    found = []
    if generated.features is not None and reference.features is not None:
        value, spread = frechet(generated.features, reference.features, drawn[:FCD_REPEATS])
        found.append(_around("FCD", value, spread, "", n))
    counted: tuple[tuple[str, Sequence[Sequence[Hashable]], Sequence[Sequence[Hashable]]], ...] = (
        ("scaffold similarity", _lists(generated.scaffolds), _lists(reference.scaffolds)),
        ("fragment similarity", generated.fragments, reference.fragments),
    )
    for metric, ours, theirs in counted:
        value, spread = cosine_of_counts(ours, theirs, drawn)
        if not math.isnan(value):
            found.append(_around(metric, value, spread, "", n))
    nearest = nearest_similarity(generated.bits, reference.bits)
    found.append(
        _around(
            "similarity to nearest (SNN)", float(nearest.mean()), float(nearest.std() / math.sqrt(n)), "", n
        )
    )
    for k, name in enumerate(PROPERTIES):
        value, spread = wasserstein(generated.properties[:, k], reference.properties[:, k], drawn)
        found.append(_around(f"Wasserstein distance of {name}", value, spread, "", n))
    return found


def _around(metric: str, value: float, spread: float, unit: str, n: int) -> Measure:
    return Measure(metric, value, max(0.0, value - Z95 * spread), value + Z95 * spread, unit, n)


def _lists(scaffolds: Sequence[str | None]) -> list[tuple[str, ...]]:
    return [() if s is None else (s,) for s in scaffolds]


def wasserstein(ours: Floats, theirs: Floats, drawn: Floats) -> tuple[float, float]:
    """Return the Wasserstein-1 distance of two samples, and its bootstrap standard error.

    ours: float[n]; theirs: float[m]; drawn: float64[repeats, n], see `resamples`.
    W1 is the area between the two distribution functions.
    """
    values = np.concatenate([ours, theirs])
    order = np.argsort(values, kind="stable")
    gaps = np.diff(values[order])
    n, m = len(ours), len(theirs)
    theirs_below = np.cumsum(np.concatenate([np.zeros(n), np.full(m, 1 / m)])[order])[:-1]

    def area(weights: Floats) -> float:
        below = np.cumsum(np.concatenate([weights / n, np.zeros(m)])[order])[:-1]
        return float((np.abs(below - theirs_below) * gaps).sum())

    return area(np.ones(n)), _spread([area(weights) for weights in drawn])


def cosine_of_counts(
    ours: Sequence[Sequence[Hashable]], theirs: Sequence[Sequence[Hashable]], drawn: Floats
) -> tuple[float, float]:
    """Return the cosine of how often each thing occurs, and its bootstrap standard error; nan if a side has nothing.

    ours, theirs: the things of each molecule. drawn: float64[repeats, molecules of ours].
    """
    place: dict[Hashable, int] = {}
    for things in (*ours, *theirs):
        for thing in things:
            place.setdefault(thing, len(place))
    molecule = np.repeat(np.arange(len(ours)), [len(things) for things in ours])
    kind = np.fromiter((place[thing] for things in ours for thing in things), np.int64)
    there = np.bincount(
        np.fromiter((place[thing] for things in theirs for thing in things), np.int64), minlength=len(place)
    )

    def cosine(weights: Floats) -> float:
        here = np.bincount(kind, weights=weights[molecule], minlength=len(place))
        length = np.linalg.norm(here) * np.linalg.norm(there)
        return float(here @ there / length) if length > 0 else math.nan

    return cosine(np.ones(len(ours))), _spread([cosine(weights) for weights in drawn])


def nearest_similarity(ours: NDArray[np.uint8], theirs: NDArray[np.uint8]) -> Floats:
    """Return the Tanimoto similarity of each fingerprint to the nearest of the others: float64[n].

    ours: uint8[n, bits / 8], theirs: uint8[m, bits / 8], packed.
    """
    b = _unpacked(theirs)
    b_size = b.sum(1)
    best = []
    for first in range(0, len(ours), _ROWS):
        a = _unpacked(ours[first : first + _ROWS])
        common = a @ b.T
        either = a.sum(1)[:, None] + b_size - common
        best.append((common / either.clamp_min(1)).amax(1))
    return torch.cat(best).double().numpy()


def _unpacked(bits: NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(np.unpackbits(bits, axis=1, count=BITS)).float()


def frechet(ours: Floats, theirs: Floats, drawn: Floats) -> tuple[float, float]:
    """Return |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^1/2), and its bootstrap standard error.

    ours: float[n, d]; theirs: float[m, d]. The trace of the root is that of the symmetric root of C2^1/2 C1 C2^1/2,
    which has the same eigenvalues and never leaves the real numbers.
    """
    centre = theirs.mean(0, dtype=np.float64)
    x = torch.from_numpy(np.ascontiguousarray(ours, np.float64) - centre)
    y = torch.from_numpy(np.ascontiguousarray(theirs, np.float64) - centre)
    cov_y = y.T @ y / (len(y) - 1)
    values, vectors = torch.linalg.eigh(cov_y)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    trace_y = cov_y.trace()

    def distance(weights: torch.Tensor) -> float:
        mean = weights @ x / len(x)
        cov = ((x.T * weights) @ x - len(x) * torch.outer(mean, mean)) / (len(x) - 1)
        eigenvalues = torch.linalg.eigvalsh(root @ cov @ root).clamp_min(0)
        return float(mean @ mean + cov.trace() + trace_y - 2 * eigenvalues.sqrt().sum())

    return distance(torch.ones(len(x), dtype=x.dtype)), _spread(
        [distance(torch.from_numpy(w)) for w in drawn]
    )


def _spread(values: Sequence[float]) -> float:
    """The standard deviation of the values that are numbers."""
    numbers = [v for v in values if not math.isnan(v)]
    return float(np.std(numbers, ddof=1)) if len(numbers) > 1 else 0.0


def mean_with_interval(values: Floats, seed: int = 0, repeats: int = 1000) -> tuple[float, float, float]:
    """Return mean and 95 % bootstrap percentiles of independent values: float[n]."""
    v = np.asarray(values, np.float64)
    if len(v) < 2:
        return float(v.mean()) if len(v) else math.nan, math.nan, math.nan
    means = resamples(len(v), repeats, seed) @ v / len(v)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(v.mean()), float(low), float(high)
