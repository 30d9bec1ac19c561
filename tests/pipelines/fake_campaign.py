"""A campaign on storage as workers would have left it, without running any.

Guarantees: shards, statistics and commit records are made by the code that workers use; molecules are drawn from a
list with a fixed seed, so equal arguments give equal data.
Knows nothing of: diffusion models.
"""

import random
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pyarrow as pa
from rdkit import Chem, RDLogger
from rdkit.Chem import QED, Crippen, Descriptors, Lipinski, rdMolDescriptors

from bitdgdm.infra.commit import (
    CommitRecord,
    Quarantine,
    commit_unit,
    finish_campaign,
    new_attempt,
    quarantine_unit,
)
from bitdgdm.infra.fingerprint import canonical_json, fingerprint
from bitdgdm.infra.storage import Store, open_store
from bitdgdm.models.alerts import structural_alerts
from bitdgdm.models.molecule import MOLECULE_SCHEMA
from bitdgdm.models.summary import LOWER_IS_BETTER, unit_stats
from bitdgdm.pipelines.campaign import Campaign
from bitdgdm.pipelines.spec import CampaignSpec
from bitdgdm.tasks.score_unit import to_parquet

RDLogger.DisableLog("rdApp.*")
SMILES = (
    "CCO", "CC(C)=O", "C1CC1O", "CC#N", "c1ccoc1", "NC(=O)C1CC1", "O=CC1CO1", "CC1CN1C=O", "c1c[nH]cn1", "OCC1CCO1",
    "CN1C=CC(=O)N1", "CC(=O)OC", "FC1CC1", "N#CC1CCC1", "O=C1CCCN1", "CCN(C)C", "C#CCO", "CC1=NOC=C1", "OC1CC2CC12",
    "Cc1cnno1", "CC(O)C(C)=O", "O=C1C=CCO1", "NC1=NCCO1", "CCC1OC1C", "C1COC1", "CC1(C)CC1=O",
)  # fmt: skip
MODEL = {
    "uri": "models:/digress-qm9/3", "digest": "9f3c" * 16, "kind": "artifact", "recipe": "bitdgdm-w4a4-r16-s1",
    "source": {"uri": "builtin:digress-qm9", "name": "digress-qm9", "digest": "77ab" * 16},
}  # fmt: skip


def make_campaign(
    url: str, *, units: int = 5, size: int = 120, name: str = "digress-qm9-3fa1b2c4", score: str = "qed",
    smiles: Sequence[str] = SMILES, missing: Sequence[int] = (), quarantined: Sequence[int] = (),
    error: str = "CUDA error: out of memory", hardware: str = "H200", spec: dict[str, Any] | None = None,
    novelty: bool = True, invalid: float = 0.05,
) -> Store:  # fmt: skip
    """Leave a campaign of `units` units at `url`; finished unless some are missing."""
    store, draw = open_store(url), random.Random(11)
    values = {
        "model": MODEL["uri"], "out": store.url, "count": units * size, "seed": 7, "steps": 500, "unit_size": size,
        "micro_batch": 64, "device": "cpu", "score": score, "novelty": "builtin:qm9" if novelty else None,
    }  # fmt: skip
    identity = {"bitdgdm": "0.1.0", "pyarrow": "25.0.1", "rdkit": "2026.9.1", "torch": "2.13.0"}
    campaign = Campaign(
        schema_version=1, campaign=name, fingerprint=fingerprint({**identity, "name": name}), model=MODEL,
        spec=CampaignSpec(**{**values, **(spec or {})}), identity=identity, code_version="0.1.0",
        provenance={"user": "maria", "host": "login-2", "argv": ["bitdgdm", "generate"], "time": "2026-11-23T01:02:03+00:00"},
    )  # fmt: skip
    store.write("campaign.json", canonical_json(campaign.model_dump(mode="json")).encode())
    for unit in range(units):
        rows = [_row(unit * size + k, draw, smiles, score, invalid, novelty) for k in range(size)]
        if unit not in missing:
            table = pa.Table.from_pylist(rows, schema=MOLECULE_SCHEMA)
            footer = {"unit": unit, "seed": 7, "model": MODEL, "hardware": hardware}
            shard = to_parquet(table, footer)
            record = CommitRecord.describe(
                shard, unit=unit, attempt=new_attempt(), rows=size, first_id=unit * size, recipe="bitdgdm-w4a4-r16-s1",
                fingerprint=campaign.fingerprint, artifact_digest=MODEL["digest"], code_version="0.1.0", host="gpu-1",
                hardware=hardware, seconds=2.0 + unit, stats=unit_stats(table),
            )  # fmt: skip
            commit_unit(store, record, shard)
    for unit in quarantined:
        quarantine_unit(
            store, Quarantine(unit=unit, attempts=3, error=error, error_type="RuntimeError", host="gpu-2")
        )
    if not missing:
        finish_campaign(store, units)
    return store


_PROPERTIES: dict[str, Callable[[Chem.Mol], float]] = {
    "n_heavy_atoms": Chem.Mol.GetNumHeavyAtoms, "mw": Descriptors.MolWt, "logp": Crippen.MolLogP, "qed": QED.qed,
    "tpsa": rdMolDescriptors.CalcTPSA, "sa_score": lambda m: 1.0 + m.GetNumAtoms() / 3, "hbd": Lipinski.NumHDonors,
    "hba": Lipinski.NumHAcceptors, "n_rings": rdMolDescriptors.CalcNumRings,
    "n_rotatable_bonds": rdMolDescriptors.CalcNumRotatableBonds,
}  # fmt: skip


@cache
def _properties(smiles: str) -> dict[str, Any] | None:
    molecule = Chem.MolFromSmiles(smiles)
    if molecule is None:
        return None
    values = {name: compute(molecule) for name, compute in _PROPERTIES.items()}
    return {**values, "inchikey": Chem.MolToInchiKey(molecule), "alerts": structural_alerts(molecule)}


def _row(
    sample_id: int, draw: random.Random, smiles: Sequence[str], score: str, invalid: float, novelty: bool
) -> dict[str, Any]:
    chosen, luck = draw.choice(smiles), draw.random()
    row = {"sample_id": sample_id, "n_nodes": 9, "n_fragments": 1 + (luck > 0.9)}
    values = _properties(chosen)
    if luck < invalid or values is None:
        return {**row, "is_valid": False, "is_valid_relaxed": luck < invalid / 2}
    novel = len(chosen) % 3 == 0 if novelty else None
    rank = -values[score] if score in LOWER_IS_BETTER else values[score]
    flags = {"is_valid": True, "is_valid_relaxed": True, "is_novel": novel, "score": rank}
    return {**row, **values, "smiles": chosen, **flags}
