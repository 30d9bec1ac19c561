"""How fast does one GPU generate molecules, against what, and what bounds it?

Run: PYTHONPATH=. python benchmarks/engine.py --results DIR [--parts speed end ...]   (needs a GPU, nvcc, PyCUDA, RDKit)
Writes DIR/engine-<hardware>.json and DIR/engine-roofline.png; without --results beside this script.

speed    device time of a step of 8,192 molecules: PyTorch eager with its own features; eager and torch.compile + CUDA
         graph with our features kernel; our engines. All in bf16 weights and activations unless named otherwise. Also
         peak device memory and the roofline.
end      ids to SMILES, decoding on all cores while the GPU works; quality of what was made
best     valid and distinct molecules a second by the number of denoising steps
latency  one molecule and 32, T = 500
moses    the dims of MOSES (random weights, 12 layers, n from its histogram)
"""

import argparse
import gc
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain as joined
from pathlib import Path
from statistics import median
from typing import Any

import torch
from campaign import wilson
from decode_pool import DecodePool, Smiles
from engine_cases import OURS, moses_config, network_bf16, our_engines
from roofline import Point, draw_roofline, time_kernels
from rows import RESULTS, keep, row
from torch import nn
from torch_chain import TorchChain, captured, seconds_a_step

from bitdgdm.kernels.step_graph import step as kernel_step
from bitdgdm.kernels.step_graph import warm_up
from bitdgdm.models.digress import GraphTransformer
from bitdgdm.models.digress_config import QM9_NO_H
from bitdgdm.models.kernel_engine import KernelEngine
from bitdgdm.models.sampler import sample_batches, sample_ids, start_chain

QUESTION, SEED = "engine", 20261123
BATCH, T = 8192, 500
LONG = 8.0  # seconds after which a long run is not repeated any more
EAGER = "PyTorch eager bf16, our features kernel"
COMPILED = "torch.compile bf16 + CUDA graph, our features kernel"
OWN_FEATURES = "PyTorch eager bf16, its own features"
PARTS = ("speed", "end", "best", "latency", "moses")
BEGAN = time.monotonic()


@dataclass
class Bench:
    """What the parts share. engines: ours, bf16 first. rates: molecules a second of each case, T = 500."""

    engines: dict[str, KernelEngine]
    pool: DecodePool
    runs: int
    results: Path
    every: bool
    rates: dict[str, float]

    def keep(self, *rows: dict[str, Any]) -> None:
        """Write rows at once: what was measured survives what comes later."""
        keep(QUESTION, rows, self.results)


def say(text: str) -> None:
    print(f"[{time.monotonic() - BEGAN:6.1f} s] {text}", flush=True)


def our_step(engine: KernelEngine, size: int, steps: int, runs: int) -> list[float]:
    """Device seconds of a step of ours, captured; its time starts anew in each run."""
    batch = engine.batch(start_chain(engine.config, SEED, torch.arange(size, device=engine.device), T))
    found = []
    with torch.inference_mode(), batch.launcher.stream() as stream:
        warm_up(batch)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            kernel_step(batch)
        for _ in range(runs):
            batch.step.zero_()
            found += seconds_a_step(graph.replay, steps, 1)
    return found


def baseline_step(
    engine: KernelEngine, network: nn.Module, size: int, steps: int, runs: int, *, features: bool = True, compiled: bool = False
) -> list[float]:
    """Device seconds of a PyTorch step, network in bf16. features: ours."""
    chain = start_chain(engine.config, SEED, torch.arange(size, device=engine.device), T)
    batch = engine.batch(chain) if features else None
    found = []
    with torch.inference_mode(), (batch.launcher.stream() if batch else nullcontext()) as stream:
        torch_chain = TorchChain(network, engine.config, chain, batch, compiled)
        step = captured(torch_chain.step, stream) if compiled else torch_chain.step
        for _ in range(runs):
            torch_chain.k.zero_()
            found += seconds_a_step(step, steps, 1)
    return found


def peak_memory(call: Callable[[], object]) -> float:
    """MiB that PyTorch's allocator holds at most during `call`, on top of what it holds before."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def agreement(engine: KernelEngine, network: nn.Module, size: int, steps: int) -> float:
    """Share of node classes on which the eager baseline and ours agree after some steps: they run the same chain."""
    chain = start_chain(engine.config, SEED, torch.arange(size, device=engine.device), T)
    batch = engine.batch(chain)
    with torch.inference_mode():
        with batch.launcher.stream():  # type: ignore[attr-defined]
            eager = TorchChain(network, engine.config, chain, batch)
            for _ in range(steps):
                eager.step()
        ours = engine.batch(chain)
        with ours.launcher.stream():  # type: ignore[attr-defined]
            for _ in range(steps):
                kernel_step(ours)
        torch.cuda.synchronize()
        return float((ours.x == eager.x)[eager.mask].float().mean())


def speed(b: Bench) -> None:
    """Device time of one step of every case, and memory."""
    first, network = b.engines[OURS], network_bf16()
    say(f"eager and ours agree on {agreement(first, network, 512, 3):.4%} of the nodes after 3 steps")
    seconds: dict[str, list[float]] = {}
    memory: dict[str, float] = {}

    def eager(features: bool) -> None:
        name = EAGER if features else OWN_FEATURES
        seconds[name] = baseline_step(first, network, BATCH, 6, b.runs, features=features)

    eager(True)
    memory[OWN_FEATURES] = peak_memory(lambda: eager(False))  # the other holds buffers of our kernels too
    say("eager done")
    for name, engine in b.engines.items():
        chain_of = lambda engine=engine: sample_ids(engine, engine.config, SEED, 0, BATCH, 2, BATCH)  # noqa: E731
        memory[name] = peak_memory(chain_of)
    for _ in range(b.runs):  # in turn
        for name, engine in b.engines.items():
            seconds.setdefault(name, []).extend(our_step(engine, BATCH, 20, 1))
    say("ours done")
    seconds[COMPILED] = baseline_step(first, network, BATCH, 10, b.runs, compiled=True)
    say("torch.compile done")
    b.rates |= {name: BATCH / (T * median(found)) for name, found in seconds.items()}
    case, weights = f"QM9, {BATCH} molecules", 2 * sum(p.numel() for p in network.parameters()) / 2**20
    for name, found in seconds.items():
        b.keep(
            row(QUESTION, f"{case}, {name}", "step", [1e3 * s for s in found], "ms"),
            row(QUESTION, f"{case}, {name}", "molecules/s, device only", [BATCH / (T * s) for s in found], "1/s"),
        )
        for baseline in (OWN_FEATURES, EAGER, COMPILED, OURS):
            if name != baseline and name.startswith("our"):
                times = b.rates[name] / b.rates[baseline]
                b.keep(row(QUESTION, f"{case}, {name}", f"times {baseline}", times, "x", baseline=baseline))
    for name, used in memory.items():
        used += weights  # of the weights, which each of them holds once in 16 bit or less
        b.keep(row(QUESTION, f"{case}, {name}", "peak device memory", used, "MiB"))
        if name.startswith("our"):
            share = used / (memory[OWN_FEATURES] + weights)
            b.keep(row(QUESTION, f"{case}, {name}", f"peak memory of {OWN_FEATURES}", share, "x", baseline=OWN_FEATURES))
    roofline(b)


def roofline(b: Bench) -> None:
    """Every kernel in its place in a step."""
    points: dict[str, list[Point]] = {}
    for name, engine in b.engines.items():
        batch = engine.batch(start_chain(engine.config, SEED, torch.arange(BATCH, device=engine.device), T))
        with torch.inference_mode():
            points[name] = time_kernels(batch)
        for p in points[name]:
            case = f"QM9, {BATCH} molecules, {name}, {p.kernel} x {p.launches}"
            b.keep(
                row(QUESTION, case, "kernel", 1e6 * p.seconds, "us"),
                row(QUESTION, case, "of the roof", 100 * p.share, "%", baseline="mma.sync and copy rates"),
            )
    draw_roofline(points, b.results / "engine-roofline.png")


def campaign(engine: KernelEngine, pool: DecodePool, first_id: int, count: int, steps: int) -> tuple[float, Smiles]:
    """Seconds from ids to SMILES, and these."""
    began = time.monotonic()
    waiting: list[Future[Smiles]] = []
    for _, graphs in sample_batches(engine, engine.config, SEED, first_id, count, steps, BATCH):
        waiting += pool.submit(graphs.n.numpy(), graphs.X.numpy(), graphs.E.numpy())
    smiles = list(joined.from_iterable(done.result() for done in waiting))
    return time.monotonic() - began, smiles


def end(b: Bench) -> None:
    """Ids to SMILES at T steps; engines in turn, every run its own ids."""
    count = 4 * BATCH
    runs: dict[str, list[float]] = {name: [] for name in b.engines}
    smiles: dict[str, Smiles] = {name: [] for name in b.engines}
    for k in range(b.runs):
        for name, engine in b.engines.items():
            if k > 1 and name != OURS:  # `speed` compares the engines; here they show their quality
                continue
            seconds, found = campaign(engine, b.pool, k * count, count, T)
            runs[name].append(count / seconds)
            smiles[name] += found
    say("end to end done")
    for name, rates in runs.items():
        case = f"QM9 ids to SMILES, T={T}, batches of {BATCH}, {b.pool.size} decoding processes, {name}"
        b.keep(row(QUESTION, case, "molecules/s", rates, "1/s"))
        for baseline in (OWN_FEATURES, EAGER, COMPILED):
            if baseline in b.rates:  # of their device time alone, which favours them
                b.keep(row(QUESTION, case, f"times {baseline}", median(rates) / b.rates[baseline], "x", baseline=baseline))
        b.keep(*quality(f"QM9, T={T}, {name}", smiles[name]))


def quality(case: str, smiles: Smiles) -> Sequence[dict[str, Any]]:
    """Validity of all, uniqueness of the first 10,000 (it falls with their number)."""
    valid = sum(s is not None for s in smiles)
    few = [s for s in smiles[:10_000] if s is not None]
    distinct = len(set(few))
    return (
        row(QUESTION, case, "validity", 100 * valid / len(smiles), "%", spread=wilson(valid, len(smiles)), n=len(smiles)),
        row(QUESTION, case, "uniqueness", 100 * distinct / len(few), "%", spread=wilson(distinct, len(few)), n=len(few)),
    )


def best(b: Bench, candidates: Sequence[int], ids: int) -> None:
    """Scan the number of steps; then the fastest with 99 % validity on `ids` molecules."""
    for name, engine in b.engines.items():
        if name != OURS and not b.every:
            continue
        good = []
        for steps in sorted(candidates):
            seconds, found = campaign(engine, b.pool, 0, 2 * BATCH, steps)
            valid = [s for s in found if s is not None]
            case = f"QM9 ids to SMILES, {steps} steps, {name}"
            b.keep(
                row(QUESTION, case, "molecules/s", len(found) / seconds, "1/s", n=len(found)),
                row(QUESTION, case, "validity", 100 * len(valid) / len(found), "%", spread=wilson(len(valid), len(found)), n=len(found)),
                row(QUESTION, case, "uniqueness", 100 * len(set(valid)) / len(valid), "%", n=len(valid)),
            )
            good += [steps] if len(valid) >= 0.99 * len(found) else []
        say(f"{name}: validity of 99 % at {good} steps")
        for steps in good:
            seconds, found = campaign(engine, b.pool, 0, ids, steps)
            valid = [s for s in found if s is not None]
            times = [seconds]
            while len(valid) >= 0.99 * ids and len(times) < b.runs and sum(times) < LONG:
                times.append(campaign(engine, b.pool, 0, ids, steps)[0])
            case = f"QM9, {ids} ids, {steps} steps (fewest with 99 % validity), {name}"
            b.keep(
                row(QUESTION, case, "valid and distinct molecules/s", [len(set(valid)) / s for s in times], "1/s"),
                row(QUESTION, case, "validity", 100 * len(valid) / ids, "%", spread=wilson(len(valid), ids), n=ids),
                row(QUESTION, case, "distinct of valid", 100 * len(set(valid)) / len(valid), "%", n=len(valid)),
            )
            if len(valid) >= 0.99 * ids:
                break


def latency(b: Bench) -> None:
    """Wall time of a small batch; the baseline's is 40 steps times T / 40."""
    first, network = b.engines[OURS], network_bf16()
    for size in (1, 32):
        eager = [T * s for s in baseline_step(first, network, size, 40, b.runs)]
        case = f"QM9, batch of {size}, T={T}"
        b.keep(row(QUESTION, f"{case}, {EAGER}", "latency", eager, "s"))
        for name, engine in b.engines.items():
            found = []
            for _ in range(b.runs):
                began = time.monotonic()
                sample_ids(engine, engine.config, SEED, 0, size, T, BATCH)
                found.append(time.monotonic() - began)
            b.keep(
                row(QUESTION, f"{case}, {name}", "latency", found, "s"),
                row(QUESTION, f"{case}, {name}", f"times {EAGER}", median(eager) / median(found), "x", baseline=EAGER),
            )


def moses(b: Bench, compiled: bool) -> None:
    """Random weights: the graphs mean nothing, so they aren't decoded."""
    config = moses_config()
    torch.manual_seed(SEED)
    network = GraphTransformer(config).eval().requires_grad_(False)
    engine = KernelEngine(network, config, "moses dims")
    case = f"MOSES dims, n from its histogram (mean {sum(i * p for i, p in enumerate(config.n_nodes)):.1f}), random weights"
    best: tuple[float, int] = (0.0, 0)
    for size in (4096, 8192):
        steps = our_step(engine, size, 20, b.runs)
        rates = [size / (T * s) for s in steps]
        b.keep(row(QUESTION, f"{case}, {size} molecules, {OURS}", "molecules/s, device only", rates, "1/s"))
        best = max(best, (median(rates), size))
    ours_rate, size = best
    ours = f"{case}, {size} molecules, {OURS}"
    began = time.monotonic()
    sample_ids(engine, config, SEED, 0, size, T, size)
    b.keep(row(QUESTION, ours, f"molecules/s, ids to graphs, T={T}", size / (time.monotonic() - began), "1/s", n=1))
    batch = engine.batch(start_chain(config, SEED, torch.arange(size, device=engine.device), T))
    with torch.inference_mode():
        for p in time_kernels(batch):
            b.keep(row(QUESTION, f"{ours}, {p.kernel} x {p.launches}", "kernel", 1e6 * p.seconds, "us"))
    say("MOSES dims, ours done")
    bf16 = network.to("cuda", torch.bfloat16)
    for name, few, flag in ((EAGER, 4, False), (COMPILED, 4, True)):
        if flag and not compiled:
            continue
        found = baseline_step(engine, bf16, 1024, few, b.runs, compiled=flag)
        rates = [1024 / (T * s) for s in found]
        b.keep(
            row(QUESTION, f"{case}, 1024 molecules padded to {config.n_pad}, {name}", "molecules/s, device only", rates, "1/s"),
            row(QUESTION, ours, f"times {name}", ours_rate / median(rates), "x", baseline=name),
        )


def main() -> None:
    """Parse the options and run the parts."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    p.add_argument("--runs", type=int, default=5)
    p.add_argument("--steps", type=int, nargs="+", default=[15, 25, 35, 50, 100, 250], help="numbers of steps to scan")
    p.add_argument("--recipes", nargs="*", default=["fp8-one-w8a8", "gptq-fp8-one-w4a8"], help="quantized engines beside bf16")
    p.add_argument("--ids", type=int, default=100_000, help="molecules at the best number of steps")
    p.add_argument("--every", action="store_true", help="scan the number of steps for the quantized engines too")
    p.add_argument("--compile-moses", action="store_true", help="torch.compile for MOSES dims too (a minute)")
    p.add_argument("--results", type=Path, default=RESULTS)
    a = p.parse_args()
    a.results.mkdir(parents=True, exist_ok=True)
    pool = DecodePool(QM9_NO_H)
    engines = our_engines(a.recipes, say)
    for engine in engines.values():  # build and load every kernel
        sample_ids(engine, engine.config, SEED, 0, 64, 2, 64)
    pool.warm_up()
    say(f"ready: {', '.join(engines)}")
    b = Bench(engines, pool, a.runs, a.results, a.every, {})
    run = {
        "speed": lambda: speed(b), "end": lambda: end(b), "best": lambda: best(b, a.steps, a.ids),
        "latency": lambda: latency(b), "moses": lambda: moses(b, a.compile_moses),
    }  # fmt: skip
    failed = []
    for part in a.parts:
        try:
            run[part]()
            say(f"{part} done")
        except Exception:  # noqa: BLE001 - a broken part must not cost the others their GPU time
            traceback.print_exc()
            failed.append(part)
    pool.close()
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
