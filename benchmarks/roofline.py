"""What the kernels of a step do, how long they take, and the picture of it.

Run: PYTHONPATH=. python benchmarks/roofline.py [results/engine-<hardware>.json]   draws engine-roofline.png beside it again

Guarantees: operations and bytes are the algorithm's (kernels/*.cu write them at their heads), not counters of the
chip; times are of launches in their place in a step, so the caches hold what they hold there.
Knows nothing of: files of results.
"""

import argparse
import json
import re
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch

from bitdgdm.kernels.denoise import Denoiser
from bitdgdm.models.digress_config import QM9_NO_H
from bitdgdm.models.sampler import start_chain

# the most measured on one H200: bf16 by cuBLAS, s8 by mma.sync, e4m3, device copy
BF16, INT8, FP8, COPY = 694e12, 1272e12, 1519e12, 4.23e12


@dataclass(frozen=True)
class Point:
    """One kernel: median seconds, operations (2 a multiply-add), bytes that must move, ceiling of its arithmetic."""

    kernel: str
    seconds: float
    launches: int
    operations: float
    moved: float
    peak: float

    @property
    def share(self) -> float:
        """Of what the roof allows."""
        return max(self.operations / self.peak, self.moved / COPY) / self.seconds


# points from the mark to its text, so that neighbours don't meet
_LABEL_AT = {"node_mid": (-6, -9), "node_in": (-6, 5), "edge_ffn": (-6, -3), "edge_ffn_out": (6, 4), "node_out": (6, -6)}


def work(kernel: str, rows: int, edges: int, graphs: int, dy: int, fp8: bool) -> tuple[float, float]:
    """(multiply-adds, bytes) of one launch. fp8: edge_attend does the feed-forward net of E too."""
    y = 1344 * dy + 2 * dy * dy + 2 * dy * 2048 + 1024 * dy
    table = {
        "edge_attend": ((65_536 if fp8 else 49_152) * edges, 256 * edges + 2048 * rows),
        "edge_ffn": (16_384 * edges, 256 * edges),
        "edge_ffn_out": (25_600 * edges, 160 * edges),
        "node_mid": (393_216 * rows, 3_072 * rows),
        "node_in": (266_240 * rows, 2_080 * rows),
        "node_out": (266_240 * rows, 1_088 * rows),
        "pool": (0, 512 * rows + 128 * edges + 2560 * graphs),
        "graph_in": (2 * 128 * dy * graphs + 1024 * dy * graphs, (32 + 2048 + 2 * dy) * graphs),
        "graph_mid": (y * graphs, (2560 + 2048 + 4 * dy) * graphs),
        "embed": (0, 129 * edges),
        "sample": (0, 96 * edges / 2 + 64 * rows),
    }
    macs, moved = table.get(kernel, (0, 0))
    return float(macs), float(moved)


def ceiling(kernel: str, int8: bool, fp8: bool) -> float:
    """Operations a second of the formats that a kernel multiplies in."""
    if fp8 and kernel == "edge_attend":  # scores in f16, e_out and the feed-forward net in e4m3, as many
        return 2 / (1 / BF16 + 1 / FP8)
    if fp8 and kernel.startswith(("node", "edge_ffn")):
        return FP8
    return INT8 if int8 and kernel.startswith("node") else BF16


def time_kernels(batch: Denoiser, runs: int = 5) -> list[Point]:
    """Time every launch of a step in its place. The state of the batch is spent."""
    device, shape = batch.launcher, batch.network.shape
    n = batch.layout.graphs[:, 1].double()
    rows, edges, graphs = int(n.sum()), int((n * n).sum()), batch.layout.count
    inner, marks = device.launch, []

    def marked(source, kernel, *rest):  # type: ignore[no-untyped-def]
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        inner(source, kernel, *rest)
        b.record()
        marks.append((kernel, a, b))

    with device.stream():  # type: ignore[attr-defined]
        device.launch = marked  # type: ignore[method-assign]
        try:
            for _ in range(runs + 1):
                batch.step.fill_(1)
                batch.forward()
                batch.draw()
            torch.cuda.synchronize()
        finally:
            device.launch = inner  # type: ignore[method-assign]
    per_step = len(marks) // (runs + 1)
    times: dict[str, list[float]] = {}
    for kernel, a, b in marks[per_step:]:
        times.setdefault(kernel, []).append(a.elapsed_time(b) / 1000)
    points = []
    for kernel, found in times.items():
        macs, moved = work(kernel, rows, edges, graphs, shape.dy, batch.network.fp8)
        peak = ceiling(kernel, getattr(batch.network, "int8", False), batch.network.fp8)
        points.append(Point(kernel, statistics.median(found), len(found) // runs, 2 * macs, moved, peak))
    return points


def draw_roofline(points: dict[str, list[Point]], path: Path) -> None:
    """Write the picture: operations a byte against operations a second, a mark a kernel, a colour an engine."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.4), dpi=110)
    x = [30, 2000]
    for peak, name in ((BF16, "bf16"), (FP8, "e4m3")):
        knee = peak / COPY
        axes.plot([x[0], knee, x[1]], [x[0] * COPY / 1e12, peak / 1e12, peak / 1e12], color="0.6", lw=1)
        axes.text(x[1], peak / 1e12 * 1.06, f"{name} {peak / 1e12:.0f} T/s", ha="right", fontsize=7, color="0.35")
    for colour, (engine, found) in zip(("C0", "C1", "C2", "C3"), points.items(), strict=False):
        seen = [p for p in found if p.operations and p.moved]
        at = [(p.operations / p.moved, p.operations / p.seconds / 1e12) for p in seen]
        axes.scatter(*zip(*at, strict=True), color=colour, s=18, label=engine)
        if engine != next(iter(points)):
            continue
        for p, place in zip(seen, at, strict=True):
            dx, dy = _LABEL_AT.get(p.kernel, (6, -3))
            side = "left" if dx > 0 else "right"
            label = f"{p.kernel} {p.share:.0%}"
            axes.annotate(label, place, (dx, dy), textcoords="offset points", ha=side, fontsize=7, color=colour)
    axes.set(xscale="log", yscale="log", xlim=x, ylim=(30, 2200), xlabel="operations a byte that must move", ylabel="T operations/s")
    axes.legend(fontsize=7, loc="lower right")
    axes.grid(alpha=0.2)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def stored_points(results: Path, size: int = 8192, seed: int = 20261123) -> dict[str, list[Point]]:
    """The points of every engine in a result file of benchmarks/engine.py, QM9; ids and seed as there."""
    n = start_chain(QM9_NO_H, seed, torch.arange(size), 500).n.double()
    rows, edges = int(n.sum()), int((n * n).sum())
    name = re.compile(rf"QM9, {size} molecules, (.+), (\w+) x (\d+)$")
    points: dict[str, list[Point]] = {}
    for r in json.loads(results.read_text()):
        found = name.match(r["case"])
        if found is None or r["metric"] != "kernel":
            continue
        engine, kernel, launches = found[1], found[2], int(found[3])
        macs, moved = work(kernel, rows, edges, size, QM9_NO_H.hidden_dims.dy, "fp8" in engine)
        peak = ceiling(kernel, "rtn-w8a8" in engine, "fp8" in engine)
        points.setdefault(engine, []).append(Point(kernel, r["value"] / 1e6, launches, 2 * macs, moved, peak))
    return points


def main() -> None:
    """Draw the picture of a result file."""
    results = Path(__file__).resolve().parent / "results"
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("file", type=Path, nargs="?", default=results / "engine-nvidia-h200.json")
    a = p.parse_args()
    draw_roofline(stored_points(a.file), a.file.with_name("engine-roofline.png"))


if __name__ == "__main__":
    main()
