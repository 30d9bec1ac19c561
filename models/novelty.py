"""Sets of known molecules: is a generated one new?

Guarantees: membership is equality of canonical SMILES without stereo, by a 64-bit hash that is the same on
every machine; two million molecules take 16 MB. (A new molecule is taken for known by accident with
probability 2e6 / 2^64, that is 1e-13.)
Knows nothing of: where molecules come from, how they are scored.
"""

import csv
import gzip
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from rdkit import Chem, rdBase

from bitdgdm.infra.errors import BadInput

BUILTIN = "builtin:qm9"
_BUILTIN_FILE = Path(__file__).parent / "data" / "qm9.parquet"
_PROBES = 256


@dataclass(frozen=True)
class ReferenceSet:
    """Known molecules. hashes: sorted uint64, distinct. skipped: lines that hold no molecule."""

    name: str
    hashes: NDArray[np.uint64]
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.hashes)

    def contains(self, smiles: Sequence[str]) -> list[bool]:
        """Return for each canonical SMILES whether it is known."""
        wanted = _hash_all(smiles)
        if not len(self.hashes):
            return [False] * len(wanted)
        place = np.searchsorted(self.hashes, wanted).clip(max=len(self.hashes) - 1)
        return (self.hashes[place] == wanted).tolist()

    @cached_property
    def digest(self) -> str:
        """Return the sha256 of the set, whatever its order or name."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def to_bytes(self) -> bytes:
        """Return the hashes, little-endian; equal sets give equal bytes."""
        return self.hashes.astype("<u8").tobytes()

    @classmethod
    def from_bytes(cls, name: str, data: bytes) -> "ReferenceSet":
        """Return the set that `to_bytes` wrote. Raises: BadInput if the bytes are none."""
        hashes = np.frombuffer(data[: len(data) // 8 * 8], dtype="<u8").astype(np.uint64)
        if len(data) % 8 or (hashes[1:] <= hashes[:-1]).any():
            raise BadInput(f"the stored reference set {name} is damaged. Start a campaign with another --out")
        return cls(name, hashes)


def load_reference(source: str | Path) -> ReferenceSet:
    """Return the set in `source`: "builtin:qm9", or a path.

    Files: .parquet with a column smiles; .smi and .txt, one molecule a line, what follows a blank is ignored;
    .csv with a column smiles or SMILES; each of the text kinds also with .gz.
    Molecules are brought to canonical form, 10,000 a second, unless a probe of 256 spread over the file is in
    that form already (the shipped set is, under an RDKit that writes what the one that made it wrote).
    Raises: BadInput for a file that isn't there or that holds no molecules.
    """
    path = _BUILTIN_FILE if source == BUILTIN else Path(source)
    if not path.is_file():
        raise BadInput(f"no reference set at {source}. Give {BUILTIN} or a .parquet, .smi, .txt or .csv file")
    smiles = list(_read(path))
    with rdBase.BlockLogs():
        canonical = smiles if _is_canonical(smiles) else [c for c in map(_canonical, smiles) if c is not None]
    if not canonical:
        raise BadInput(f"{source} holds no molecules. Give one SMILES a line or a column named smiles")
    return ReferenceSet(str(source), np.unique(_hash_all(canonical)), len(smiles) - len(canonical))


def _canonical(smiles: str) -> str | None:
    molecule = Chem.MolFromSmiles(smiles)
    return None if molecule is None else Chem.MolToSmiles(molecule, isomericSmiles=False)


def _is_canonical(smiles: Sequence[str]) -> bool:
    probes = smiles[:: max(1, len(smiles) // _PROBES)]
    return all(_canonical(s) == s for s in probes)


def _hash_all(smiles: Iterable[str]) -> NDArray[np.uint64]:
    digests = b"".join(hashlib.blake2b(s.encode(), digest_size=8).digest() for s in smiles)
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)


def _read(path: Path) -> Iterator[str]:
    kind = "".join(path.suffixes[-2:] if path.suffix == ".gz" else path.suffixes[-1:]).lower()
    if kind == ".parquet":
        schema = pq.read_schema(path)
        name = _smiles_column(schema.names, path)
        yield from (s for s in pq.read_table(path, columns=[name])[name].to_pylist() if s)
        return
    if kind.removesuffix(".gz") not in (".smi", ".txt", ".csv"):
        raise BadInput(f"{path} has an unknown ending. Give .parquet, .smi, .txt or .csv (texts also as .gz)")
    with gzip.open(path, "rt") if kind.endswith(".gz") else path.open() as lines:
        if kind.startswith(".csv"):
            table = csv.DictReader(lines)
            name = _smiles_column(table.fieldnames or (), path)
            yield from (row[name] for row in table if row[name])
        else:
            yield from (line.split()[0] for line in lines if line.strip())


def _smiles_column(names: Iterable[str], path: Path) -> str:
    found = [name for name in names if name.lower() == "smiles"]
    if not found:
        raise BadInput(
            f"{path} has no column smiles (it has: {', '.join(names) or 'none'}). Rename its column"
        )
    return found[0]
