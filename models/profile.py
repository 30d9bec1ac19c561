"""What the distances between two sets of molecules need to know of each molecule.

Guarantees: a row depends on its SMILES only (and on the versions of RDKit and of the network of `fcd`), so equal SMILES
are computed once and splitting over processes changes nothing; a stored profile is plain Parquet, and one of other
molecules or versions is never taken for it.
Knows nothing of: which set is generated and which is the reference, distances (distribution.py).

Source: Polykovskiy et al., MOSES, Frontiers in Pharmacology 11, 2020 (BRICS fragments, Bemis-Murcko scaffolds with two
rings or more, Morgan fingerprints of radius 2 and 1024 bits); Preuer et al., Fréchet ChemNet Distance, JCIM 58, 2018.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from rdkit import Chem, rdBase
from rdkit.Chem import rdFingerprintGenerator
from rdkit.Chem.Scaffolds import MurckoScaffold

from bitdgdm.models.decode import RDKIT_ERRORS
from bitdgdm.models.molecule import properties

PROPERTIES = ("logp", "qed", "sa_score", "mw", "tpsa", "n_rings")
BITS, RADIUS = 1024, 2
FEATURES = 512  # of ChemNet's last hidden layer
MIN_RINGS = 2  # a scaffold of fewer rings counts as none
_CHUNK, _BATCH = 256, 128
_METADATA = b"bitdgdm"

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Profile:
    """n molecules, repeats included; row i of every field is molecule i.

    properties: float64[n, 6], columns as PROPERTIES. scaffolds: SMILES or None. fragments: SMILES of each molecule's
    BRICS fragments, with repeats. bits: uint8[n, 128], packed fingerprints. features: float32[n, 512], or None where
    the package fcd isn't installed.
    """

    smiles: tuple[str, ...]
    properties: Floats
    scaffolds: tuple[str | None, ...]
    fragments: tuple[tuple[str, ...], ...]
    bits: NDArray[np.uint8]
    features: NDArray[np.float32] | None

    def __len__(self) -> int:
        return len(self.smiles)

    def take(self, rows: NDArray[np.int64]) -> "Profile":
        """Return some molecules, perhaps repeatedly."""
        at = rows.tolist()
        return Profile(
            tuple(self.smiles[i] for i in at), self.properties[rows], tuple(self.scaffolds[i] for i in at),
            tuple(self.fragments[i] for i in at), self.bits[rows], None if self.features is None else self.features[rows],
        )  # fmt: skip


def fcd_version() -> str | None:
    """Return the version of the package fcd, None if it isn't installed."""
    try:
        return version("fcd")
    except PackageNotFoundError:
        return None


def profile(
    smiles: Sequence[str],
    *,
    features: bool = True,
    device: str = "cpu",
    pool: Executor | None = None,
    on_progress: Callable[[float], object] | None = None,
) -> Profile:
    """Return the profile of valid molecules, in their order.

    features: also ChemNet's, where fcd is installed. device: where ChemNet runs. pool: processes that do the rest.
    on_progress is told the fraction that is done. Raises: ValueError for a SMILES that RDKit can't read.
    """
    told = on_progress or (lambda fraction: None)
    distinct = list(dict.fromkeys(smiles))
    wanted = features and fcd_version() is not None
    share = 0.5 if wanted else 1.0
    rows = _chemistry(distinct, pool, lambda done: told(share * done))
    found = (
        chemnet_features(distinct, device, lambda done: told(1 - share + share * done)) if wanted else None
    )
    whole = Profile(
        tuple(distinct),
        np.array([row[0] for row in rows], np.float64).reshape(-1, len(PROPERTIES)),
        tuple(row[1] for row in rows),
        tuple(row[2] for row in rows),
        np.array([row[3] for row in rows], np.uint8).reshape(-1, BITS // 8),
        found,
    )
    place = {s: i for i, s in enumerate(distinct)}
    return whole.take(np.array([place[s] for s in smiles], np.int64))


_Row = tuple[list[float], str | None, tuple[str, ...], NDArray[np.uint8]]


def _chemistry(smiles: Sequence[str], pool: Executor | None, told: Callable[[float], object]) -> list[_Row]:
    chunks = [smiles[i : i + _CHUNK] for i in range(0, len(smiles), _CHUNK)]
    rows: list[_Row] = []
    for part in pool.map(_rows, chunks) if pool else map(_rows, chunks):
        rows += part
        told(len(rows) / len(smiles))
    return rows


def _rows(smiles: Sequence[str]) -> list[_Row]:
    generator = rdFingerprintGenerator.GetMorganGenerator(radius=RADIUS, fpSize=BITS)
    found = []
    with rdBase.BlockLogs():
        for s in smiles:
            molecule = Chem.MolFromSmiles(s)
            if molecule is None:
                raise ValueError(f"{s!r} is no molecule")
            values = properties(molecule)
            packed = np.packbits(generator.GetFingerprintAsNumPy(molecule))
            row = [float(values[name]) for name in PROPERTIES]
            found.append((row, scaffold_of(molecule), fragments_of(molecule), packed))
    return found


def scaffold_of(molecule: Chem.Mol) -> str | None:
    """Return the Bemis-Murcko scaffold; None if it has fewer than two rings."""
    try:
        scaffold = MurckoScaffold.GetScaffoldForMol(molecule)
    except RDKIT_ERRORS:
        return None
    return Chem.MolToSmiles(scaffold) if scaffold.GetRingInfo().NumRings() >= MIN_RINGS else None


def fragments_of(molecule: Chem.Mol) -> tuple[str, ...]:
    """Return the BRICS fragments."""
    return tuple(Chem.MolToSmiles(Chem.FragmentOnBRICSBonds(molecule)).split("."))


@cache
def _chemnet() -> torch.nn.Module:
    import fcd

    return fcd.load_ref_model().eval()


def chemnet_features(
    smiles: Sequence[str], device: str = "cpu", told: Callable[[float], object] = lambda fraction: None
) -> NDArray[np.float32]:
    """Return ChemNet's last hidden layer: float32[n, 512]. Needs the package fcd, which carries the network."""
    from fcd.utils import SmilesDataset

    if not smiles:
        return np.zeros((0, FEATURES), np.float32)
    network, encoded, parts = _chemnet().to(device), SmilesDataset(list(smiles)), []
    with torch.inference_mode():
        for first in range(0, len(smiles), _BATCH):
            last = min(first + _BATCH, len(smiles))
            batch = np.stack([encoded[i] for i in range(first, last)])
            x = torch.from_numpy(batch).transpose(1, 2).to(device, torch.float32)
            parts.append(network(x).cpu().numpy())
            told(last / len(smiles))
    return np.concatenate(parts)


def profile_key(smiles: Sequence[str]) -> str:
    """Return the sha256 of the molecules and of the versions that a profile depends on."""
    versions = json.dumps([rdBase.rdkitVersion, fcd_version(), BITS, RADIUS, MIN_RINGS, PROPERTIES])
    return hashlib.sha256("\n".join([versions, *smiles]).encode()).hexdigest()


def save_profile(path: Path, found: Profile) -> None:
    """Write one file, whole or not at all."""
    columns: dict[str, Any] = {
        "smiles": list(found.smiles), "properties": found.properties.tolist(), "scaffold": list(found.scaffolds),
        "fragments": [list(f) for f in found.fragments], "bits": [row.tobytes() for row in found.bits],
    }  # fmt: skip
    if found.features is not None:
        columns["features"] = [row.astype("<f4").tobytes() for row in found.features]
    table = pa.table(columns).replace_schema_metadata({_METADATA: profile_key(found.smiles).encode()})
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    pq.write_table(table, part, compression="zstd")
    part.replace(path)


def load_profile(path: Path, smiles: Sequence[str]) -> Profile | None:
    """Return the stored profile of exactly these molecules under today's versions; None if the file isn't that."""
    try:
        table = pq.read_table(path)
    except (FileNotFoundError, pa.ArrowInvalid):
        return None
    if (table.schema.metadata or {}).get(_METADATA) != profile_key(smiles).encode() or table.num_rows != len(
        smiles
    ):
        return None

    def packed(name: str, kind: str) -> NDArray[Any]:
        return np.stack([np.frombuffer(b, kind) for b in table[name].to_pylist()])

    return Profile(
        tuple(table["smiles"].to_pylist()), np.array(table["properties"].to_pylist(), np.float64),
        tuple(table["scaffold"].to_pylist()), tuple(tuple(f) for f in table["fragments"].to_pylist()),
        packed("bits", "|u1"), packed("features", "<f4") if "features" in table.column_names else None,
    )  # fmt: skip
