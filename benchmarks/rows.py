"""Flat result rows: what every benchmark prints and keeps.

Guarantees: a row names its hardware, versions, commit, date and command; a file holds the rows of one question on
one kind of hardware, and a new run of a case replaces the old one.
Knows nothing of: what is measured.
"""

import json
import platform
import re
import shlex
import statistics
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from bitdgdm.infra.version import code_version
from bitdgdm.models.engine import hardware_name

RESULTS = Path(__file__).resolve().parent / "results"
_NAMED = ("torch", "numpy", "rdkit", "ray", "pyarrow", "pycuda")


def device() -> str:
    """Return "cuda" or "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def hardware() -> str:
    """Return what computes, with its number of cores for a CPU."""
    if torch.cuda.is_available():
        return hardware_name("cuda")
    import os

    return f"{hardware_name('cpu')}, {os.cpu_count()} cores"


def versions() -> dict[str, str]:
    """Return the versions that can change a figure."""
    found = {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    for name in _NAMED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def row(
    question: str,
    case: str,
    metric: str,
    values: Sequence[float] | float,
    unit: str,
    *,
    baseline: str = "",
    spread: str = "",
    n: int | None = None,
) -> dict[str, Any]:
    """Return one row. Several `values` are runs: their median is kept, min and max are the spread."""
    runs = [float(values)] if isinstance(values, int | float) else [float(v) for v in values]
    return {
        "question": question, "case": case, "metric": metric, "value": statistics.median(runs), "unit": unit,
        "baseline": baseline, "n": n if n is not None else len(runs),
        "spread": spread or (f"{min(runs):.4g}..{max(runs):.4g}" if len(runs) > 1 else ""),
        "hardware": hardware(), "versions": versions(), "commit": code_version(),
        "date": datetime.now(UTC).date().isoformat(),
        "command": shlex.join(["python", *sys.argv]),
    }  # fmt: skip


def keep(question: str, rows: Sequence[dict[str, Any]], folder: Path | None = None) -> Path:
    """Merge `rows` into results/<question>-<hardware>.json and print them; return the file."""
    slug = re.sub(r"[^a-z0-9]+", "-", hardware().split(",")[0].lower()).strip("-")
    path = (folder or RESULTS) / f"{question}-{slug}.json"
    old = json.loads(path.read_text()) if path.exists() else []
    new = {(r["case"], r["metric"]): r for r in rows}
    merged = [r for r in old if (r["case"], r["metric"]) not in new] + list(new.values())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(merged, indent=1) + "\n")
    for r in rows:
        print(f"{r['case']:<44} {r['metric']:<28} {r['value']:>12.5g} {r['unit']:<14} {r['spread']}")
    return path
