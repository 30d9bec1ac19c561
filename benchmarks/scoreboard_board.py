"""What every part of the scoreboard works with: what was asked for, the rows kept so far, the artifacts.

Guarantees: rows are written as they come; the inputs of layers are seen once for all recipes that ask for the same.
Knows nothing of: how a recipe is judged, samples.
"""

import gc
import json
import re
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rows import hardware, keep

from bitdgdm.infra.fingerprint import fingerprint
from bitdgdm.infra.rows import Row
from bitdgdm.infra.version import code_version
from bitdgdm.models.calibrate import calibrate
from bitdgdm.models.digress import quantizable
from bitdgdm.models.source import SourceModel
from bitdgdm.pipelines import decompose_network
from bitdgdm.pipelines.measure import Rows
from bitdgdm.pipelines.quantize import quantize
from bitdgdm.quant.recipe import Recipe
from bitdgdm.quant.stats import LayerStats

QUESTION, MODEL = "scoreboard", "builtin:digress-qm9"
MARK = "recipe version"
BEGAN = time.monotonic()


def say(text: str) -> None:
    print(f"[{time.monotonic() - BEGAN:6.1f} s] {text}", flush=True)


@dataclass
class Board:
    """What all recipes share."""

    device: str
    molecules: int
    samples: int
    steps: int
    seed: int
    results: Path
    artifacts: Path
    again: bool
    compiled: bool
    tables: Path | None
    files: dict[str, str]  # of recipes that are not in the book
    done: dict[tuple[str, str], Row]

    def rows_of(self, case: str) -> Rows:
        return Rows(QUESTION, case, hardware())

    def keep(self, rows: list[Row]) -> None:
        """Write rows at once: what was measured survives what comes later."""
        keep(QUESTION, rows, self.results)
        self.done |= {(r["case"], r["metric"]): r for r in rows}

    def has(self, recipe: Recipe | None, metric: str, case: str) -> bool:
        """Whether the figure is there for this recipe, code and number."""
        found, mark = self.done.get((case, metric)), self.done.get((case, MARK))
        if self.again or found is None or found["commit"] != code_version():
            return False
        return recipe is None or (mark is not None and mark["spread"] == mark_of(recipe))


def mark_of(recipe: Recipe) -> str:
    """What makes two recipes of one name differ."""
    return fingerprint(recipe.to_dict())[:12]


class Calibrations:
    """Statistics of inputs, computed once for all recipes that ask for the same; `credit` is what each asker was spared."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[dict[str, LayerStats], float]] = {}
        self.credit = 0.0

    def __call__(self, source: SourceModel, names: Sequence[str], **how: Any) -> dict[str, LayerStats]:
        """As `calibrate`, of all layers at once."""
        progress = how.pop("progress", None)
        key = f"{source.digest} {sorted((k, str(v)) for k, v in how.items())}"
        if key not in self._kept:
            began = time.monotonic()
            stats = calibrate(source, quantizable(source.config), progress=progress, **how)
            self._kept[key] = stats, time.monotonic() - began
        else:
            self.credit += self._kept[key][1]
        return {name: self._kept[key][0][name] for name in names}


calibrations = Calibrations()
decompose_network.calibrate = calibrations  # type: ignore[assignment]


def make_artifact(recipe: Recipe, board: Board) -> tuple[Path, float, float]:
    """Quantize in process; return the file, seconds and peak memory in MB (of the process, or of the GPU)."""
    path = board.artifacts / f"{recipe.name}-{mark_of(recipe)}.safetensors"
    known = path.with_suffix(".json")
    if path.exists() and known.exists() and not board.again:
        made = json.loads(known.read_text())
        return path, made["seconds"], made["peak"]
    with peak_mb(board.device) as peak:
        calibrations.credit, began = 0.0, time.monotonic()
        quantize(MODEL, board.files.get(recipe.name, recipe.name), out=path, executor="local", quiet=True)
        seconds = time.monotonic() - began + calibrations.credit  # as if it had calibrated for itself
    known.write_text(json.dumps({"seconds": seconds, "peak": peak()}))
    return path, seconds, peak()


@contextmanager
def peak_mb(device: str) -> Iterator[Callable[[], float]]:
    """The peak of the block: of the GPU's allocator, or of this process (Linux lets its high-water mark be reset)."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        yield lambda: torch.cuda.max_memory_allocated() / 1e6
        return
    Path("/proc/self/clear_refs").write_text("5")
    yield lambda: int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0]) / 1e3


@contextmanager
def told(name: str, failed: list[str]) -> Iterator[None]:
    """Print what goes wrong in the block and go on: a broken recipe must not cost the others their time."""
    try:
        yield
    except Exception:  # noqa: BLE001
        traceback.print_exc()
        failed.append(name)
