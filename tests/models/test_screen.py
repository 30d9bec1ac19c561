"""Run: .venv/bin/python -m pytest tests/models/test_screen.py -q"""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rdkit import Chem
from rdkit.Chem import QED
from rdkit.Chem.FilterCatalog import FilterCatalog, FilterCatalogParams

from bitdgdm.models.alerts import _SETS, structural_alerts
from bitdgdm.models.molecule import properties
from bitdgdm.models.novelty import _BUILTIN_FILE, _read
from bitdgdm.models.screen import Screen

# of many elements, charges, rings and groups; several with alerts of every set
STRANGE = """
O=C1C=CC(=O)C=C1 CC(=O)Cl CCN=[N+]=[N-] O=[N+]([O-])c1cc([N+](=O)[O-])cc([N+](=O)[O-])c1 C1COCCOCCOCCOCCO1 CCCCCCCCCCCC
c1ccc2c(c1)ccc1c2ccc2ccccc21 CC(C)(C)SSC(C)(C)C C[Si](C)(C)C OB(O)c1ccccc1 C[N+](C)(C)CC([O-])=O O=C(O)C(F)(F)F
ClC(Cl)(Cl)Cl BrCCBr IC=CI CP(=O)(OC)OC CS(=O)(=O)OC O=S(=O)(c1ccccc1)N1CCOCC1 O=C1NC(=S)SC1=Cc1ccccc1 [Na+].[Cl-]
N#CC(C#N)=C(C#N)C#N C=CC(=O)OC C#CC#C N=C=O S=C=Nc1ccccc1 O=CC=O NN OO C1CO1 C1CN1 c1cc[nH]c1 c1ccoc1 c1ccsc1 c1ccncc1
Nc1ccc(N=Nc2ccccc2)cc1 Oc1ccccc1O O=C1c2ccccc2C(=O)c2ccccc21 CN(C)c1ccc(cc1)C=C1SC(=O)NC1=O [2H]C([2H])[2H] [H][H] [He]
CC(C)=CCCC(C)=CCO F[P-](F)(F)(F)(F)F [O-][Cl+3]([O-])([O-])[O-] C[Hg]C [Fe] O=[Se]=O c1cc[se]c1 C1=CC=CC=CC=C1
"""


def plain_alerts(molecule: Chem.Mol) -> list[str]:
    names = FilterCatalogParams.FilterCatalogs.names
    catalogues = [(name, FilterCatalog(FilterCatalogParams(names[name]))) for name in _SETS]
    return [f"{name}:{e.GetDescription()}" for name, c in catalogues for e in c.GetMatches(molecule)]


def test_screened_alerts_and_qed_are_those_of_whole_searches() -> None:
    known = list(_read(_BUILTIN_FILE))
    molecules = [
        m for m in map(Chem.MolFromSmiles, [*STRANGE.split(), *known[:: len(known) // 60]]) if m is not None
    ]
    alerted = 0
    for molecule in molecules:
        wanted = plain_alerts(molecule)
        assert structural_alerts(molecule) == wanted, Chem.MolToSmiles(molecule)
        assert properties(molecule)["qed"] == QED.qed(Chem.Mol(molecule)), Chem.MolToSmiles(molecule)
        alerted += bool(wanted)
    assert alerted > 30 and len(molecules) > 100


PATTERNS = [
    "[#6]",
    "[!#6]",
    "[C,N]",
    "[c,n;!H0]",
    "[C&H2]~[O,S]",
    "[$(C=O),$(N=O)]",
    "[$(C=O)&!$(C-N)]",
    "C=C-C=O",
    "[!C;!c]",
    "a1aaaaa1",
    "[R]@[R]",
    "*~*",
    "[#7+]",
    "[CX4][F,Cl]",
    "C1CC1",
    "[O-]",
    "[H]",
    "[2H]",
    "C.C.C",
    "[*;!#6;!#1]=[#6]",
    "C(=O)(N)N",
    "[$([#6]),$([#7]~[#8])]",
    "[C,c]-,=[N,n]",
    "[C;R0;D2][C;R0;D2]",
    "[!c]!=[!N]",
    "[0*]",
]


@given(st.lists(st.sampled_from(STRANGE.split()), min_size=1, max_size=6))
def test_no_pattern_that_matches_is_ruled_out(names: list[str]) -> None:
    molecule = Chem.MolFromSmiles(".".join(names))
    patterns = [Chem.MolFromSmarts(p) for p in PATTERNS]
    possible = _screen(tuple(PATTERNS)).possible(molecule)
    assert possible == sorted(set(possible))
    assert {i for i, p in enumerate(patterns) if molecule.HasSubstructMatch(p)} <= set(possible)


@pytest.mark.parametrize(
    ("pattern", "smiles"),
    [
        ("[#16]", "CCO"),
        ("C#N", "CCN"),
        ("c1ccccc1", "C1CCCCC1"),
        ("O.O.O", "OCCO"),
        ("C-N-O", "CNCO"),
        ("[$(C=O),$(C=S)]", "CO"),
    ],
)
def test_a_pattern_without_its_atoms_bonds_or_rings_is_ruled_out(pattern: str, smiles: str) -> None:
    assert _screen((pattern,)).possible(Chem.MolFromSmiles(smiles)) == []


_SCREENS: dict[tuple[str, ...], Screen] = {}


def _screen(patterns: tuple[str, ...]) -> Screen:
    if patterns not in _SCREENS:
        _SCREENS[patterns] = Screen([Chem.MolFromSmarts(p) for p in patterns])
    return _SCREENS[patterns]
