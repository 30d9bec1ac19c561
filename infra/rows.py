"""Flat result rows: the one form of every figure that a command or a benchmark writes.

Guarantees: a row names its hardware, versions, commit, date and command; a file is a JSON list of rows, and a new run
of a case replaces the old one.
Knows nothing of: what is measured, and on what device (the caller says so).
"""

import json
import platform
import shlex
import statistics
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bitdgdm.infra.errors import BadInput
from bitdgdm.infra.version import code_version

Row = dict[str, Any]
KEYS = frozenset({
    "question", "case", "metric", "value", "unit", "baseline", "n", "spread", "hardware", "versions", "commit",
    "date", "command",
})  # fmt: skip
_NAMED = ("torch", "numpy", "rdkit", "ray", "pyarrow", "pycuda", "fcd")


def versions(cuda: str = "None") -> dict[str, str]:
    """Return the versions that can change a figure. cuda: what PyTorch was built with."""
    return dict(_versions(cuda))


@cache
def _versions(cuda: str) -> dict[str, str]:
    found = {"python": platform.python_version(), "cuda": cuda}
    for name in _NAMED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def make_row(
    question: str,
    case: str,
    metric: str,
    values: Sequence[float] | float,
    unit: str,
    *,
    hardware: str,
    cuda: str = "None",
    baseline: str = "",
    spread: str = "",
    n: int | None = None,
) -> Row:
    """Return one row. Several `values` are runs: their median is kept, min and max are the spread."""
    runs = [float(values)] if isinstance(values, int | float) else [float(v) for v in values]
    return {
        "question": question, "case": case, "metric": metric, "value": statistics.median(runs), "unit": unit,
        "baseline": baseline, "n": n if n is not None else len(runs),
        "spread": spread or (f"{min(runs):.4g}..{max(runs):.4g}" if len(runs) > 1 else ""),
        "hardware": hardware, "versions": versions(cuda), "commit": _commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "command": _command(),
    }  # fmt: skip


def _command() -> str:
    """What was typed: `bitdgdm ...`, or `python SCRIPT ...` with the script's place in this project."""
    script, root = Path(sys.argv[0]), Path(__file__).resolve().parent.parent
    if script.name == "bitdgdm" or script.parts[-2:] == ("pipelines", "cli.py"):
        return shlex.join(["bitdgdm", *sys.argv[1:]])
    known = script.is_absolute() and script.is_relative_to(root)
    return shlex.join(["python", str(script.relative_to(root) if known else script), *sys.argv[1:]])


@cache
def _commit() -> str:
    return code_version()


def between(low: float | None, high: float | None, digits: str = ".4g") -> str:
    """Return an interval as rows write it; "" if there is none."""
    return "" if low is None or high is None else f"{low:{digits}}..{high:{digits}}"


def ends(spread: str) -> tuple[float, float] | None:
    """Return the two ends of a spread, None if it isn't an interval."""
    low, dots, high = spread.partition("..")
    try:
        return (float(low), float(high)) if dots else None
    except ValueError:
        return None


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a file. Raises: BadInput if it isn't a list of rows."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(
            f"{path} holds no result rows ({error}). Give a file that bitdgdm evaluate wrote"
        ) from error
    if not isinstance(found, list) or any(not isinstance(r, dict) or set(r) != KEYS for r in found):
        raise BadInput(f"{path} is no list of result rows. Give a file that bitdgdm evaluate wrote")
    return found


def write_rows(path: Path, rows: Sequence[Row], *, compact: bool = False) -> None:
    """Write a file of rows, whole or not at all. compact: a row a line, for files of thousands."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    lines = ",\n".join(json.dumps(r, separators=(",", ":")) for r in rows)
    part.write_text(
        f"[\n{lines}\n]\n" if compact else json.dumps(list(rows), indent=1) + "\n", encoding="utf-8"
    )
    part.replace(path)


def merge_rows(path: Path, rows: Sequence[Row]) -> None:
    """Put `rows` into the file; one of the same case and metric is replaced."""
    old = read_rows(path) if path.exists() else []
    new = {(r["case"], r["metric"]): r for r in rows}
    write_rows(path, [*(r for r in old if (r["case"], r["metric"]) not in new), *new.values()])
