"""Are the molecules of a campaign what its Parquet says? Reads shards back and computes every column again.

For campaigns that were made on another machine: the SMILES of each valid row is parsed anew, its properties are
computed here and compared with the stored ones. Example:

    python benchmarks/rescore.py out/*
"""

import argparse
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rdkit import Chem
from rows import keep, row

from bitdgdm.infra.commit import visible_shards
from bitdgdm.infra.storage import open_store
from bitdgdm.models.molecule import properties
from bitdgdm.models.novelty import load_reference
from bitdgdm.models.summary import NUMERIC_COLUMNS
from bitdgdm.pipelines.status import read_status

QUESTION = "rescore"


def measure(folder: Path) -> list[dict]:
    """Return the rows of one campaign."""
    store, status = open_store(str(folder)), read_status(str(folder))
    table = pa.concat_tables(pq.read_table(store.path(key)) for key in visible_shards(store))
    valid = table.filter(table["is_valid"]).to_pylist()
    known = load_reference("builtin:qm9").contains([r["smiles"] for r in valid])
    parsed = canonical = keys = novel = 0
    worst = dict.fromkeys(NUMERIC_COLUMNS, 0.0)
    for r, k in zip(valid, known, strict=True):
        molecule = Chem.MolFromSmiles(r["smiles"])
        if molecule is None:
            continue
        parsed += 1
        canonical += Chem.MolToSmiles(molecule) == r["smiles"]
        keys += Chem.MolToInchiKey(molecule) == r["inchikey"]
        novel += (not k) == r["is_novel"]
        for name, value in properties(molecule).items():
            worst[name] = max(worst[name], abs(float(np.float32(value)) - r[name]))
    case = f"{status.model['recipe']}, {status.steps} steps, {table.num_rows} molecules, made on {', '.join(status.hardware)}"

    def share(metric: str, hits: int) -> dict:
        return row(QUESTION, case, metric, 100 * hits / len(valid), "%", n=len(valid))

    return [
        share("SMILES of valid rows that RDKit parses again", parsed),
        share("the same canonical SMILES", canonical),
        share("the same InChIKey", keys),
        share("the same novelty", novel),
        *(
            row(QUESTION, case, f"largest difference of {name}", v, "", n=len(valid))
            for name, v in worst.items()
        ),
    ]


def main() -> None:
    """Parse the options and run."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("campaigns", nargs="+", type=Path)
    for folder in p.parse_args().campaigns:
        keep(QUESTION, measure(folder))


if __name__ == "__main__":
    main()
