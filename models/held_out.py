"""Known molecules as graphs of class indices: what a network is judged on, and not trained on.

Guarantees: the same molecules in the same order for the same (file, split, count, seed), on every machine; bonds are
kekulized where the network has no use for an aromatic class; a molecule that the network can't express (too large,
another element) is left out and never half encoded.
Knows nothing of: noise, networks' outputs, how good a molecule is. The inverse of `graph` is decode.py.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from rdkit import Chem, rdBase

from bitdgdm.infra.errors import BadInput
from bitdgdm.models.decode import RDKIT_ERRORS
from bitdgdm.models.digress_config import DigressConfig
from bitdgdm.models.sampler import Graphs

QM9 = "builtin:qm9"
_QM9_FILE = Path(__file__).parent / "data" / "qm9.parquet"


def held_out_smiles(source: str | Path = QM9, split: str = "test") -> list[str]:
    """Return the distinct SMILES of one split that are in no other one, in the file's order.

    (Without stereo, some molecules of QM9 are in two splits; a network has seen those.)

    source: "builtin:qm9" or a .parquet with the columns smiles and split.
    Raises: BadInput if the file, a column or the split isn't there.
    """
    path = _QM9_FILE if source == QM9 else Path(source)
    if not path.is_file():
        raise BadInput(
            f"no molecules at {source}. Give {QM9} or a .parquet with the columns smiles and split"
        )
    missing = {"smiles", "split"} - set(pq.read_schema(path).names)
    if missing:
        raise BadInput(f"{path} has no column {', '.join(sorted(missing))}. Add it, or give {QM9}")
    table = pq.read_table(path, columns=["smiles", "split"])
    rows = list(zip(table["smiles"].to_pylist(), table["split"].to_pylist(), strict=True))
    elsewhere = {smiles for smiles, of in rows if of != split}
    found = list(dict.fromkeys(smiles for smiles, of in rows if of == split and smiles not in elsewhere))
    if not found:
        raise BadInput(f"{path} has no molecules in split {split!r}. Name one of the splits that it has")
    return found


def held_out(config: DigressConfig, smiles: Sequence[str], molecules: int, seed: int = 0) -> Graphs:
    """Return `molecules` graphs drawn without repetition from smiles; fewer if there are no more.

    Raises: BadInput if the network can express none of them.
    """
    order = np.random.default_rng(seed).permutation(len(smiles))
    kept: list[tuple[list[int], list[list[int]]]] = []
    with rdBase.BlockLogs():
        for i in order:
            if len(kept) == molecules:
                break
            encoded = graph(smiles[i], config)
            if encoded is not None:
                kept.append(encoded)
    if not kept:
        raise BadInput(
            f"the network of {config.dataset} can express none of {len(smiles)} molecules. Give others"
        )
    return _padded(kept, config.n_pad)


def graph(smiles: str, config: DigressConfig) -> tuple[list[int], list[list[int]]] | None:
    """Return the atom classes [n] and bond classes [n][n] of a molecule; None if the network can't express it.

    Charges, stereo and hydrogens are dropped, as in the published data sets.
    """
    molecule = Chem.MolFromSmiles(smiles)
    if molecule is None or not 0 < molecule.GetNumAtoms() <= config.n_pad:
        return None
    if not _aromatic(config):
        try:
            Chem.Kekulize(molecule, clearAromaticFlags=True)
        except RDKIT_ERRORS:
            return None
    classes = {symbol: index for index, symbol in enumerate(config.atoms)}
    bond_classes = {name: index for index, name in enumerate(config.bonds)}
    n = molecule.GetNumAtoms()
    atoms = [classes.get(atom.GetSymbol(), -1) for atom in molecule.GetAtoms()]
    bonds = [[0] * n for _ in range(n)]
    for bond in molecule.GetBonds():
        i, j = bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()
        bonds[i][j] = bonds[j][i] = bond_classes.get(str(bond.GetBondType()).lower(), -1)
    if -1 in atoms or any(-1 in row for row in bonds):
        return None
    return atoms, bonds


def _aromatic(config: DigressConfig) -> bool:
    """Whether the network was trained on aromatic bonds."""
    return "aromatic" in config.bonds and config.edge_marginals[config.bonds.index("aromatic")] > 0


def _padded(graphs: Sequence[tuple[list[int], list[list[int]]]], n_pad: int) -> Graphs:
    n = torch.tensor([len(atoms) for atoms, _ in graphs])
    x = torch.zeros(len(graphs), n_pad, dtype=torch.int8)
    e = torch.zeros(len(graphs), n_pad, n_pad, dtype=torch.int8)
    for i, (atoms, bonds) in enumerate(graphs):
        x[i, : n[i]] = torch.tensor(atoms, dtype=torch.int8)
        e[i, : n[i], : n[i]] = torch.tensor(bonds, dtype=torch.int8)
    return Graphs(n, x, e)
