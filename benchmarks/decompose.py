"""How long does it take to decompose a network, with how much memory, and are CPU and GPU of one mind?

The Linears of the shipped QM9 network that feed an output, in the groups that `bitdgdm quantize` makes. On a CPU,
workers are processes of one thread each, started beforehand; processor time is the sum over them, which other work on
the machine changes less. With --device cuda one process does all groups, and the layers of some recipes are compared
with the same layers decomposed on the CPU. Memory is the peak of a fresh process that does
everything on its own (of PyTorch's allocator on a GPU). Inputs for recipes that need them are seen once, timed apart.
The solvers are timed too, without any rounding. Examples:

    python benchmarks/decompose.py --workers 1 2 --runs 5
    python benchmarks/decompose.py --device cuda
"""

import argparse
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rows import keep, row

from bitdgdm.models.calibrate import calibrate
from bitdgdm.models.digress import quantizable
from bitdgdm.models.source import SourceModel, load_source
from bitdgdm.pipelines.layer_groups import LayerGroup, layer_groups
from bitdgdm.quant.decompose import decompose_group
from bitdgdm.quant.layer_report import LayerReport
from bitdgdm.quant.low_rank import SOLVERS
from bitdgdm.quant.parts import LinearParts, merged
from bitdgdm.quant.recipe import Recipe
from bitdgdm.quant.recipe_book import get_recipe, recipes
from bitdgdm.quant.stats import LayerStats

QUESTION = "decompose"
PUBLISHED = "published: 816 s and 2.1 GB for DiGress QM9, hardware not named"
RANK, ALPHA = 16, 0.01  # of the solvers' own rows
COMPARED = ("bitdgdm-w4a4-r16-s1", "bitdgdm-svd-w4a4-r16-s1", "rtn-w4a4", "rtn-w8a8", "fp8-w8a8")

Found = dict[str, tuple[LinearParts, LayerReport]]
Stats = dict[str, LayerStats]


@cache
def model() -> SourceModel:
    return load_source("builtin:digress-qm9")


@cache
def weights(device: str) -> dict[str, torch.Tensor]:
    names = quantizable(model().config)
    return {name: model().weights[f"{name}.weight"].float().to(device) for name in names}


def one_thread() -> None:
    torch.set_num_threads(1)
    weights("cpu")


def one_group(group: LayerGroup, stats: list[LayerStats] | None, device: str = "cpu") -> tuple[Found, float]:
    """Parts and reports, and seconds of processor time."""
    began = time.process_time()
    found = decompose_group([weights(device)[name] for name in group.names], group.recipe, stats)
    return dict(zip(group.names, found, strict=True)), time.process_time() - began


def work(recipe: Recipe, stats: Stats) -> list[tuple[LayerGroup, list[LayerStats] | None]]:
    return [
        (g, [stats[name] for name in g.names] if g.recipe.needs_calibration else None)
        for g in layer_groups(weights("cpu"), recipe)
    ]


def in_pool(recipe: Recipe, stats: Stats, pool: ProcessPoolExecutor) -> tuple[Found, float]:
    done: Found = {}
    busy = 0.0
    for found, seconds in pool.map(one_group, *zip(*work(recipe, stats), strict=True)):
        done |= found
        busy += seconds
    return done, busy


def here(recipe: Recipe, stats: Stats, device: str) -> Found:
    done: Found = {}
    for group, seen in work(recipe, stats):
        done |= one_group(group, seen, device)[0]
    return done


def inputs(choice: str, device: str) -> Stats:
    return calibrate(model(), quantizable(model().config), choice=choice, device=device)


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Wall seconds, with what a GPU still has to do, and the result."""
    began = time.perf_counter()
    result = call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began, result


def solver_rows(device: str, runs: int, enough_s: float) -> list[dict[str, Any]]:
    """Seconds of each solver over all layers, in the same groups, and what it leaves."""
    rows = []
    plain = get_recipe("rtn-w8a8")
    batches = [
        torch.stack([weights(device)[n] for n in g.names]) for g in layer_groups(weights("cpu"), plain)
    ]
    for name, solve in SOLVERS.items():

        def all_groups(solve: Callable[..., Any] = solve) -> list[Any]:
            return [solve(w, RANK, ALPHA) for w in batches]

        seconds: list[float] = []
        busy: list[float] = []
        while len(seconds) < runs and sum(seconds) < enough_s:
            began = time.process_time()
            took, found = timed(all_groups)
            seconds.append(took)
            busy.append(time.process_time() - began)
        left = [
            float(one)
            for w, f in zip(batches, found, strict=True)
            for one in (w - f.left @ f.right.mT - f.sparse).flatten(1).norm(dim=1) / w.flatten(1).norm(dim=1)
        ]
        where = "one GPU" if device == "cuda" else f"{torch.get_num_threads()} thread"
        case = f"solver {name}, rank {RANK}, alpha {ALPHA:.0%}, {len(left)} Linears, {where}"
        rows.append(row(QUESTION, case, "wall time", seconds, "s"))
        if device == "cpu":
            rows.append(row(QUESTION, case, "processor time", busy, "s"))
        rows.append(
            row(QUESTION, case, "left without a remainder", statistics.median(left), "", n=len(left),
                spread=f"worst {max(left):.4f}")
        )  # fmt: skip
    return rows


def quality_rows(name: str, found: Found) -> list[dict[str, Any]]:
    reports = [report for _, report in found.values()]
    case = f"{name}, {len(reports)} Linears"
    errors = [report.relative_error for report in reports]
    stored = sum(r.stored_bits for r in reports) / sum(r.shape[0] * r.shape[1] for r in reports)
    spread = f"worst {max(errors):.4f}"
    return [
        row(QUESTION, case, "bits a weight", stored, "bit"),
        row(QUESTION, case, "relative error", statistics.median(errors), "", n=len(errors), spread=spread),
    ]


def equality_rows(name: str, here: Found, there: Found) -> list[dict[str, Any]]:
    """How many layers have the same bytes on both processors, and how far apart the others are."""
    equal, far = 0, [0.0]
    for layer, (parts, _) in here.items():
        other = there[layer][0].tensors()
        same = parts.tensors().keys() == other.keys() and all(
            t.shape == other[k].shape and torch.equal(t.view(torch.uint8), other[k].view(torch.uint8))
            for k, t in parts.tensors().items()
        )
        equal += same
        if not same:
            a, b = merged(parts), merged(there[layer][0])
            far.append(float((a - b).abs().max() / a.abs().max().clamp_min(1e-30)))
    case = f"{name}, {len(here)} Linears, GPU against CPU"
    note = "of the largest weight of the layer"
    return [
        row(QUESTION, case, "layers of equal bytes", float(equal), "layers", n=len(here)),
        row(QUESTION, case, "largest difference of a weight", max(far), "", n=len(here), spread=note),
    ]


def peak_gb(recipe: str) -> float:
    """Peak resident memory of a fresh process that decomposes every layer, interpreter and torch included."""
    command = [sys.executable, __file__, "--alone", recipe]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def seen_inputs(names: Sequence[str], device: str) -> tuple[dict[str, Stats], list[dict[str, Any]]]:
    """Statistics by choice of times, for those that some recipe asks for, and the rows of their cost."""
    found: dict[str, Stats] = {"none": {}}
    rows = []
    for choice in sorted({get_recipe(name).calibration for name in names} - {"none"}):
        took, found[choice] = timed(lambda c=choice: inputs(c, device))
        rows.append(
            row(QUESTION, f"inputs of {len(found[choice])} Linears, times {choice}", "wall time", took, "s")
        )
    return found, rows


def on_cpu(
    names: list[str], measured: list[str], workers: list[int], runs: int, enough_s: float
) -> list[dict[str, Any]]:
    one_thread()
    stats, rows = seen_inputs(names, "cpu")
    found: dict[str, Found] = {}
    for count in workers:
        wall: dict[str, list[float]] = {name: [] for name in names}
        busy: dict[str, list[float]] = {name: [] for name in names}
        with ProcessPoolExecutor(count, get_context("spawn"), one_thread) as pool:
            in_pool(get_recipe("rtn-w8a8"), {}, pool)  # start and warm up
            for _ in range(runs):
                for name in (n for n in names if sum(wall[n]) < enough_s):
                    recipe = get_recipe(name)
                    took, (found[name], used) = timed(lambda r=recipe: in_pool(r, stats[r.calibration], pool))
                    wall[name].append(took)
                    busy[name].append(used)
        for name in names:
            case = f"{name}, {len(found[name])} Linears, {count} worker{'s' * (count > 1)}"
            rows.append(row(QUESTION, case, "wall time", wall[name], "s", baseline=PUBLISHED))
            rows.append(row(QUESTION, case, "processor time", busy[name], "s"))
    for name in names:
        rows += quality_rows(name, found[name])
        if name in measured:
            case = f"{name}, {len(found[name])} Linears, 1 worker"
            rows.append(row(QUESTION, case, "peak memory", peak_gb(name), "GB", baseline=PUBLISHED))
    return rows


def on_gpu(
    names: list[str], compared: list[str], runs: int, enough_s: float
) -> Iterator[list[dict[str, Any]]]:
    """Give the rows of one recipe after the other: what was measured survives what comes later."""
    stats, rows = seen_inputs(names, "cuda")
    yield rows
    here(get_recipe("bitdgdm-w4a4-r16-s1"), {}, "cuda")  # start and warm up
    for name in names:
        recipe = get_recipe(name)
        torch.cuda.reset_peak_memory_stats()
        seconds: list[float] = []
        while len(seconds) < runs and sum(seconds) < enough_s:
            took, found = timed(lambda r=recipe: here(r, stats[r.calibration], "cuda"))
            seconds.append(took)
        case = f"{name}, {len(found)} Linears, one GPU"
        peak = torch.cuda.max_memory_allocated() / 1e9
        rows = [
            row(QUESTION, case, "wall time", seconds, "s", baseline=PUBLISHED),
            row(QUESTION, case, "peak memory", peak, "GB", baseline=PUBLISHED),
            *quality_rows(name, found),
        ]
        if name in compared:
            rows += equality_rows(name, found, here(recipe, stats[recipe.calibration], "cpu"))
        yield rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = [recipe.name for recipe in recipes() if recipe.weight_quantized]
    free = [recipe.name for recipe in recipes() if recipe.weight_quantized and not recipe.needs_calibration]
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--recipes", nargs="*", default=known, choices=known, metavar="NAME")
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2], help="CPU processes")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument(
        "--enough", type=float, default=20.0, metavar="SECONDS", help="no more runs of what took this long"
    )
    parser.add_argument(
        "--compare", nargs="*", default=list(COMPARED), choices=known, metavar="NAME", help="GPU with CPU"
    )
    parser.add_argument(
        "--memory", nargs="*", default=list(COMPARED), choices=free, metavar="NAME", help="CPU peak of these"
    )
    parser.add_argument("--busy", action="store_true", help="the machine does other work: no wall times")
    parser.add_argument("--no-solvers", action="store_true", help="leave out the solvers' own rows")
    parser.add_argument("--alone", choices=known, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.alone:
        one_thread()
        here(get_recipe(a.alone), {}, "cpu")
        # not ru_maxrss, which a process inherits from the one that started it
        status = Path("/proc/self/status").read_text()
        print(int(re.findall(r"VmHWM:\s+(\d+)", status)[0]) / 1e6)
        return
    if a.device == "cpu" and torch.cuda.is_available():
        parser.error("rows would carry the name of the GPU; hide it: CUDA_VISIBLE_DEVICES= python ...")
    if a.device == "cuda":
        parts = on_gpu(a.recipes, a.compare, a.runs, a.enough)
    else:
        parts = iter([on_cpu(a.recipes, a.memory, a.workers, a.runs, a.enough)])
    for rows in parts:
        keep(QUESTION, [r for r in rows if not (a.busy and r["metric"] == "wall time")])
    if not a.no_solvers:
        if a.device == "cpu":
            one_thread()
        rows = solver_rows(a.device, a.runs, a.enough)
        keep(QUESTION, [r for r in rows if not (a.busy and r["metric"] == "wall time")])


if __name__ == "__main__":
    main()
