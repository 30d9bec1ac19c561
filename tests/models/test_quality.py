"""Run: .venv/bin/python -m pytest tests/models/test_quality.py

Shares of generated molecules, counted again by hand.
"""

import pyarrow as pa
import pytest

from bitdgdm.models.molecule import MOLECULE_SCHEMA
from bitdgdm.models.profile import profile
from bitdgdm.models.quality import quality, shares


def table(*rows: tuple[str | None, int, bool, bool | None]) -> pa.Table:
    """Rows of (SMILES or None, fragments, valid if charges are allowed, novel)."""
    made = [
        {
            "sample_id": k, "smiles": s, "n_nodes": 5, "n_fragments": fragments, "is_valid": s is not None,
            "is_valid_relaxed": relaxed, "is_novel": novel,
        }
        for k, (s, fragments, relaxed, novel) in enumerate(rows)
    ]  # fmt: skip
    return pa.Table.from_pylist(made, schema=MOLECULE_SCHEMA)


ROWS = (
    ("CCO", 1, True, True),
    ("CCO", 1, True, True),
    ("CCN", 2, True, False),
    (None, 1, True, None),
    (None, 3, False, None),
)


def test_each_share_is_of_its_own_whole() -> None:
    found = {m.metric: (m.value, m.n) for m in shares(table(*ROWS))}
    assert found == {
        "validity": (pytest.approx(60), 5), "relaxed validity": (pytest.approx(80), 5), "valid and connected": (pytest.approx(40), 5),
        "uniqueness (distinct of valid)": (pytest.approx(200 / 3), 3), "novelty (of distinct)": (pytest.approx(50), 2),
    }  # fmt: skip


def test_without_known_molecules_there_is_no_novelty() -> None:
    found = shares(table(*((s, f, r, None) for s, f, r, _ in ROWS)))
    assert "novelty (of distinct)" not in {m.metric for m in found}


def test_no_valid_molecule_is_no_quality_and_no_error() -> None:
    found = quality(table((None, 1, False, None)), profile(["CCO", "CCN"], features=False))
    assert {m.metric: m.value for m in found if m.n}["validity"] == 0.0
    assert not any("Wasserstein" in m.metric for m in found)


def test_repeats_count_in_distances() -> None:
    reference = profile(["CCO", "CCN"], features=False)
    once = {m.metric: m for m in quality(table(*ROWS[1:]), reference)}
    twice = {m.metric: m for m in quality(table(*ROWS), reference)}
    name = "Wasserstein distance of mw"
    assert once[name].n == 2 and twice[name].n == 3 and once[name].value < twice[name].value
