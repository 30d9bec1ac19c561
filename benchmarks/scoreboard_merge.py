"""Bring scoreboards that were made elsewhere, in parts, into the results.

Run: PYTHONPATH=. python benchmarks/scoreboard_merge.py RUN ... [--results DIR]
A RUN is a folder with scoreboard-*.json files anywhere in it, and perhaps the tables that --tables kept. Of two rows
of one figure the one of more molecules counts, then the later one. Kept samples that were not judged where they were
drawn, or only without ChemNet, are judged here; such rows name the hardware that drew them and say where they were judged.
"""

import argparse
import multiprocessing
import os
import re
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq
from rows import RESULTS, hardware

from bitdgdm.infra.rows import Row, read_rows, write_rows
from bitdgdm.models.held_out import held_out_smiles
from bitdgdm.models.profile import fcd_version
from bitdgdm.models.quality import quality
from bitdgdm.pipelines.measure import Rows, reference_profile

QUESTION = "scoreboard"
RATE = "molecules/s, ids to graphs"
_TABLE = re.compile(r"^(?P<recipe>.+)-(?P<count>\d+)-samples-(?P<steps>\d+)-steps$")


def merged(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """Return the rows of both, one a case and metric: of more molecules, then the new one."""
    found = {(r["case"], r["metric"]): r for r in old}
    for r in new:
        key = r["case"], r["metric"]
        if key not in found or r["n"] >= found[key]["n"]:
            found[key] = r
    return list(found.values())


def tidy(row: Row, commit: str) -> Row:
    """Return the row with folders of the machine that made it by their last name, and the commit that an archive lost."""
    command = re.sub(r"(?<=\s)/\S*?([^/\s]+)(?=\s|$)", r"\1", row["command"])
    lost = bool(commit) and "+g" not in row["commit"]
    return {**row, "command": command, "commit": f"{row['commit']}+g{commit}" if lost else row["commit"]}


def case_of(table: Path) -> str | None:
    """Return the case whose samples a file holds."""
    match = _TABLE.match(table.stem)
    return f"{match['recipe']}, {match['count']} samples, {match['steps']} steps" if match else None


def judge(table: Path, case: str, drawn: Row, pool: Executor) -> list[Row]:
    """Return the figures of kept samples; drawn: a row of the run that drew them."""
    reference = reference_profile(held_out_smiles(), pool=pool)
    rows = Rows(QUESTION, case, drawn["hardware"]).measures(
        quality(pq.read_table(table), reference, pool=pool)
    )
    return [{**r, "commit": drawn["commit"], "baseline": f"judged on {hardware()}"} for r in rows]


def main() -> None:
    """Parse the options, merge, judge."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("runs", nargs="+", type=Path)
    p.add_argument("--commit", default="", help="of rows that were made from an archive without .git")
    p.add_argument("--results", type=Path, default=RESULTS)
    a = p.parse_args()
    files: dict[str, list[Row]] = {}
    for run in a.runs:
        for path in sorted(run.rglob(f"{QUESTION}-*.json")):
            files[path.name] = merged(files.get(path.name, []), [tidy(r, a.commit) for r in read_rows(path)])
    for name, rows in files.items():
        kept = a.results / name
        rows = merged(read_rows(kept) if kept.exists() else [], rows)
        write_rows(kept, rows)
        print(f"{kept}: {len(rows)} rows", flush=True)
    tables = {
        case: path for run in a.runs for path in sorted(run.rglob("*.parquet")) if (case := case_of(path))
    }
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        for case, table in tables.items():
            for name in files:
                there = {r["metric"]: r for r in read_rows(a.results / name) if r["case"] == case}
                done = "validity" in there and ("FCD" in there or fcd_version() is None)
                if RATE in there and not done:
                    new = [r for r in judge(table, case, there[RATE], pool) if r["metric"] not in there]
                    write_rows(a.results / name, [*read_rows(a.results / name), *new])
                    print(f"{case}: {', '.join(r['metric'] for r in new)} judged here", flush=True)


if __name__ == "__main__":
    main()
