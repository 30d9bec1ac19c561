"""Run: .venv/bin/python -m pytest tests/models/test_held_out.py -q"""

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rdkit import Chem

from bitdgdm.infra.errors import BadInput
from bitdgdm.models.decode import decode
from bitdgdm.models.digress_config import QM9_NO_H
from bitdgdm.models.held_out import graph, held_out, held_out_smiles


def test_decoding_an_encoded_molecule_gives_the_molecule_back() -> None:
    smiles = held_out_smiles()
    neutral = [s for s in smiles if "+" not in s and "-" not in s][::40]
    assert len(neutral) > 200
    for s in neutral:
        encoded = graph(s, QM9_NO_H)
        assert encoded is not None
        assert decode(*encoded, QM9_NO_H).smiles == s


def test_splits_are_disjoint_and_an_unknown_one_is_refused_by_name() -> None:
    assert not set(held_out_smiles()) & set(held_out_smiles(split="train"))
    with pytest.raises(BadInput, match="'dev'"):
        held_out_smiles(split="dev")


def test_a_file_of_ones_own_is_read_and_one_without_splits_is_refused(tmp_path: Path) -> None:
    table = pa.table(
        {"smiles": ["CC", "CO", "CN", "CO", "CC"], "split": ["test", "train", "test", "test", "test"]}
    )
    pq.write_table(table, tmp_path / "a.parquet")
    pq.write_table(table.drop_columns(["split"]), tmp_path / "b.parquet")
    assert held_out_smiles(tmp_path / "a.parquet") == ["CC", "CN"]
    with pytest.raises(BadInput, match="no column split"):
        held_out_smiles(tmp_path / "b.parquet")
    with pytest.raises(BadInput, match="no molecules at"):
        held_out_smiles(tmp_path / "c.parquet")


def test_aromatic_bonds_are_kept_where_the_network_knows_them_and_kekulized_where_not() -> None:
    aromatic = replace(QM9_NO_H, edge_marginals=(0.7, 0.1, 0.05, 0.05, 0.1))
    furan = "c1ccoc1"
    kekulized, kept = graph(furan, QM9_NO_H), graph(furan, aromatic)
    assert kekulized is not None and kept is not None
    assert sorted(b for row in kekulized[1] for b in row if b) == [1] * 6 + [2] * 4
    assert {b for row in kept[1] for b in row if b} == {4}


@pytest.mark.parametrize(
    ("smiles", "why"),
    [
        ("CCCCCCCCCC", "ten atoms"),
        ("CCl", "chlorine"),
        ("not a molecule", "text"),
        ("", "nothing"),
        ("C~C", "a bond"),
    ],
)
def test_what_the_network_cannot_express_is_left_out(smiles: str, why: str) -> None:
    assert graph(smiles, QM9_NO_H) is None, why
    with pytest.raises(BadInput, match="can express none"):
        held_out(QM9_NO_H, [smiles], 1)


def test_graphs_are_padded_symmetric_drawn_without_repetition_and_the_same_for_one_seed() -> None:
    smiles = ["C", "N", "C=O", "CCl", "CC#N"]
    found = held_out(QM9_NO_H, smiles, 10, seed=3)
    assert sorted(found.n.tolist()) == [1, 1, 2, 3]
    assert torch.equal(found.E, found.E.mT) and not found.E.diagonal(dim1=1, dim2=2).any()
    padded = torch.arange(9) >= found.n[:, None]
    assert not found.X[padded].any() and not found.E[padded].any()
    texts = [
        Chem.CanonSmiles(str(decode(x[:n].tolist(), e[:n, :n].tolist(), QM9_NO_H).smiles))
        for n, x, e in zip(found.n.tolist(), found.X, found.E, strict=True)
    ]
    assert sorted(texts) == sorted({"C", "N", "C=O", "CC#N"})
    again = held_out(QM9_NO_H, smiles, 10, seed=3)
    assert torch.equal(found.X, again.X) and torch.equal(found.E, again.E)
    assert len(held_out(QM9_NO_H, smiles, 2, seed=3)) == 2
