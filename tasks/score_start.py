"""What each scoring process needs, read once: the fork server imports this module and its processes share the memory.

Guarantees: after the import PyTorch, RDKit, its catalogues of alerts and its table of synthetic accessibility are loaded.
Knows nothing of: what is scored.
"""

from rdkit import Chem

from bitdgdm.models.alerts import structural_alerts
from bitdgdm.models.molecule import properties
from bitdgdm.tasks import score_unit  # the functions that a process is asked to call

__all__ = ["score_unit"]

_METHANE = Chem.MolFromSmiles("C")
properties(_METHANE)
structural_alerts(_METHANE)
