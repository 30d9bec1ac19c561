"""Flat result rows (infra/rows.py) of this machine: what every benchmark prints and keeps.

Guarantees: a file holds the rows of one question on one kind of hardware.
Knows nothing of: what is measured.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bitdgdm.infra.rows import make_row, merge_rows
from bitdgdm.models.engine import hardware_name

RESULTS = Path(__file__).resolve().parent / "results"


def device() -> str:
    """Return "cuda" or "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def hardware() -> str:
    """Return what computes, with its number of cores for a CPU."""
    if torch.cuda.is_available():
        return hardware_name("cuda")
    return f"{hardware_name('cpu')}, {os.cpu_count()} cores"


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
    return make_row(
        question, case, metric, values, unit, hardware=hardware(), cuda=str(torch.version.cuda),
        baseline=baseline, spread=spread, n=n,
    )  # fmt: skip


def results_file(question: str, folder: Path | None = None) -> Path:
    """Return where the rows of a question on this hardware are kept."""
    slug = re.sub(r"[^a-z0-9]+", "-", hardware().split(",")[0].lower()).strip("-")
    return (folder or RESULTS) / f"{question}-{slug}.json"


def keep(question: str, rows: Sequence[dict[str, Any]], folder: Path | None = None) -> Path:
    """Merge `rows` into results/<question>-<hardware>.json and print them; return the file."""
    path = results_file(question, folder)
    merge_rows(path, rows)
    for r in rows:
        print(
            f"{r['case']:<44} {r['metric']:<28} {r['value']:>12.5g} {r['unit']:<14} {r['spread']}", flush=True
        )
    return path
