"""From class indices to a molecule: the published validity rule and its relaxed form.

Guarantees: what counts as valid is what the published code counts: RDKit sanitises the graph as it is (its
own clean-up of groups like N(=O)=O included, no other repair), and the molecule is the largest fragment. A
graph that RDKit can't digest is invalid, never an exception.
Knows nothing of: tensors, properties, files.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from rdkit import Chem

from bitdgdm.models.digress_config import DigressConfig

RDKIT_ERRORS = (ValueError, RuntimeError)
"""What RDKit raises for a molecule: MolSanitizeException is a ValueError, a broken invariant RuntimeError."""

_BOND_TYPES = {
    "single": Chem.BondType.SINGLE,
    "double": Chem.BondType.DOUBLE,
    "triple": Chem.BondType.TRIPLE,
    "aromatic": Chem.BondType.AROMATIC,
}
_USUAL_VALENCE = {7: 3, 8: 2, 16: 2}  # atoms that may carry one bond more and a positive charge


@dataclass(frozen=True)
class Decoded:
    """What became of one graph. molecule and smiles: of the largest fragment, None if not valid.

    fragments: connected components of the graph, valid or not. relaxed_smiles: by the rule with partial
    charges.
    """

    molecule: Chem.Mol | None
    smiles: str | None
    fragments: int
    relaxed_smiles: str | None

    @property
    def valid(self) -> bool:
        return self.smiles is not None

    @property
    def valid_relaxed(self) -> bool:
        return self.relaxed_smiles is not None


def decode(atoms: Sequence[int], bonds: Sequence[Sequence[int]], config: DigressConfig) -> Decoded:
    """Return the molecule of one graph.

    atoms: n class indices. bonds: n rows of n class indices (0: no bond), the upper triangle is read.
    """
    graph = _build(atoms, bonds, config, charges=False)
    fragments = len(Chem.GetMolFrags(graph))
    molecule = largest_fragment(graph)
    smiles = None if molecule is None else to_smiles(molecule)
    if molecule is not None and not any(atom.GetFormalCharge() for atom in graph.GetAtoms()):
        # no part of a molecule exceeds a valence that the whole keeps: the relaxed rule would add no charge
        return Decoded(molecule, smiles, fragments, smiles)
    relaxed = largest_fragment(_build(atoms, bonds, config, charges=True))
    return Decoded(molecule, smiles, fragments, None if relaxed is None else to_smiles(relaxed))


def to_smiles(molecule: Chem.Mol) -> str:
    """Return RDKit's canonical SMILES without stereo: the graphs carry none."""
    return Chem.MolToSmiles(molecule, isomericSmiles=False)


def largest_fragment(graph: Chem.RWMol) -> Chem.Mol | None:
    """Return the sanitised fragment with most atoms (the first of equals); None if RDKit refuses the graph.

    graph: sanitised in place.
    """
    try:
        Chem.SanitizeMol(graph)
        return max(Chem.GetMolFrags(graph, asMols=True, sanitizeFrags=True), key=lambda m: m.GetNumAtoms())
    except RDKIT_ERRORS:
        return None


def _build(
    atoms: Sequence[int], bonds: Sequence[Sequence[int]], config: DigressConfig, *, charges: bool
) -> Chem.RWMol:
    graph = Chem.RWMol()
    for atom in atoms:
        graph.AddAtom(Chem.Atom(config.atoms[atom]))
    for i in range(len(atoms)):
        for j in range(i + 1, len(atoms)):
            if bonds[i][j]:
                graph.AddBond(i, j, _BOND_TYPES[config.bonds[bonds[i][j]]])
                if charges:
                    _charge_first_overfull_atom(graph)
    return graph


def _charge_first_overfull_atom(graph: Chem.RWMol) -> None:
    """Give N, O or S with one bond more than usual a charge of +1; called after every bond, as published.

    Only the first atom that RDKit objects to is looked at: a carbon with five bonds hides all behind it.
    """
    for problem in Chem.DetectChemistryProblems(graph, Chem.SANITIZE_PROPERTIES):
        if problem.GetType() != "AtomValenceException":
            continue
        atom = graph.GetAtomWithIdx(problem.GetAtomIdx())
        bonds = sum(bond.GetBondTypeAsDouble() for bond in atom.GetBonds())
        if bonds - _USUAL_VALENCE.get(atom.GetAtomicNum(), bonds) == 1:
            atom.SetFormalCharge(1)
        return
