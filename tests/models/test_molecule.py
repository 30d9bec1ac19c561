"""Run: .venv/bin/python -m pytest tests/models/test_molecule.py -q"""

import functools
import json
import random
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rdkit import Chem
from rdkit.Chem import QED

from bitdgdm.models import molecule, summary
from bitdgdm.models.alerts import structural_alerts
from bitdgdm.models.decode import decode
from bitdgdm.models.digress_config import QM9_NO_H, DigressConfig
from bitdgdm.models.molecule import MOLECULE_SCHEMA, score_graphs
from bitdgdm.models.novelty import load_reference
from bitdgdm.models.sampler import Graphs
from bitdgdm.models.summary import BINS, NUMERIC_COLUMNS, fold_stats, mean, unit_stats

ORDERS = {Chem.BondType.SINGLE: 1, Chem.BondType.DOUBLE: 2, Chem.BondType.TRIPLE: 3}
WITH_SULPHUR = replace(QM9_NO_H, atoms=("C", "N", "O", "S"))


def classes(
    smiles: str, shuffle: int | None = None, config: DigressConfig = QM9_NO_H
) -> tuple[list[int], list[list[int]]]:
    """Class indices of a molecule, kekulized, its atoms in any order."""
    mol = Chem.MolFromSmiles(smiles, sanitize=False)
    if mol.UpdatePropertyCache(strict=False) is None and any(a.GetIsAromatic() for a in mol.GetAtoms()):
        mol = Chem.MolFromSmiles(smiles)
        Chem.Kekulize(mol, clearAromaticFlags=True)
    place = list(range(mol.GetNumAtoms()))
    if shuffle is not None:
        random.Random(shuffle).shuffle(place)
    atoms, bonds = [0] * len(place), [[0] * len(place) for _ in place]
    for atom in mol.GetAtoms():
        atoms[place[atom.GetIdx()]] = config.atoms.index(atom.GetSymbol())
    for bond in mol.GetBonds():
        i, j = place[bond.GetBeginAtomIdx()], place[bond.GetEndAtomIdx()]
        bonds[i][j] = bonds[j][i] = ORDERS[bond.GetBondType()]
    return atoms, bonds


def graphs_of(*smiles: str) -> Graphs:
    B = len(smiles)
    n, X, E = torch.zeros(B, dtype=torch.int64), torch.zeros(B, 9), torch.zeros(B, 9, 9)
    for k, text in enumerate(smiles):
        atoms, bonds = classes(text)
        n[k] = len(atoms)
        X[k, : n[k]], E[k, : n[k], : n[k]] = torch.tensor(atoms), torch.tensor(bonds)
    return Graphs(n, X.to(torch.int8), E.to(torch.int8))


@pytest.mark.parametrize(
    "smiles", ["C", "CCO", "c1ccncc1", "C#CC(F)=O", "C1C2C3C4C5OC14C5N23", "O=c1[nH]cn[nH]1"]
)
def test_a_graph_becomes_the_canonical_smiles_whatever_the_order_of_its_atoms(smiles: str) -> None:
    canonical = Chem.CanonSmiles(smiles)
    for shuffle in range(5):
        decoded = decode(*classes(smiles, shuffle), QM9_NO_H)
        assert decoded.smiles == decoded.relaxed_smiles == canonical
        assert decoded.fragments == 1


@pytest.mark.parametrize("smiles", ["C(C)(C)(C)(C)C", "FCF(C)", "C#N#C", "O(C)(C)(C)(C)"])
def test_a_valence_that_no_charge_repairs_is_invalid_by_both_rules(smiles: str) -> None:
    decoded = decode(*classes(smiles), QM9_NO_H)
    assert (decoded.valid, decoded.valid_relaxed, decoded.molecule) == (False, False, None)


@pytest.mark.parametrize(
    ("smiles", "relaxed"), [("CN(C)(C)C", "C[N+](C)(C)C"), ("CO(C)C", "C[O+](C)C"), ("CN(=C)=C", None)]
)
def test_one_bond_too_many_on_nitrogen_or_oxygen_is_valid_by_the_relaxed_rule_only(
    smiles: str, relaxed: str | None
) -> None:
    decoded = decode(*classes(smiles), QM9_NO_H)
    assert decoded.smiles is None
    assert decoded.relaxed_smiles == relaxed


def test_a_nitro_group_is_cleaned_up_by_rdkit_and_valid() -> None:
    assert decode(*classes("CN(=O)=O"), QM9_NO_H).smiles == "C[N+](=O)[O-]"


def test_the_relaxed_rule_may_refuse_what_rdkit_cleans_up_because_it_charges_bond_by_bond() -> None:
    oxygen_first = [[0, 2, 0, 0, 0], [2, 0, 1, 1, 1], *([0, 1, 0, 0, 0] for _ in range(3))]
    decoded = decode([2, 1, 0, 0, 0], oxygen_first, QM9_NO_H)
    assert (decoded.smiles, decoded.relaxed_smiles) == ("C[N+](C)(C)[O-]", None)


def test_sulphur_keeps_the_valences_that_rdkit_gives_it() -> None:
    assert decode(*classes("CS(C)(=O)=O", config=WITH_SULPHUR), WITH_SULPHUR).smiles == "CS(C)(=O)=O"


def test_a_molecule_is_its_largest_fragment_and_the_graph_counts_them_all() -> None:
    decoded = decode(*classes("CCO.N.CC"), QM9_NO_H)
    assert (decoded.smiles, decoded.fragments) == ("CCO", 3)


def test_one_broken_fragment_makes_the_graph_invalid_but_its_fragments_are_counted() -> None:
    decoded = decode(*classes("CCO.FFF"), QM9_NO_H)
    assert (decoded.smiles, decoded.fragments) == (None, 2)


def published_relaxed(atoms: list[int], bonds: list[list[int]]) -> bool:
    """The published rule, reading atom and valence from the text of the error."""
    mol = Chem.RWMol()
    for a in atoms:
        mol.AddAtom(Chem.Atom("CNOF"[a]))
    types = [None, *ORDERS]
    for i in range(len(atoms)):
        for j in range(i + 1, len(atoms)):
            if not bonds[i][j]:
                continue
            mol.AddBond(i, j, types[bonds[i][j]])
            try:
                Chem.SanitizeMol(mol, sanitizeOps=Chem.SanitizeFlags.SANITIZE_PROPERTIES)
            except ValueError as e:
                text = str(e).split("#")[1]
                at, valence = (int("".join(c for c in part if c.isdigit())) for part in text.split(",")[:2])
                number = mol.GetAtomWithIdx(at).GetAtomicNum()
                if number in (7, 8) and valence - {7: 3, 8: 2}[number] == 1:
                    mol.GetAtomWithIdx(at).SetFormalCharge(1)
    try:
        Chem.SanitizeMol(mol)
    except ValueError:
        return False
    return True


@given(seed=st.integers(0, 10**6), density=st.sampled_from([0.15, 0.3, 0.5]))
def test_random_graphs_are_judged_as_the_published_code_judges_them(seed: int, density: float) -> None:
    rng = random.Random(seed)
    n = rng.randint(1, 9)
    atoms = [rng.choice([0, 1, 1, 1, 2, 2, 3]) for _ in range(n)]
    bonds = [[0] * n for _ in range(n)]
    for i in range(n):
        for j in range(i + 1, n):
            if rng.random() < density:
                bonds[i][j] = bonds[j][i] = rng.choice([1, 1, 1, 2, 3])
    decoded = decode(atoms, bonds, QM9_NO_H)
    assert decoded.valid_relaxed == published_relaxed(atoms, bonds)
    adjacency = np.array(bonds) > 0
    reach = np.linalg.matrix_power(np.eye(n, dtype=int) + adjacency, n) > 0
    assert decoded.fragments == len({tuple(row) for row in reach})


def test_a_row_holds_the_values_of_rdkit_for_the_largest_fragment() -> None:
    table = score_graphs(graphs_of("CC(=O)Oc1ccco1", "NCCO.C"), 40, QM9_NO_H)
    assert table.schema == MOLECULE_SCHEMA
    furan, amine = table.to_pylist()
    assert (furan["sample_id"], amine["sample_id"]) == (40, 41)
    mol = Chem.MolFromSmiles("CC(=O)Oc1ccco1")
    assert furan["smiles"] == Chem.MolToSmiles(mol)
    assert furan["inchikey"] == Chem.MolToInchiKey(mol)
    assert furan["mw"] == pytest.approx(126.11, abs=0.01)
    assert furan["qed"] == furan["score"] == pytest.approx(QED.qed(mol), rel=1e-6)
    assert furan["alerts"] == structural_alerts(mol)
    assert (furan["n_heavy_atoms"], furan["n_rings"], furan["hba"], furan["hbd"]) == (9, 1, 3, 0)
    assert 1 <= furan["sa_score"] <= 10 and furan["is_novel"] is None
    assert (amine["smiles"], amine["n_nodes"], amine["n_heavy_atoms"], amine["n_fragments"]) == (
        "NCCO",
        5,
        4,
        2,
    )
    assert (amine["n_rotatable_bonds"], amine["hbd"]) == (1, 2)


def test_an_invalid_graph_has_nulls_and_no_novelty() -> None:
    known = load_reference("builtin:qm9")
    table = score_graphs(graphs_of("CN(C)(C)C", "CC"), 0, QM9_NO_H, reference=known)
    row = table.to_pylist()[0]
    given = {name for name, value in row.items() if value is not None}
    assert given == {"sample_id", "n_nodes", "n_fragments", "is_valid", "is_valid_relaxed"}
    assert (row["is_valid"], row["is_valid_relaxed"]) == (False, True)
    assert table["is_novel"].to_pylist() == [None, False]


def test_alerts_name_their_set_and_pattern_and_can_be_left_out() -> None:
    aldehyde = graphs_of("CCC=O")
    assert "BRENK:aldehyde" in score_graphs(aldehyde, 0, QM9_NO_H)["alerts"].to_pylist()[0]
    assert score_graphs(aldehyde, 0, QM9_NO_H, alerts=False)["alerts"].to_pylist() == [None]
    assert structural_alerts(Chem.MolFromSmiles("O=C1NC(=S)SC1=Cc1ccccc1"))[0].startswith("PAINS_A:")


def test_the_score_is_the_named_column_with_better_always_higher() -> None:
    graphs = graphs_of("CCO", "C1C2C3C4C5OC14C5N23")
    by_logp = score_graphs(graphs, 0, QM9_NO_H, score_by="logp")
    assert by_logp["score"].equals(by_logp["logp"])
    by_sa = score_graphs(graphs, 0, QM9_NO_H, score_by="sa_score")
    assert by_sa["score"].to_pylist() == [-x for x in by_sa["sa_score"].to_pylist()]
    assert by_sa["sa_score"].to_pylist()[0] < by_sa["sa_score"].to_pylist()[1]
    with pytest.raises(ValueError, match="tastiness"):
        score_graphs(graphs, 0, QM9_NO_H, score_by="tastiness")


@pytest.mark.parametrize("error", [RuntimeError("Invariant Violation"), Chem.MolSanitizeException("bad")])
def test_a_molecule_that_rdkit_fails_on_is_one_invalid_row(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails_on_ethanol(mol: Chem.Mol) -> float:
        if Chem.MolToSmiles(mol) == "CCO":
            raise error
        return 0.5

    monkeypatch.setattr(molecule, "_PROPERTIES", {**molecule._PROPERTIES, "qed": fails_on_ethanol})
    rows = score_graphs(graphs_of("CC", "CCO", "CCC"), 0, QM9_NO_H).to_pylist()
    assert [row["is_valid"] for row in rows] == [True, False, True]
    assert rows[1]["smiles"] is None and rows[1]["score"] is None


def test_an_error_of_ours_is_not_taken_for_an_invalid_molecule(monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(mol: Chem.Mol) -> float:
        raise TypeError("a bug")

    monkeypatch.setattr(molecule, "_PROPERTIES", {**molecule._PROPERTIES, "qed": bug})
    with pytest.raises(TypeError, match="a bug"):
        score_graphs(graphs_of("CC"), 0, QM9_NO_H)


def test_rdkit_says_nothing_on_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    score_graphs(graphs_of("C(C)(C)(C)(C)C", "CC"), 0, QM9_NO_H)
    assert capfd.readouterr() == ("", "")


INVALID = ("C(C)(C)(C)(C)C", "CN(C)(C)C")
MIXED = ("CCO", *INVALID, "c1ccncc1", "CCO", "CC=O.C", "C", "C#CC", "NCC(=O)O", "CC(F)(F)F", "CCC")


@pytest.fixture(scope="module")
def scored() -> pa.Table:
    return score_graphs(graphs_of(*MIXED), 100, QM9_NO_H, reference=load_reference("builtin:qm9"))


def test_a_summary_counts_what_the_rows_hold(scored: pa.Table) -> None:
    stats = unit_stats(scored)
    assert stats["counts"] == {
        "n": 11, "valid": 9, "valid_relaxed": 10, "connected": 8, "compared": 9,
        "novel": sum(x for x in scored["is_novel"].to_pylist() if x),
        "alerted": sum(bool(x) for x in scored["alerts"].to_pylist()),
    }  # fmt: skip
    assert sum(stats["n_nodes"]) == 11 and stats["n_nodes"][1] == 1
    rows = [row for row in scored.to_pylist() if row["is_valid"]]
    for name in NUMERIC_COLUMNS:
        assert sum(stats["histograms"][name]) == 9
        assert mean(stats, name) == pytest.approx(np.mean([row[name] for row in rows]), abs=1e-5)
    assert stats["histograms"]["n_heavy_atoms"][:7] == [0, 1, 0, 5, 0, 2, 1]
    assert json.loads(json.dumps(stats)) == stats


def test_the_best_are_distinct_best_first_and_named_by_their_lowest_id(scored: pa.Table) -> None:
    rows = unit_stats(scored, top=4)["top"]["rows"]
    table = {row["smiles"]: row["score"] for row in scored.to_pylist()[::-1] if row["is_valid"]}
    assert [row[2] for row in rows] == sorted(table, key=lambda s: -table[s])[:4]
    assert [row[1] for row in unit_stats(scored)["top"]["rows"] if row[2] == "CCO"] == [100]


@given(cuts=st.sets(st.integers(1, 10)), order=st.randoms(use_true_random=False), top=st.integers(1, 12))
def test_summaries_fold_to_the_summary_of_everything_in_any_grouping_and_order(
    scored: pa.Table, cuts: set[int], order: random.Random, top: int
) -> None:
    bounds = [0, *sorted(cuts), 11]
    parts = [unit_stats(scored.slice(a, b - a), top) for a, b in pairwise(bounds)]
    order.shuffle(parts)
    while len(parts) > 1:
        at = order.randrange(len(parts) - 1)
        parts[at : at + 2] = [fold_stats(parts[at], parts[at + 1])]
    assert parts[0] == unit_stats(scored, top)


def test_a_summary_of_no_valid_molecule_folds_and_has_no_mean() -> None:
    empty = unit_stats(score_graphs(graphs_of("C(C)(C)(C)(C)C"), 0, QM9_NO_H))
    assert mean(empty, "qed") is None and empty["top"]["rows"] == []
    assert functools.reduce(fold_stats, [empty, empty])["counts"]["n"] == 2
    with pytest.raises(ValueError, match="best molecules"):
        fold_stats(empty, {**empty, "top": {"k": 3, "rows": []}})


def test_values_beyond_the_bins_are_counted_in_the_end_bins() -> None:
    low, high, bins = BINS["logp"]
    counts = summary._histogram("logp", np.array([low - 5, low, high - 1e-6, high, high + 50]))
    assert (len(counts), counts[0], counts[-1]) == (bins, 2, 3)
