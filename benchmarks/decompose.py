"""How long does it take to decompose a network, with how much memory, and how close are the parts?

Every layer Linear of the shipped QM9 network, the seven that feed nothing included (198 as in the paper). The recipes
take turns; workers are processes of one thread each, started beforehand. Memory is the peak of a fresh process that
decomposes everything on its own. Example:

    python benchmarks/decompose.py --workers 1 2 --runs 5
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context

import torch
from rows import keep, row

from bitdgdm.models.digress import dead, layer_linears
from bitdgdm.models.source import load_source
from bitdgdm.quant.decompose import decompose
from bitdgdm.quant.layer_report import LayerReport
from bitdgdm.quant.recipe_book import get_recipe, recipes

QUESTION = "decompose"
PUBLISHED = "published: 816 s and 2.1 GB for DiGress QM9, hardware not named"


@cache
def weights() -> dict[str, torch.Tensor]:
    """The layer Linears of the shipped network, largest first (so that the workers end together)."""
    source = load_source("builtin:digress-qm9")
    found = {name: source.weights[f"{name}.weight"].float() for name in layer_linears(source.config)}
    return dict(sorted(found.items(), key=lambda item: -item[1].numel()))


def one_thread() -> None:
    torch.set_num_threads(1)
    weights()


def one_layer(name: str, recipe: str) -> tuple[str, LayerReport]:
    return name, decompose(weights()[name], get_recipe(recipe))[1]


def all_layers(recipe: str, pool: ProcessPoolExecutor) -> tuple[float, dict[str, LayerReport]]:
    """Return (wall seconds, report by name)."""
    names = list(weights())
    began = time.perf_counter()
    reports = dict(pool.map(one_layer, names, [recipe] * len(names), chunksize=2))
    return time.perf_counter() - began, reports


def peak_gb(recipe: str) -> float:
    """Peak resident memory of a fresh process that decomposes every layer, interpreter and torch included."""
    command = [sys.executable, __file__, "--alone", recipe]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def measure(names: list[str], workers: list[int], runs: int) -> list[dict]:
    rows = []
    unused = set(dead(load_source("builtin:digress-qm9").config))
    for count in workers:
        with ProcessPoolExecutor(count, get_context("spawn"), one_thread) as pool:
            list(
                pool.map(one_layer, list(weights())[: 4 * count], ["rtn-w8a8"] * 4 * count)
            )  # start and warm up
            seconds: dict[str, list[float]] = {name: [] for name in names}
            reports: dict[str, dict[str, LayerReport]] = {}
            for _ in range(runs):
                for name in names:
                    took, reports[name] = all_layers(name, pool)
                    seconds[name].append(took)
        for name in names:
            case = f"{name}, {len(reports[name])} Linears, {count} worker{'s' * (count > 1)}"
            rows.append(row(QUESTION, case, "wall time", seconds[name], "s", baseline=PUBLISHED))
    for name in names:
        live = [report for layer, report in reports[name].items() if layer not in unused]
        case = f"{name}, {len(live)} Linears that feed an output"
        errors = [report.relative_error for report in live]
        stored = sum(report.stored_bits for report in live) / sum(r.shape[0] * r.shape[1] for r in live)
        rows.append(row(QUESTION, case, "bits a weight", stored, "bit"))
        rows.append(
            row(QUESTION, case, "relative error", statistics.median(errors), "", n=len(live),
                spread=f"worst {max(errors):.4f}")
        )  # fmt: skip
        case = f"{name}, {len(weights())} Linears, 1 worker"
        rows.append(row(QUESTION, case, "peak memory", peak_gb(name), "GB", baseline=PUBLISHED))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = [recipe.name for recipe in recipes() if recipe.weight_quantized]
    parser.add_argument("--recipes", nargs="+", default=known, choices=known)
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--alone", choices=known, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.alone:
        one_thread()
        for name in weights():
            one_layer(name, a.alone)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)
        return
    print(keep(QUESTION, measure(a.recipes, a.workers, a.runs)))


if __name__ == "__main__":
    main()
