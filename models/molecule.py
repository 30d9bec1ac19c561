"""The row that is kept of a generated molecule, and the summary of many rows that a commit record carries.

Guarantees: one schema for every shard, rows in id order, null where a value is missing (an invalid graph has
no properties); a molecule that RDKit fails on becomes an invalid row and costs nothing else. Summaries hold
integers, SMILES and scores only, and merge to the same result in any grouping.
Knows nothing of: how graphs were drawn, files, campaigns.
"""

import heapq
import importlib.util
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
from rdkit import Chem, RDConfig, rdBase
from rdkit.Chem import QED, Crippen, Descriptors, rdMolDescriptors

from bitdgdm.models.alerts import structural_alerts
from bitdgdm.models.decode import RDKIT_ERRORS, Decoded, decode
from bitdgdm.models.digress_config import DigressConfig
from bitdgdm.models.novelty import ReferenceSet
from bitdgdm.models.sampler import Graphs

MOLECULE_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.int64(), nullable=False),
        pa.field("smiles", pa.string()),
        pa.field("inchikey", pa.string()),
        pa.field("n_heavy_atoms", pa.int16()),
        pa.field("mw", pa.float32()),
        pa.field("logp", pa.float32()),
        pa.field("tpsa", pa.float32()),
        pa.field("qed", pa.float32()),
        pa.field("sa_score", pa.float32()),
        pa.field("hbd", pa.int16()),
        pa.field("hba", pa.int16()),
        pa.field("n_rotatable_bonds", pa.int16()),
        pa.field("n_rings", pa.int16()),
        pa.field("n_nodes", pa.int16(), nullable=False),
        pa.field("n_fragments", pa.int16(), nullable=False),
        pa.field("is_valid", pa.bool_(), nullable=False),
        pa.field("is_valid_relaxed", pa.bool_(), nullable=False),
        pa.field("is_novel", pa.bool_()),
        pa.field("alerts", pa.list_(pa.string())),
        pa.field("score", pa.float32()),
    ]
)
"""n_nodes and n_fragments are of the whole graph; all else is of the largest fragment of a valid one."""


@cache
def _sascorer() -> ModuleType:
    """RDKit's contributed SA score, which is shipped as a file and not as a module."""
    path = Path(RDConfig.RDContribDir) / "SA_Score" / "sascorer.py"
    spec = importlib.util.spec_from_file_location("rdkit_contrib_sascorer", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


_PROPERTIES: Mapping[str, Callable[[Chem.Mol], float]] = {
    "n_heavy_atoms": Chem.Mol.GetNumHeavyAtoms,
    "mw": Descriptors.MolWt,
    "logp": Crippen.MolLogP,
    "tpsa": rdMolDescriptors.CalcTPSA,
    "qed": QED.qed,
    "sa_score": lambda molecule: _sascorer().calculateScore(molecule),
    "hbd": rdMolDescriptors.CalcNumHBD,
    "hba": rdMolDescriptors.CalcNumHBA,
    "n_rotatable_bonds": rdMolDescriptors.CalcNumRotatableBonds,
    "n_rings": rdMolDescriptors.CalcNumRings,
}
NUMERIC_COLUMNS = tuple(_PROPERTIES)
"""What a score can be; see `score_graphs`."""
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


def properties(molecule: Chem.Mol) -> dict[str, float]:
    """Return every numeric property of a sanitised molecule, by column name."""
    return {name: compute(molecule) for name, compute in _PROPERTIES.items()}


def score_graphs(
    graphs: Graphs,
    first_id: int,
    config: DigressConfig,
    reference: ReferenceSet | None = None,
    score_by: str = "qed",
    alerts: bool = True,
) -> pa.Table:
    """Return one row of MOLECULE_SCHEMA a graph; graph k has id first_id + k.

    reference: molecules that count as known; without it is_novel is null. score_by: one of NUMERIC_COLUMNS;
    the score is that column, negated where lower is better, so that a higher score is always better.
    alerts: whether to look for structural alerts, more than half of the time that a molecule takes.
    Raises: ValueError for another score_by.
    """
    if score_by not in NUMERIC_COLUMNS:
        raise ValueError(f"score_by is {score_by!r}, not one of {', '.join(NUMERIC_COLUMNS)}")
    counts, nodes, edges = graphs.n.tolist(), graphs.X.tolist(), graphs.E.tolist()
    with rdBase.BlockLogs():
        rows = [
            _row(first_id + k, decode(nodes[k][:n], edges[k], config), n, score_by, alerts)
            for k, n in enumerate(counts)
        ]
    if reference is not None:
        known = iter(reference.contains([row["smiles"] for row in rows if row["is_valid"]]))
        for row in rows:
            row["is_novel"] = not next(known) if row["is_valid"] else None
    return pa.Table.from_pylist(rows, schema=MOLECULE_SCHEMA)


def _row(sample_id: int, decoded: Decoded, n: int, score_by: str, alerts: bool) -> dict[str, Any]:
    row: dict[str, Any] = {
        "sample_id": sample_id,
        "n_nodes": n,
        "n_fragments": decoded.fragments,
        "is_valid": False,
        "is_valid_relaxed": decoded.valid_relaxed,
    }
    if decoded.molecule is None:
        return row
    try:
        values: dict[str, Any] = {name: f(decoded.molecule) for name, f in _PROPERTIES.items()}
        values["inchikey"] = Chem.MolToInchiKey(decoded.molecule) or None
        values["alerts"] = structural_alerts(decoded.molecule) if alerts else None
    except RDKIT_ERRORS:
        return row
    sign = -1 if score_by in LOWER_IS_BETTER else 1
    return {**row, **values, "smiles": decoded.smiles, "is_valid": True, "score": sign * values[score_by]}


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
