"""Structural alerts: substructures that medicinal chemists avoid.

Guarantees: names are `<set>:<pattern>`, in the order of RDKit's catalogues, so equal molecules have equal lists; the
list is that of the whole catalogues, only patterns that a molecule has no atoms for are not searched for. The alerts
of QED are screened together with them: what a molecule holds is counted once.
Knows nothing of: scores; an alert is reported, nothing is filtered.
"""

import re
from functools import cache, lru_cache

from rdkit import Chem
from rdkit.Chem import QED
from rdkit.Chem.FilterCatalog import FilterCatalog, FilterCatalogEntry, FilterCatalogParams

from bitdgdm.models.screen import Screen

_SETS = ("PAINS_A", "PAINS_B", "PAINS_C", "BRENK", "NIH")
_PICKLED = b"\xef\xbe\xad\xde"  # how RDKit's binary molecules begin


@cache
def _entries() -> tuple[tuple[str, FilterCatalogEntry], ...]:
    """Every alert of every set with its full name."""
    names = FilterCatalogParams.FilterCatalogs.names
    found = []
    for name in _SETS:
        catalogue = FilterCatalog(FilterCatalogParams(names[name]))
        entries = (catalogue.GetEntryWithIdx(i) for i in range(catalogue.GetNumEntries()))
        found += [(f"{name}:{entry.GetDescription()}", entry) for entry in entries]
    return tuple(found)


@cache
def _screen() -> Screen:
    """Of the entries, then of QED's alerts."""
    return Screen([*(_pattern(entry) for _, entry in _entries()), *QED.StructuralAlerts])


@lru_cache(maxsize=1)
def _possible(molecule: Chem.Mol) -> list[int]:
    """Asked for twice a molecule."""
    return _screen().possible(molecule)


def _pattern(entry: FilterCatalogEntry) -> Chem.Mol | None:
    """The pattern of which an alert needs a match; None if it isn't that simple.

    RDKit gives no access to it; the stored form of an entry holds it as one binary molecule behind its length.
    """
    stored = entry.Serialize()
    start = stored.find(_PICKLED)
    length = re.search(rb" (\d+) $", stored[: max(start, 0)])
    if (
        start < 0
        or length is None
        or _PICKLED in stored[start + int(length[1]) :]
        or entry.HasFilterMatch(Chem.Mol())
    ):
        return None
    return Chem.Mol(stored[start : start + int(length[1])])


def structural_alerts(molecule: Chem.Mol) -> list[str]:
    """Return the alerts of a sanitised molecule, e.g. ["BRENK:aldehyde", "NIH:aldehyde"]."""
    entries = _entries()
    candidates = (entries[i] for i in _possible(molecule) if i < len(entries))
    return [name for name, entry in candidates if entry.HasFilterMatch(molecule)]


def qed_alerts(molecule: Chem.Mol) -> int:
    """Return the number of QED's own alerts that a sanitised molecule has."""
    first = len(_entries())
    candidates = (QED.StructuralAlerts[i - first] for i in _possible(molecule) if i >= first)
    return sum(molecule.HasSubstructMatch(alert) for alert in candidates)
