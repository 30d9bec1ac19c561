"""The summary of many molecules that a commit record carries, and how summaries merge.

Guarantees: summaries hold integers, SMILES and scores only, and merge to the same result in any grouping; needs
neither PyTorch nor RDKit, so that status and report answer at once.
Knows nothing of: how a property is computed, files, campaigns.
"""

import heapq
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

NUMERIC_COLUMNS = (
    "n_heavy_atoms", "mw", "logp", "tpsa", "qed", "sa_score", "hbd", "hba", "n_rotatable_bonds", "n_rings",
)  # fmt: skip
"""The properties of a molecule; what a score can be."""
LOWER_IS_BETTER = frozenset({"sa_score"})

BINS: Mapping[str, tuple[float, float, int]] = {
    "n_heavy_atoms": (0, 100, 100),
    "mw": (0, 1000, 200),
    "logp": (-8, 12, 80),
    "tpsa": (0, 300, 60),
    "qed": (0, 1, 50),
    "sa_score": (1, 10, 45),
    "hbd": (0, 20, 20),
    "hba": (0, 30, 30),
    "n_rotatable_bonds": (0, 30, 30),
    "n_rings": (0, 20, 20),
}
"""Histogram of each property: low, high, equal bins [a, b). The end bins also hold everything beyond."""

_SUM_UNIT = 1_000_000  # sums are kept in millionths: integers add up to the same in any order


def unit_stats(table: pa.Table, top: int = 100) -> dict[str, Any]:
    """Return the summary of rows of MOLECULE_SCHEMA, in JSON values; merge summaries with `fold_stats`.

    counts: n, valid, valid_relaxed, connected (valid, of one fragment), compared (with a reference set),
    novel, alerted (valid, with an alert). n_nodes: graphs of each size. histograms: see BINS; sums in
    millionths; both of valid molecules. top: the best distinct molecules [score, sample_id, smiles], best
    first, and how many are kept.
    """
    valid = table.filter(table["is_valid"])
    novel = valid["is_novel"].drop_null().to_pylist()
    counts = {
        "n": table.num_rows,
        "valid": valid.num_rows,
        "valid_relaxed": sum(table["is_valid_relaxed"].to_pylist()),
        "connected": valid["n_fragments"].to_pylist().count(1),
        "compared": len(novel),
        "novel": sum(novel),
        "alerted": sum(bool(a) for a in valid["alerts"].to_pylist()),
    }
    values = {name: valid[name].to_numpy().astype(np.float64) for name in NUMERIC_COLUMNS}
    best = zip(*(valid[name].to_pylist() for name in ("score", "sample_id", "smiles")), strict=True)
    return {
        "counts": counts,
        "n_nodes": np.bincount(table["n_nodes"].to_numpy()).tolist(),
        "histograms": {name: _histogram(name, values[name]) for name in NUMERIC_COLUMNS},
        "sums": {name: int(np.rint(values[name] * _SUM_UNIT).sum()) for name in NUMERIC_COLUMNS},
        "top": {"k": top, "rows": _best(map(list, best), top)},
    }


def _histogram(name: str, values: np.ndarray) -> list[int]:
    low, high, bins = BINS[name]
    index = np.floor((values - low) / (high - low) * bins).astype(np.int64).clip(0, bins - 1)
    return np.bincount(index, minlength=bins).tolist()


def _best(rows: Any, k: int) -> list[list[Any]]:
    """The k best rows [score, sample_id, smiles] of distinct SMILES; the lowest id stands for a molecule."""
    first: dict[str, list[Any]] = {}
    for row in rows:
        if row[2] not in first or row[1] < first[row[2]][1]:
            first[row[2]] = row
    return heapq.nsmallest(k, first.values(), key=lambda row: (-row[0], row[1]))


def fold_stats(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """Return the summary of both parts together; associative and commutative, for parts without a common id.

    Raises: ValueError if the two keep a different number of best molecules.
    """
    if a["top"]["k"] != b["top"]["k"]:
        raise ValueError(f"one summary keeps {a['top']['k']} best molecules, the other {b['top']['k']}")
    sizes = [a["n_nodes"], b["n_nodes"]]
    longest = max(map(len, sizes))
    return {
        "counts": {name: a["counts"][name] + b["counts"][name] for name in a["counts"]},
        "n_nodes": [sum(s[i] for s in sizes if i < len(s)) for i in range(longest)],
        "histograms": {
            name: [x + y for x, y in zip(bins, b["histograms"][name], strict=True)]
            for name, bins in a["histograms"].items()
        },
        "sums": {name: a["sums"][name] + b["sums"][name] for name in a["sums"]},
        "top": {"k": a["top"]["k"], "rows": _best([*a["top"]["rows"], *b["top"]["rows"]], a["top"]["k"])},
    }


def mean(stats: Mapping[str, Any], name: str) -> float | None:
    """Return the mean of a property over the valid molecules of a summary; None if there are none."""
    n = stats["counts"]["valid"]
    return stats["sums"][name] / _SUM_UNIT / n if n else None
