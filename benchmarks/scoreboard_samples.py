"""The samples of the scoreboard: drawn by what computes a recipe here, judged while the next recipe is drawn.

Guarantees: the same ids and seed for every recipe; a row says what computed it.
Knows nothing of: KL, artifacts' sizes, the options of the command.
"""

import multiprocessing
import os
import time
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from scoreboard_board import BEGAN, MODEL, Board, make_artifact, peak_mb, say, told

from bitdgdm.models.distribution import Measure
from bitdgdm.models.divergence import held_out_states
from bitdgdm.models.engine import TorchEngine, load_engine
from bitdgdm.models.held_out import held_out_smiles
from bitdgdm.models.int4_network import FusedEdges, Int4Layer
from bitdgdm.models.novelty import BUILTIN, load_reference
from bitdgdm.models.profile import Profile
from bitdgdm.models.quality import quality
from bitdgdm.models.sampler import Graphs, sample_ids
from bitdgdm.models.seam import Engine
from bitdgdm.models.source import load_source
from bitdgdm.pipelines.measure import reference_profile
from bitdgdm.quant.linear import QuantLinear
from bitdgdm.quant.recipe import Recipe
from bitdgdm.tasks.score_unit import Scoring

FULL, FULL_KERNELS = "full-precision", "full-precision-bf16-kernels"  # pseudo-recipes, sampled only
EMULATED = "PyTorch, fake quantization"
_CHUNK = 256


def sampled_case(recipe: str, board: Board) -> str:
    return f"{recipe}, {board.samples} samples, {board.steps} steps"


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
    if board.compiled and _how(engine) == EMULATED:
        compile_layers(engine, board)
    return engine


def _how(engine: Engine) -> str:
    """What computes the samples, for people."""
    if not isinstance(engine, TorchEngine):
        return "our kernels"
    kinds = {type(m) for m in engine._network.modules()}
    if FusedEdges in kinds:
        return "a launch for a layer's edges, one for each other Linear"
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
