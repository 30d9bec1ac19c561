"""Do the kernels give what torch gives, and what does each cost? One call on a GPU, QM9, the shipped weights.

Run: python benchmarks/kernels_smoke.py --out DIR [--part PART]   (needs a GPU, nvcc and PyCUDA)
Writes DIR/kernels_PART.json: checks, microseconds a kernel, molecules a second; DIR/graphs.npz: 8,192 graphs.
Parts: main (the kernels of the GPU; all checks; whole runs), others (kernels of any GPU, 8-bit nodes: kernel times, logits),
pair (node kernels whose blocks share weights), build (compile everything at once), tiny (three graphs, two steps: small
enough for compute-sanitizer), profile (one forward pass, for ncu).
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from safetensors.torch import load_file

from bitdgdm.kernels.build import build
from bitdgdm.kernels.denoise import Denoiser, Noise
from bitdgdm.kernels.launch import Device
from bitdgdm.kernels.network import Integers, Network, Shape, prepare
from bitdgdm.kernels.step_graph import denoise, open_device, warm_up
from bitdgdm.models.digress import GraphTransformer
from bitdgdm.models.digress import build as build_net
from bitdgdm.models.digress_config import QM9_NO_H as CONFIG
from bitdgdm.models.features import network_input
from bitdgdm.models.noise import cosine_schedule, posterior, posterior_table, steps
from bitdgdm.models.philox import count_slot, edge_slots, node_slots, philox
from bitdgdm.quant.rounding import round_weights

WEIGHTS = Path(__file__).resolve().parents[1] / "models" / "data" / "digress_qm9.safetensors"
N_PAD, SEED = CONFIG.n_pad, 20261123
ROWS, COLS = torch.triu_indices(N_PAD, N_PAD, 1)
SOURCES = ("edge_attend", "edge_ffn", "edge_ffn_wg", "edge_wg", "features", "graph_path", "node", "node_wg", "node_wg_s8", "sample")
Parts = Iterator[tuple[str, Callable[[], object]]]
RESULT: dict[str, object] = {"checks": {}, "kernels_us": {}, "rates": {}}


def draw(weights: Tensor, u: Tensor) -> Tensor:
    total = weights.cumsum(-1)
    return (total[..., :-1] < (u.to(weights.dtype) * total[..., -1])[..., None]).sum(-1)


def noise_tables(n_steps: int) -> Noise:
    times, schedule = steps(CONFIG.diffusion_steps, n_steps), cosine_schedule(CONFIG.diffusion_steps)

    def stack(m: tuple[float, ...]) -> Tensor:
        pairs = itertools.pairwise(times)
        return torch.from_numpy(np.stack([posterior_table(schedule, np.array(m), t, s) for t, s in pairs])).float()

    return Noise(torch.tensor(times, dtype=torch.int32), stack(CONFIG.node_marginals), stack(CONFIG.edge_marginals))


def start(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """n, x, e of z_T."""

    def of(p: tuple[float, ...]) -> Tensor:
        return torch.tensor(p, dtype=torch.float64)

    n = draw(of(CONFIG.n_nodes), philox(SEED, ids, CONFIG.diffusion_steps, torch.tensor(count_slot(N_PAD))))
    slots = torch.cat((node_slots(N_PAD), edge_slots(N_PAD, ROWS, COLS)))
    u = philox(SEED, ids[:, None], CONFIG.diffusion_steps, slots)
    mask = torch.arange(N_PAD) < n[:, None]
    x = draw(of(CONFIG.node_marginals), u[:, :N_PAD]) * mask
    e = torch.zeros(len(ids), N_PAD, N_PAD, dtype=torch.int64)
    e[:, ROWS, COLS] = draw(of(CONFIG.edge_marginals), u[:, N_PAD:])
    return n, x, (e + e.transpose(1, 2)) * (mask[:, :, None] & mask[:, None])


def batch_of(ids: Tensor, network: Network, noise: Noise, device: object) -> Denoiser:
    n, x, e = start(ids)
    batch = Denoiser(network, noise, n, ids, SEED, device)  # type: ignore[arg-type]
    batch.x.copy_(x)
    batch.e.copy_(e)
    torch.cuda.synchronize()
    return batch


def timed(call: Callable[[], object], repeat: int = 20) -> float:
    """Median microseconds on the device, on the current stream."""
    times = []
    for _ in range(repeat):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        call()
        b.record()
        b.synchronize()
        times.append(a.elapsed_time(b) * 1000)
    return statistics.median(times)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def check(name: str, value: object, ok: bool) -> None:
    RESULT["checks"][name] = {"value": value, "ok": bool(ok)}  # type: ignore[index]
    print(f"{'ok  ' if ok else 'FAIL'} {name}: {value}", flush=True)


def check_against_torch(batch: Denoiser, net: GraphTransformer, noise: Noise, k: int) -> None:
    """Features, logits and draws of one step against the torch network and sampler, from the batch's own state."""
    dev = batch.launcher.device
    at = batch.layout
    x, e, n = batch.x.long(), batch.e.long(), at.graphs[:, 1].long()
    mask = torch.arange(N_PAD, device=dev) < n[:, None]
    pair = mask[:, :, None] & mask[:, None]
    seen = pair & ~torch.eye(N_PAD, dtype=torch.bool, device=dev) if k == 0 else pair
    X = torch.eye(4, device=dev)[x] * mask[..., None]
    E = torch.eye(5, device=dev)[e] * seen[..., None]
    t = torch.full((at.count,), int(noise.times[k]) / CONFIG.diffusion_steps, device=dev)
    plain_x = torch.full((at.count, N_PAD, 12), float("nan"), device=dev)
    plain_y = torch.full((at.count, 13), float("nan"), device=dev)
    batch.step.fill_(k)
    with batch.launcher.stream(), torch.inference_mode():  # type: ignore[attr-defined]
        batch.features(plain_x, plain_y)
        batch.forward()
        lx, le = batch.logits()
    with torch.inference_mode():
        ix, ie, iy = network_input(X, E, t, mask, CONFIG)
        worst = max(float((plain_x - ix)[mask].abs().max()), float((plain_y - iy).abs().max()))
        check(f"features, worst difference, step {k}", worst, worst < 1e-5)
        rx, re = net(ix, ie, iy, mask)
        with torch.autocast("cuda", torch.bfloat16):
            bx, be = net(ix, ie, iy, mask)
        for kind, ours, ref, low in (("X", lx, rx, bx), ("E", le, re, be)):
            mine, theirs = relative(ours, ref), relative(low.float(), ref)
            check(f"logits {kind} relative error (torch bf16 {theirs:.5f}), step {k}", mine, mine < 2 * theirs + 1e-4)
        ids, s = batch.ids, int(noise.times[k + 1])
        u = philox(SEED, ids[:, None], s, torch.cat((node_slots(N_PAD), edge_slots(N_PAD, ROWS, COLS))).to(dev))
        tx, te = noise.tables_x[k].to(dev), noise.tables_e[k].to(dev)
        want_x = draw(posterior(lx.softmax(-1), x, tx), u[:, :N_PAD]) * mask
        want_e = draw(posterior(le[:, ROWS, COLS].softmax(-1), e[:, ROWS, COLS], te), u[:, N_PAD:])
        with batch.launcher.stream():  # type: ignore[attr-defined]
            batch.draw()
        torch.cuda.synchronize()
        different = int((batch.x.long() != want_x).sum())
        different += int(((batch.e.long()[:, ROWS, COLS] != want_e) & pair[:, ROWS, COLS]).sum())
        check(f"draws that differ from torch, step {k}", different, different <= at.count * 45 // 1000)


def same_bytes(network: Network, device: object, noise: Noise) -> None:
    """Law L1: one batch, pieces of 7, one by one, shuffled, captured or not."""
    ids, n_steps = torch.arange(256), 8

    def run(part: Tensor, capture: bool = False) -> tuple[Tensor, Tensor]:
        b = batch_of(part, network, noise, device)
        denoise(b, n_steps, capture=capture)
        torch.cuda.synchronize()
        return b.x.cpu(), b.e.cpu()

    x, e = run(ids)
    again = run(ids)
    check("two runs equal", 0, torch.equal(x, again[0]) and torch.equal(e, again[1]))
    graph = run(ids, capture=True)
    check("captured graph equals launches", 0, torch.equal(x, graph[0]) and torch.equal(e, graph[1]))
    order = torch.randperm(256, generator=torch.Generator().manual_seed(1))
    mixed = run(order)
    check("shuffled equals in order", 0, torch.equal(x[order], mixed[0]) and torch.equal(e[order], mixed[1]))
    pieces = [run(part) for part in ids.split(7)]
    px, pe = (torch.cat([p[i] for p in pieces]) for i in (0, 1))
    check("batches of 7 equal one of 256", int((px != x).any(1).sum()), torch.equal(px, x) and torch.equal(pe, e))
    single = [run(ids[i : i + 1]) for i in (0, 100, 255)]
    check("batches of 1", 0, all(torch.equal(s[0][0], x[i]) for s, i in zip(single, (0, 100, 255), strict=True)))


def time_kernels(batch: Denoiser, label: str) -> None:
    """Microseconds of each launch of a step, and of the step; the state of the batch is spent."""
    device = batch.launcher
    runs: dict[str, list[float]] = {}
    launches: list[tuple[object, ...]] = []
    inner = device.launch

    def record(*args: object) -> None:
        launches.append(args)
        inner(*args)  # type: ignore[arg-type]

    with device.stream() as stream, torch.inference_mode():  # type: ignore[attr-defined]
        device.launch = record  # type: ignore[method-assign]
        batch.forward()
        batch.draw()
        device.launch = inner  # type: ignore[method-assign]
        batch.step.fill_(250)
        for args in launches[:13] + launches[-4:-1]:  # the ends of a step and the first two layers
            if args[1] != "advance":
                runs.setdefault(str(args[1]), []).append(timed(lambda args=args: inner(*args)))  # type: ignore[misc]
        warm_up(batch)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            batch.forward()
        step = timed(graph.replay, 10)
    RESULT["kernels_us"][label] = {k: round(statistics.median(v), 1) for k, v in runs.items()} | {"forward": round(step, 1)}  # type: ignore[index]
    print(label, json.dumps(RESULT["kernels_us"][label]), flush=True)  # type: ignore[index]


def same_logits(a: Denoiser, b: Denoiser, name: str, tolerance: float) -> None:
    """Two variants from one state."""
    got = []
    for batch in (a, b):
        batch.step.fill_(250)
        with batch.launcher.stream(), torch.inference_mode():  # type: ignore[attr-defined]
            batch.forward()
            got.append(batch.logits())
        torch.cuda.synchronize()
    for kind, mine, theirs in zip("XE", *got, strict=True):
        check(f"{name}: logits {kind}, relative difference", relative(mine, theirs), relative(mine, theirs) <= tolerance)


def rounded(weights: dict[str, Tensor]) -> dict[str, Integers]:
    """The Linears of the node path in 8 bit."""
    result = {}
    for name, w in weights.items():
        kind = name.removesuffix(".weight").rsplit(".", 1)[-1]
        if name.startswith("tf_layers") and kind in ("q", "k", "v", "x_out", "linX1", "linX2") and w.ndim == 2:
            codes, scale = round_weights(w, 8, "absmax")
            result[name.removesuffix(".weight")] = Integers(codes, scale.float())
    return result


def build_all(shape: Shape) -> None:
    """Every source of every part, side by side."""
    defines = {**shape.defines, "edge_attend": {"STEPS": 16}}
    jobs = [(s, defines.get(s, {})) for s in SOURCES] + [("node_wg", {**defines["node_wg"], "PAIR": 1})]
    with ThreadPoolExecutor(len(jobs)) as pool:
        list(pool.map(lambda job: build(job[0], "90a", job[1]), jobs))


def end_to_end(network: Network, device: object, noise: Noise, size: int, n_steps: int) -> Denoiser:
    ids = torch.arange(size)
    batch = batch_of(ids, network, noise, device)
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    before = time.perf_counter()
    denoise(batch, n_steps)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - before
    RESULT["rates"][f"B={size} steps={n_steps}"] = {  # type: ignore[index]
        "molecules_per_s": round(size / seconds, 1), "seconds": round(seconds, 4),
        "peak_MB": round(torch.cuda.max_memory_allocated() / 2**20), "finite": int(batch.not_finite) == 0,
    }  # fmt: skip
    print(f"B={size} steps={n_steps}: {RESULT['rates'][f'B={size} steps={n_steps}']}", flush=True)  # type: ignore[index]
    return batch


def main_part(network: Network, weights: dict[str, Tensor], noise: Noise, device: Device, out: Path) -> Parts:
    net = build_net(CONFIG, weights).to(device.device)
    small = batch_of(torch.arange(64), network, noise, device)
    with device.stream():
        warm_up(small)
    torch.cuda.synchronize()
    for k in (0, 250, 499):
        yield f"torch {k}", lambda k=k: check_against_torch(small, net, noise, k)  # type: ignore[misc]
    yield "bytes", lambda: same_bytes(network, device, noise)
    yield "kernels", lambda: time_kernels(batch_of(torch.arange(8192), network, noise, device), "hopper")
    for size in (8192, 1, 32, 1024, 16384):
        n_steps = 500 if size in (1, 32, 8192) else 50
        yield f"B={size}", lambda size=size, n=n_steps: save(end_to_end(network, device, noise, size, n), out)  # type: ignore[misc]


def others_part(network: Network, weights: dict[str, Tensor], noise: Noise, device: Device, shape: Shape) -> Parts:
    ids = torch.arange(8192)
    portable = prepare(weights, shape, device.device, hopper=False)
    int8 = prepare(weights, shape, device.device, integers=rounded(weights))
    for name, other, tolerance in (("portable", portable, 0.01), ("int8 nodes", int8, 0.03)):
        yield name, lambda o=other, n=name: time_kernels(batch_of(ids, o, noise, device), n)  # type: ignore[misc]
        a, b = (batch_of(ids[:256], n, noise, device) for n in (other, network))
        yield name, lambda a=a, b=b, n=name, t=tolerance: same_logits(a, b, n, t)  # type: ignore[misc]


def pair_part(network: Network, noise: Noise, device: Device, shape: Shape) -> Parts:
    pair = open_device(shape)
    pair.defines = {**pair.defines, "node_wg": {**pair.defines["node_wg"], "PAIR": 1}}
    a, b = (batch_of(torch.arange(1000), network, noise, d) for d in (pair, device))
    yield "pair", lambda: same_logits(a, b, "pair", 0.0)
    yield "pair", lambda: time_kernels(batch_of(torch.arange(8192), network, noise, pair), "pair")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--part", default="main")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    weights = {k: v.float() for k, v in load_file(WEIGHTS).items()}
    shape = Shape(
        CONFIG.n_layers, N_PAD, 4, 5, CONFIG.hidden_dims.dy, CONFIG.hidden_mlp_dims.y, CONFIG.hidden_dims.n_head,
        CONFIG.diffusion_steps, CONFIG.atom_weights, CONFIG.max_weight,
    )  # fmt: skip
    before = time.perf_counter()
    if options.part == "build":
        build_all(shape)
        print(f"built in {time.perf_counter() - before:.1f} s", flush=True)
        return
    device = open_device(shape)
    network = prepare(weights, shape, device.device)
    noise = noise_tables(500)
    if options.part in ("tiny", "profile"):
        batch = batch_of(torch.arange(3 if options.part == "tiny" else 8192), network, noise, device)
        if options.part == "tiny":
            denoise(batch, 2, capture=False)
        else:
            batch.forward()
        torch.cuda.synchronize()
        print("finished, finite:", int(batch.not_finite) == 0)
        return
    RESULT["gpu"], RESULT["torch"] = torch.cuda.get_device_name(), torch.__version__
    asked = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm", "--format=csv,noheader"]
    RESULT["driver"] = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    parts = {
        "main": lambda: main_part(network, weights, noise, device, options.out),
        "others": lambda: others_part(network, weights, noise, device, shape),
        "pair": lambda: pair_part(network, noise, device, shape),
    }[options.part]()
    for name, run in parts:
        try:
            run()
        except Exception:  # noqa: BLE001 - a broken part must not cost the others their GPU time
            RESULT["checks"][name] = {"value": traceback.format_exc(), "ok": False}  # type: ignore[index]
            traceback.print_exc()
        (options.out / f"kernels_{options.part}.json").write_text(json.dumps(RESULT, indent=1))


def save(batch: Denoiser, out: Path) -> None:
    if batch.layout.count == 8192:
        n = batch.layout.graphs[:, 1].cpu().numpy()
        np.savez_compressed(out / "graphs.npz", n=n, x=batch.x.cpu().numpy(), e=batch.e.cpu().numpy())


if __name__ == "__main__":
    main()
