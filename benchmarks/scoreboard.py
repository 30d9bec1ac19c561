"""What does every recipe of the book cost, and what is it worth? On QM9, in one process.

Run: PYTHONPATH=. python benchmarks/scoreboard.py [--recipes NAME ...] [--samples 10000 --steps 500] [--results DIR]
Writes DIR/scoreboard-<hardware>.json after each recipe; rows of the same recipe, code and settings are not measured
again unless --again says so. Without --results beside this script; `make results` makes the page of it.

Without --samples: quantize in process, stored bits, weight errors, KL and total variation on held-out molecules.
With --samples: draw them (the same ids and seed for every recipe) and judge them; molecules are scored by a pool of
processes while the next recipe is drawn. The product of a quantized network is computed in float32 as the recipe says,
never in TF32 or bf16.
"""

import argparse
import gc
import json
import multiprocessing
import os
import re
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rows import RESULTS, hardware, keep, results_file

from bitdgdm.infra.errors import KernelsUnavailable
from bitdgdm.infra.fingerprint import fingerprint
from bitdgdm.infra.rows import Row, read_rows
from bitdgdm.infra.version import code_version
from bitdgdm.models.calibrate import calibrate
from bitdgdm.models.digress import quantizable
from bitdgdm.models.distribution import Measure
from bitdgdm.models.divergence import Predictions, States, divergence, held_out_states, predict
from bitdgdm.models.engine import TorchEngine, load_engine
from bitdgdm.models.held_out import held_out_smiles
from bitdgdm.models.int4_network import Int4Layer
from bitdgdm.models.novelty import BUILTIN, load_reference
from bitdgdm.models.profile import Profile
from bitdgdm.models.quality import quality
from bitdgdm.models.sampler import Graphs, sample_ids
from bitdgdm.models.seam import Engine
from bitdgdm.models.source import SourceModel, load_source
from bitdgdm.pipelines import decompose_network
from bitdgdm.pipelines.measure import BITS, HELD_OUT, SIZE, Rows, divergence_rows, reference_profile
from bitdgdm.pipelines.quantize import quantize
from bitdgdm.quant.artifact import read_header
from bitdgdm.quant.linear import QuantLinear
from bitdgdm.quant.recipe import Recipe
from bitdgdm.quant.recipe_book import open_recipe, recipes
from bitdgdm.quant.stats import LayerStats
from bitdgdm.tasks.score_unit import Scoring

QUESTION, MODEL = "scoreboard", "builtin:digress-qm9"
FULL, FULL_KERNELS = "full-precision", "full-precision-bf16-kernels"  # pseudo-recipes, sampled only
MARK = "recipe version"
EMULATED = "PyTorch, fake quantization"
BEGAN = time.monotonic()
_CHUNK = 256


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
    fused: bool
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
        return recipe is None or (mark is not None and mark["spread"] == _mark(recipe))


def _mark(recipe: Recipe) -> str:
    """What makes two recipes of one name differ."""
    return fingerprint(recipe.to_dict())[:12]


def sampled_case(recipe: str, board: Board) -> str:
    return f"{recipe}, {board.samples} samples, {board.steps} steps"


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
    path = board.artifacts / f"{recipe.name}-{_mark(recipe)}.safetensors"
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


def judge(recipe: Recipe, board: Board, states: list[States], wanted: Predictions) -> list[Row]:
    """Everything that needs no samples."""
    path, seconds, peak = make_artifact(recipe, board)
    header, row = read_header(path), board.rows_of(recipe.name)
    errors = [r.relative_error for r in header.layers.values()]
    where = "of the GPU" if board.device == "cuda" else "of the process"
    found = [
        row(MARK, recipe.version, "", n=1, spread=_mark(recipe)),
        row(BITS, header.bits_per_weight, "bit", n=len(errors)),
        row(SIZE, path.stat().st_size / 1e6, "MB"),
        row(
            "weight error, median",
            100 * statistics.median(errors),
            "%",
            n=len(errors),
            spread=f"worst {100 * max(errors):.2f}",
        ),
        row("quantize", seconds, "s", n=1),
        row(f"quantize, peak memory {where}", peak, "MB", n=1),
    ]
    engine = load_engine(path, board.device, "fp32", engine="torch")
    with peak_mb(board.device) as peak_run:
        began = time.monotonic()
        d = divergence(wanted, engine, states)
        found.append(
            row(
                "network, fake quantization", len(d.t) / (time.monotonic() - began), "molecules/s", n=len(d.t)
            )
        )
        found.append(row(f"network, peak memory {where}", peak_run(), "MB", n=1))
    return found + divergence_rows(row, d, HELD_OUT, over_time=False)


def draw(engine: Engine, board: Board, name: str) -> tuple[Graphs, float]:
    """All samples in as few chains as fit; seconds of the attempt that worked."""
    batch, last = board.samples, time.monotonic()

    def told(fraction: float) -> None:
        nonlocal last
        if time.monotonic() - last > 15:
            last = time.monotonic()
            say(
                f"{name}: {fraction:.0%} drawn, {(last - began) * (1 - fraction) / max(fraction, 1e-9):.0f} s left"
            )

    while True:
        began = time.monotonic()
        try:
            graphs = sample_ids(engine, engine.config, board.seed, 0, board.samples, board.steps, batch, told)
            return graphs, time.monotonic() - began
        except torch.OutOfMemoryError:
            batch = -(-batch // 2)
            torch.cuda.empty_cache()
            say(f"{name}: too large a batch, trying {batch}")
            if batch < 2:
                raise


def open_engine(recipe: str, model: str | Path, board: Board) -> Engine:
    """Our kernels where they compute all of the recipe, else PyTorch in float32."""
    if board.device == "cpu":
        engine: Engine = load_engine(model, "cpu")
    elif recipe == FULL:
        engine = load_engine(model, "cuda", "fp32", engine="torch")
    else:
        engine = load_engine(model, "cuda", engine="auto")
        if board.fused and isinstance(engine, TorchEngine):
            with suppress(KernelsUnavailable):
                engine = load_engine(model, "cuda", engine="kernels")
    if board.compiled and _how(engine) == EMULATED:
        compile_layers(engine, board)
    return engine


def _how(engine: Engine) -> str:
    """What computes the samples, for people."""
    if not isinstance(engine, TorchEngine):
        return "our kernels"
    kinds = {type(m) for m in engine._network.modules()}
    if Int4Layer in kinds:
        return "one launch a Linear"
    return EMULATED if QuantLinear in kinds else "PyTorch"


def compile_layers(engine: TorchEngine, board: Board) -> None:
    """Let torch.compile fuse each transformer layer, and see that it computes the same up to the order of sums."""
    states = held_out_states(engine.config, molecules=board.samples, times=1)  # the shape that will run
    before = states[0].logits(engine)
    layers = engine._network.tf_layers
    torch._dynamo.config.recompile_limit = 64  # type: ignore[attr-defined]
    for k, layer in enumerate(layers):
        layers[k] = torch.compile(layer, dynamic=False)
    after = states[0].logits(engine)
    off = max(float((a - b).abs().max()) for a, b in zip(before, after, strict=True))
    say(f"{engine.name}: compiled, logits differ by at most {off:.2g}")


def _score(scoring: Scoring, graphs: Graphs, first: int) -> pa.Table:
    return scoring.table(graphs, first)


def score(
    graphs: Graphs, case: str, board: Board, pool: Executor, scoring: Scoring, reference: Profile
) -> list[Measure]:
    """Decode and judge; ChemNet runs on the board's device, all else in the pool."""
    starts = range(0, len(graphs), _CHUNK)
    parts = pool.map(_score, [scoring] * len(starts), [graphs[i : i + _CHUNK] for i in starts], starts)
    table = pa.concat_tables(parts)
    if board.tables:
        board.tables.mkdir(parents=True, exist_ok=True)
        pq.write_table(
            table, board.tables / f"{case.replace(', ', '-').replace(' ', '-')}.parquet", compression="zstd"
        )
    return quality(table, reference, device=board.device, pool=pool)


def sample(names: list[str], book: dict[str, Recipe], board: Board, limit: float) -> list[str]:
    """Draw and judge one recipe after the other. Starts none after `limit` seconds.

    Return the names of those that failed.
    """
    config = load_source(MODEL).config
    scoring = Scoring(config, load_reference(BUILTIN), "qed", alerts=False)
    processes = max(1, (os.cpu_count() or 2) - 1)
    waiting: list[tuple[str, Future[list[Measure]]]] = []
    failed: list[str] = []

    def collect(wait: bool) -> None:
        for case, future in list(waiting):
            if wait or future.done():
                waiting.remove((case, future))
                with told(case, failed):
                    board.keep(board.rows_of(case).measures(future.result()))

    with (
        ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool,
        ThreadPoolExecutor(1) as judges,
    ):
        reference = judges.submit(reference_profile, held_out_smiles(), device=board.device, pool=pool)
        for name in names:
            case = sampled_case(name, board)
            if board.has(None, "validity", case):
                say(f"{name}: sampled before")
                continue
            if time.monotonic() - BEGAN > limit:
                say(f"{name}: not begun, {limit:.0f} s are over")
                continue
            with told(name, failed):
                graphs = draw_one(name, book.get(name), board)
                job = (graphs, case, board, pool, scoring)
                waiting.append((case, judges.submit(lambda job: score(*job, reference.result()), job)))
            collect(False)
        collect(True)
    return failed


@contextmanager
def told(name: str, failed: list[str]) -> Iterator[None]:
    """Print what goes wrong in the block and go on: a broken recipe must not cost the others their time."""
    try:
        yield
    except Exception:  # noqa: BLE001
        traceback.print_exc()
        failed.append(name)


def draw_one(name: str, recipe: Recipe | None, board: Board) -> Graphs:
    """Make the artifact if need be, draw all samples, keep time and memory."""
    engine = open_engine(name, make_artifact(recipe, board)[0] if recipe else MODEL, board)
    with peak_mb(board.device) as peak:
        graphs, seconds = draw(engine, board, name)
    row = board.rows_of(sampled_case(name, board))
    how = _how(engine)
    board.keep([
        row("molecules/s, ids to graphs", len(graphs) / seconds, "1/s", n=len(graphs), baseline=how),
        row("sampling, peak memory", peak(), "MB", n=1, baseline=how),
    ])  # fmt: skip
    say(f"{name}: drawn in {seconds:.0f} s ({how})")
    return graphs


def main() -> None:
    """Parse the options and run."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--recipes",
        nargs="+",
        help=f"names, or files of recipes; all of the book when left out. {FULL!r} and {FULL_KERNELS!r} are only sampled",
    )
    p.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    p.add_argument("--molecules", type=int, default=2000, help="held-out molecules")
    p.add_argument("--samples", type=int, default=0)
    p.add_argument("--steps", type=int, default=500)
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--again", action="store_true", help="measure what is there already")
    p.add_argument("--compile", action="store_true", help="fuse each layer by torch.compile when sampling")
    p.add_argument(
        "--fused", action="store_true", help="sample through the kernel of 4-bit Linears where it computes the recipe"
    )
    p.add_argument("--limit", type=float, default=float("inf"), help="start no recipe after so many seconds")
    p.add_argument("--artifacts", type=Path, help="keep artifacts here, and take them from here")
    p.add_argument("--tables", type=Path, help="keep the rows of all samples here, as Parquet")
    p.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
    a = p.parse_args()
    if a.device == "cuda":
        torch.set_num_threads(
            4
        )  # what is left for the CPU are tiny tensors, on which many threads wait for each other
    book = {r.name: r for r in recipes()}
    asked, files = list(a.recipes or ()), dict[str, str]()
    for k, name in enumerate(asked):
        if name.endswith(".json"):
            recipe = open_recipe(name)
            book[recipe.name], files[recipe.name], asked[k] = recipe, name, recipe.name
    asked = asked or [r.name for r in recipes() if r.weight_quantized]
    if unknown := [name for name in asked if name not in (FULL, FULL_KERNELS, *book)]:
        raise SystemExit(f"no recipe {', '.join(unknown)}. The book has: {', '.join(book)}")
    kept = results_file(QUESTION, a.results)
    with tempfile.TemporaryDirectory() as scratch:
        folder = a.artifacts or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        board = Board(
            a.device, a.molecules, a.samples, a.steps, a.seed, a.results, folder, a.again, a.compile, a.fused, a.tables, files,
            {(r["case"], r["metric"]): r for r in (read_rows(kept) if kept.exists() else [])},
        )  # fmt: skip
        failed: list[str] = []
        todo = [book[name] for name in asked if name in book]
        todo = [r for r in todo if not board.has(r, "KL, held-out molecules", r.name)]
        if todo:
            states = held_out_states(load_source(MODEL).config, molecules=a.molecules)
            wanted = predict(load_engine(MODEL, a.device, "fp32", engine="torch"), states)
            say(
                f"full precision on {sum(map(len, states))} held-out molecules; {len(todo)} recipes to measure"
            )
        for k, recipe in enumerate(todo):
            if time.monotonic() - BEGAN > a.limit:
                say(f"{len(todo) - k} recipes not begun")
                break
            with told(recipe.name, failed):
                board.keep(judge(recipe, board, states, wanted))
                say(f"{k + 1} of {len(todo)}: {recipe.name}")
        if a.samples:
            failed += sample([name for name in asked if name not in failed], book, board, a.limit)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
