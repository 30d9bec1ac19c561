"""Structural alerts: substructures that medicinal chemists avoid.

Guarantees: names are `<set>:<pattern>`, in the order of RDKit's catalogues, so equal molecules have equal
lists.
Knows nothing of: scores; an alert is reported, nothing is filtered.
"""

from functools import cache

from rdkit import Chem
from rdkit.Chem.FilterCatalog import FilterCatalog, FilterCatalogParams

_SETS = ("PAINS_A", "PAINS_B", "PAINS_C", "BRENK", "NIH")


@cache
def _catalogues() -> tuple[tuple[str, FilterCatalog], ...]:
    names = FilterCatalogParams.FilterCatalogs.names
    return tuple((name, FilterCatalog(FilterCatalogParams(names[name]))) for name in _SETS)


def structural_alerts(molecule: Chem.Mol) -> list[str]:
    """Return the alerts of a sanitised molecule, e.g. ["BRENK:aldehyde", "NIH:aldehyde"]."""
    return [
        f"{name}:{entry.GetDescription()}"
        for name, catalogue in _catalogues()
        for entry in catalogue.GetMatches(molecule)
    ]
