"""How fast is a campaign end to end, and how good are its molecules?

Runs the commands that a user runs (`quantize`, `generate`) in their own processes and reads the campaign back from
its Parquet. Quality has 95 % Wilson intervals. Example:

    python benchmarks/campaign.py --recipes full-precision bitdgdm-input-w4a4-r8 --count 10000 --steps 500
"""

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from rows import keep, row

from bitdgdm.infra.commit import visible_shards
from bitdgdm.infra.storage import open_store
from bitdgdm.pipelines.campaign import load_campaign
from bitdgdm.pipelines.status import read_status
from bitdgdm.quant.own_recipes import DEFAULT

ROOT = Path(__file__).resolve().parents[1]
QUESTION = "campaign"


def wilson(hits: int, n: int) -> str:
    """Return the 95 % Wilson interval of a proportion, in percent."""
    z, p = 1.959964, hits / n
    centre, half = (p + z * z / (2 * n)), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return f"{100 * (centre - half) / (1 + z * z / n):.2f}..{100 * (centre + half) / (1 + z * z / n):.2f}"


def command(*args: str) -> dict:
    """Run `bitdgdm ARGS --json`; return its document."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    print("$ bitdgdm", *args, flush=True)
    run = subprocess.Popen(
        [sys.executable, "-m", "bitdgdm.pipelines.cli", *args, "--json"], env=env, stdout=subprocess.PIPE
    )
    assert run.stdout is not None
    answer = run.stdout.read()
    _, status, usage = os.wait4(run.pid, 0)
    if status:
        raise SystemExit(f"bitdgdm {args[0]} failed: {answer.decode()}")
    return json.loads(answer) | {"peak_mb": usage.ru_maxrss / 1024}


def measure(recipe: str, steps: int, a: argparse.Namespace, folder: Path) -> list[dict]:
    """Run one campaign; return its rows."""
    model, rows = a.model, []
    made: dict = {}
    if recipe != "full-precision":
        model = str(folder / f"{recipe}.safetensors")
        made = command("quantize", a.model, "--recipe", recipe, "--out", model)
    out = folder / f"{recipe}-{steps}"
    began = time.monotonic()
    done = command(
        "generate", "--model", model, "--count", str(a.count), "--steps", str(steps), "--seed", str(a.seed),
        "--out", str(out), "--gpus-per-worker", str(a.gpus_per_worker), *a.generate,
    )  # fmt: skip
    wall = time.monotonic() - began
    store, status, spec = open_store(str(out)), read_status(str(out)), load_campaign(str(out)).spec
    case = f"{recipe}, {steps} steps, {a.count} molecules, {spec.engine} {spec.precision}"
    if made:
        rows.append(row(QUESTION, case, "bits a weight", made["bits_per_weight"], "bit"))
        rows.append(row(QUESTION, case, "quantize wall time, start of Ray included", made["seconds"], "s"))
    table = pa.concat_tables(pq.read_table(store.path(key)) for key in visible_shards(store))
    valid = table.filter(table["is_valid"])
    smiles, n = valid["smiles"].to_pylist(), table.num_rows
    assert n == a.count and done["digest"] == status.digest
    distinct = set(smiles)
    if "local" in a.generate:  # with Ray the work is in processes that this one can't see
        rows.append(row(QUESTION, case, "peak memory of the process", done["peak_mb"], "MB"))
    novel = len({s for s, new in zip(smiles, valid["is_novel"].to_pylist(), strict=True) if new})

    def share(metric: str, hits: int, of: int) -> dict:
        return row(QUESTION, case, metric, 100 * hits / of, "%", spread=wilson(hits, of), n=of)

    relaxed, connected = sum(table["is_valid_relaxed"].to_pylist()), valid["n_fragments"].to_pylist().count(1)
    return [
        *rows,
        row(QUESTION, case, "molecules/s, command start to end", n / wall, "1/s"),
        row(QUESTION, case, "molecules/s, one worker, units only", status.per_worker_second, "1/s"),
        row(QUESTION, case, "wall time", wall, "s"),
        share("validity", len(smiles), n),
        share("relaxed validity", relaxed, n),
        share("valid and connected", connected, n),
        share("uniqueness (distinct of valid)", len(distinct), len(smiles)),
        share("novelty (of distinct)", novel, len(distinct)),
    ]


def main() -> None:
    """Parse the options and run."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="builtin:digress-qm9")
    p.add_argument("--recipes", nargs="+", default=["full-precision", DEFAULT.name])
    p.add_argument("--count", type=int, default=10_000)
    p.add_argument("--steps", type=int, nargs="+", default=[500])
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--gpus-per-worker", type=float, default=1.0)
    p.add_argument("--folder", type=Path, help="keep campaigns and artifacts here")
    p.add_argument("--results", type=Path, help="write the result file into this folder")
    p.add_argument("generate", nargs="*", help="after --: more options of bitdgdm generate")
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        for recipe, steps in itertools.product(a.recipes, a.steps):
            keep(QUESTION, measure(recipe, steps, a, a.folder or Path(scratch)), a.results)


if __name__ == "__main__":
    main()
