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
import statistics
import tempfile
import time
from pathlib import Path

import torch
from rows import RESULTS, results_file
from scoreboard_board import BEGAN, MARK, MODEL, QUESTION, Board, make_artifact, mark_of, peak_mb, say, told
from scoreboard_samples import FULL, FULL_KERNELS, sample

from bitdgdm.infra.rows import Row, read_rows
from bitdgdm.models.divergence import Predictions, States, divergence, held_out_states, predict
from bitdgdm.models.engine import load_engine
from bitdgdm.models.source import load_source
from bitdgdm.pipelines.measure import BITS, HELD_OUT, SIZE, divergence_rows
from bitdgdm.quant.artifact import read_header
from bitdgdm.quant.recipe import Recipe
from bitdgdm.quant.recipe_book import open_recipe, recipes


def judge(recipe: Recipe, board: Board, states: list[States], wanted: Predictions) -> list[Row]:
    """Everything that needs no samples."""
    path, seconds, peak = make_artifact(recipe, board)
    header, row = read_header(path), board.rows_of(recipe.name)
    errors = [r.relative_error for r in header.layers.values()]
    where = "of the GPU" if board.device == "cuda" else "of the process"
    found = [
        row(MARK, recipe.version, "", n=1, spread=mark_of(recipe)),
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
            a.device, a.molecules, a.samples, a.steps, a.seed, a.results, folder, a.again, a.compile, a.tables, files,
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
