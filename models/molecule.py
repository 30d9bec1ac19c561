"""The row that is kept of a generated molecule.

Guarantees: one schema for every shard, rows in id order, null where a value is missing (an invalid graph has
no properties); a molecule that RDKit fails on becomes an invalid row and costs nothing else. Summaries hold
integers, SMILES and scores only, and merge to the same result in any grouping.
Knows nothing of: how graphs were drawn, files, campaigns.
"""

import importlib.util
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
from rdkit import Chem, RDConfig, rdBase
from rdkit.Chem import QED, Crippen, Descriptors, rdMolDescriptors

from bitdgdm.models.alerts import qed_alerts, structural_alerts
from bitdgdm.models.decode import RDKIT_ERRORS, Decoded, decode
from bitdgdm.models.digress_config import DigressConfig
from bitdgdm.models.novelty import ReferenceSet
from bitdgdm.models.sampler import Graphs
from bitdgdm.models.summary import LOWER_IS_BETTER, NUMERIC_COLUMNS

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


def _qed(molecule: Chem.Mol) -> float:
    """QED.qed to the last bit, without searching for alerts that the molecule has no atoms for."""
    atoms = list(molecule.GetAtoms())
    if any(atom.GetAtomicNum() == 1 for atom in atoms):
        return QED.qed(molecule)  # it takes hydrogens away first
    rings = 0  # those left when aliphatic ones are deleted
    if any(atom.GetIsAromatic() for atom in atoms):
        rings = len(Chem.GetSSSR(Chem.DeleteSubstructs(Chem.Mol(molecule), QED.AliphaticRings)))
    strict = rdMolDescriptors.NumRotatableBondsOptions.Strict
    return QED.qed(
        molecule,
        qedProperties=QED.QEDproperties(
            MW=Descriptors.MolWt(molecule),
            ALOGP=Crippen.MolLogP(molecule),
            HBA=sum(len(molecule.GetSubstructMatches(pattern)) for pattern in QED.Acceptors),
            HBD=rdMolDescriptors.CalcNumHBD(molecule),
            PSA=rdMolDescriptors.CalcTPSA(molecule),
            ROTB=rdMolDescriptors.CalcNumRotatableBonds(molecule, strict),
            AROM=rings,
            ALERTS=qed_alerts(molecule),
        ),
    )


_PROPERTIES: Mapping[str, Callable[[Chem.Mol], float]] = {
    "n_heavy_atoms": Chem.Mol.GetNumHeavyAtoms,
    "mw": Descriptors.MolWt,
    "logp": Crippen.MolLogP,
    "tpsa": rdMolDescriptors.CalcTPSA,
    "qed": _qed,
    "sa_score": lambda molecule: _sascorer().calculateScore(molecule),
    "hbd": rdMolDescriptors.CalcNumHBD,
    "hba": rdMolDescriptors.CalcNumHBA,
    "n_rotatable_bonds": rdMolDescriptors.CalcNumRotatableBonds,
    "n_rings": rdMolDescriptors.CalcNumRings,
}
assert tuple(_PROPERTIES) == NUMERIC_COLUMNS


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
