"""Run: .venv/bin/python -m pytest tests/models/test_novelty.py -q"""

import gzip
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bitdgdm.infra.errors import BadInput
from bitdgdm.models import novelty
from bitdgdm.models.novelty import ReferenceSet, load_reference

MOLECULES = ["CCO", "c1ccncc1", "CC(=O)O"]


def write(path: Path, lines: list[str]) -> Path:
    text = "".join(f"{line}\n" for line in lines)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def test_the_shipped_set_knows_qm9_and_nothing_else() -> None:
    known = load_reference("builtin:qm9")
    assert len(known) > 130_000
    assert known.hashes.nbytes == 8 * len(known)
    assert known.contains(["C", "CCO", "c1ccncc1", "CCCCCCCCCCCCCCC", ""]) == [True, True, True, False, False]
    assert known.contains([]) == []


@pytest.mark.parametrize("name", ["known.smi", "known.txt", "known.smi.gz", "known.txt.gz"])
def test_a_text_file_holds_a_molecule_a_line_and_names_after_a_blank(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, ["OCC ethanol", "", "C1=CC=NC=C1\tpyridine", "OC(C)=O"])
    known = load_reference(path)
    assert known.contains(MOLECULES) == [True] * 3
    assert known.contains(["OCC"]) == [False], "only the canonical form is asked for"


@pytest.mark.parametrize(
    ("name", "column"), [("k.csv", "smiles"), ("k.csv.gz", "SMILES"), ("a.v2.csv", "Smiles")]
)
def test_a_csv_file_has_a_column_smiles_in_any_case(name: str, column: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, [f"id,{column}", "1,OCC", "2,n1ccccc1", "3,CC(O)=O"])
    assert load_reference(str(path)).contains(MOLECULES) == [True] * 3


def test_a_parquet_file_has_a_column_smiles_and_nulls_are_no_molecules(tmp_path: Path) -> None:
    path = tmp_path / "known.parquet"
    pq.write_table(pa.table({"split": ["a"] * 4, "smiles": ["OCC", None, "n1ccccc1", "CC(O)=O"]}), path)
    assert load_reference(path).contains(MOLECULES) == [True] * 3


def test_stereo_is_dropped_and_lines_that_are_no_molecules_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "known.smi", ["smiles", "C[C@H](N)O", "not-a-molecule", "F/C=C/F"])
    known = load_reference(path)
    assert known.skipped == 2
    assert known.contains(["CC(N)O", "FC=CF"]) == [True, True]


def test_a_set_in_canonical_form_is_not_brought_to_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "known.smi", [f"{'C' * (1 + k % 40)}O" for k in range(2000)])
    calls: list[str] = []
    canonical = novelty._canonical
    monkeypatch.setattr(novelty, "_canonical", lambda s: calls.append(s) or canonical(s))
    load_reference(path)
    assert len(calls) <= 300
    calls.clear()
    load_reference(write(tmp_path / "other.smi", [f"O{'C' * (1 + k % 40)}" for k in range(500)]))
    assert len(calls) > 500


def test_equal_sets_have_equal_digests_whatever_their_order_and_spelling(tmp_path: Path) -> None:
    a = load_reference(write(tmp_path / "a.smi", ["OCC", "C", "CC"]))
    b = load_reference(write(tmp_path / "b.txt", ["CC", "CCO", "C", "C"]))
    c = load_reference(write(tmp_path / "c.txt", ["CC", "CCO"]))
    assert a.digest == b.digest != c.digest
    assert len(a) == 3


def test_a_set_survives_its_bytes_and_damaged_bytes_are_refused(tmp_path: Path) -> None:
    known = load_reference(write(tmp_path / "a.smi", MOLECULES))
    again = ReferenceSet.from_bytes("a", known.to_bytes())
    assert again.digest == known.digest and again.contains([*MOLECULES, "CCC"]) == [True] * 3 + [False]
    for damaged in (known.to_bytes()[:-1], known.to_bytes()[::-1], known.to_bytes() * 2):
        with pytest.raises(BadInput, match="damaged"):
            ReferenceSet.from_bytes("a", damaged)


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        ("absent.smi", None, "no reference set"),
        ("empty.smi", [], "holds no molecules"),
        ("known.xlsx", ["CCO"], "unknown ending"),
        ("known.csv", ["id,structure", "1,CCO"], "it has: id, structure"),
    ],
)
def test_a_file_that_is_no_reference_set_is_refused(
    name: str, lines: list[str] | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / name if lines is None else write(tmp_path / name, lines)
    with pytest.raises(BadInput, match=message):
        load_reference(path)
