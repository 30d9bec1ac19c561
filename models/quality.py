"""How good a set of generated molecules is: shares of what is valid, distinct and new, and distances to a reference.

Guarantees: a function of the rows, the reference and the seed only; every figure has its 95 % interval.
Knows nothing of: how molecules were drawn, files.
"""

from collections.abc import Callable
from concurrent.futures import Executor

import pyarrow as pa

from bitdgdm.models.distribution import Measure, distances, share
from bitdgdm.models.profile import Profile, profile

VALIDITY = "validity"


def shares(table: pa.Table) -> list[Measure]:
    """Return the shares of rows of MOLECULE_SCHEMA: of all, of the valid, of the distinct.

    Novelty is left out if the rows were not compared with known molecules.
    """
    valid = table.filter(table["is_valid"])
    smiles, total = valid["smiles"].to_pylist(), table.num_rows
    found = [
        share(VALIDITY, len(smiles), total),
        share("relaxed validity", sum(table["is_valid_relaxed"].to_pylist()), total),
        share("valid and connected", valid["n_fragments"].to_pylist().count(1), total),
        share("uniqueness (distinct of valid)", len(set(smiles)), len(smiles)),
    ]
    if valid["is_novel"].null_count < max(1, valid.num_rows):
        novel = {s for s, new in zip(smiles, valid["is_novel"].to_pylist(), strict=True) if new}
        found.append(share("novelty (of distinct)", len(novel), len(set(smiles))))
    return found


def quality(
    table: pa.Table,
    reference: Profile | None,
    *,
    device: str = "cpu",
    pool: Executor | None = None,
    seed: int = 0,
    on_progress: Callable[[float], object] | None = None,
) -> list[Measure]:
    """Return `shares`, and the distances of the valid molecules, repeats included, to `reference`."""
    found = shares(table)
    if reference is not None:
        smiles = table.filter(table["is_valid"])["smiles"].to_pylist()
        ours = profile(
            smiles, features=reference.features is not None, device=device, pool=pool, on_progress=on_progress
        )
        found += distances(ours, reference, seed=seed)
    return found
