"""What does bitdgdm-w4a4-r16-s1 cost in our W4A4 kernels, a Linear and a denoising step, against PyTorch?

Run: PYTHONPATH=. python benchmarks/int4_linear.py [--results DIR]   (needs a GPU, nvcc and PyCUDA)
Writes int4_linear-<hardware>.json: device microseconds of every case, medians of 20 runs, in turn in one process. Inputs
are bf16 rows of DiGress's own shapes for 8,192 QM9 molecules, and one large square. A step is that of the sampler, with
features and draws: the difference of two chains of the shipped checkpoint that end at once on the CPU.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from rows import RESULTS, keep, row
from torch import Tensor
from torch.nn.functional import linear

from bitdgdm.kernels.int4 import Int4Linear, int4_linear, pack
from bitdgdm.kernels.launch import Device
from bitdgdm.kernels.reference_int4 import int4_linear as twin
from bitdgdm.models.engine import load_engine
from bitdgdm.models.sampler import sample_ids
from bitdgdm.models.seam import Engine
from bitdgdm.pipelines.quantize import quantize
from bitdgdm.quant.decompose import decompose
from bitdgdm.quant.linear import QuantLinear
from bitdgdm.quant.recipe_book import get_recipe

QUESTION, MODEL, RECIPE, MOLECULES = "int4_linear", "builtin:digress-qm9", "bitdgdm-w4a4-r16-s1", 8192
SHAPES = ((64, 256, 640_000), (64, 128, 640_000), (256, 64, 640_000), (256, 256, 72_000), (2048, 64, 8192), (2048, 2048, 65_536))
TORCH, PLAIN, FULL, QUANT = "torch bf16", "ours w4a4", "ours w4a4-r16-s1, 3 sigma", "QuantLinear in torch, w4a4-r16-s1"


def layers(width: int, out: int, device: torch.device) -> tuple[Tensor, Int4Linear, Int4Linear, QuantLinear, dict[str, Tensor]]:
    """A weight in bf16, packed plainly, packed by bitdgdm-w4a4-r16-s1, as QuantLinear; and the recipe's parts."""
    torch.manual_seed(width + out)
    weight, recipe = torch.randn(out, width) / width**0.5, get_recipe(RECIPE)
    small = out * width <= 2**18  # a larger one is only for its time: made-up factors do
    fitted = weight if small else weight[:64, :64]
    parts = decompose(fitted, recipe, contributions=False)[0]
    quant = QuantLinear.from_parts(parts, torch.zeros(len(fitted)), recipe)
    if small:
        assert quant.codes is not None and quant.scale is not None
        assert parts.proj_up is not None and parts.proj_down is not None and parts.sparse_index is not None
        up, down = parts.proj_up.float(), parts.proj_down.float()
        if parts.proj_up_scale is not None and parts.proj_down_scale is not None:
            up, down = up * parts.proj_up_scale.float(), down * parts.proj_down_scale.float()
        sparse = torch.zeros(out, width)
        sparse.view(-1)[parts.sparse_index.long()] = parts.sparse_value.float()
        codes, scale = quant.codes.to(torch.int8), quant.scale
    else:
        codes, scale = torch.randint(-7, 8, (out, width)).to(torch.int8), torch.rand(out) / 64
        up, down = torch.randn(out, 16) / 16, torch.randn(width, 16) / width**0.5
        sparse = torch.zeros(out, width).scatter_(1, torch.rand(out, width).topk(width // 100, 1).indices, 0.25)
    plain = pack(codes, scale, torch.zeros(out), device=device)
    full = pack(codes, scale, torch.zeros(out), asymmetric=True, sigma=3.0, up=up, down=down, sparse=sparse, device=device)
    parts_of = {"codes": codes, "scale": scale, "side": up @ down.T + sparse}
    return weight.to(device, torch.bfloat16), plain, full, quant.to(device), parts_of


def agreement(x: Tensor, packed: Int4Linear, parts: dict[str, Tensor], device: Device) -> tuple[float, float]:
    """Relative error of the kernel and of PyTorch with branches in bf16, against float64, on a few rows."""
    few = x[:512].float().cpu()
    exact = twin(few, **parts, asymmetric=True, sigma=3.0, dtype=torch.float64)  # type: ignore[arg-type]
    low = twin(few, **parts, asymmetric=True, sigma=3.0, dtype=torch.bfloat16)  # type: ignore[arg-type]
    ours = int4_linear(x[:512], packed, device).cpu()
    return tuple(float((y.double() - exact).norm() / exact.norm()) for y in (ours, low))  # type: ignore[return-value]


def seconds(call: Callable[[], object]) -> float:
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1000


def measure(width: int, out: int, rows: int, device: Device, runs: int) -> list[dict]:
    """The rows of one shape."""
    weight, plain, full, quant, parts = layers(width, out, device.device)
    x = torch.randn(rows, width, device=device.device)
    x = (x * (1 + 9 * (torch.rand_like(x) < 0.005))).bfloat16()  # half a percent of outliers
    ours, low = agreement(x, full, parts, device)
    assert ours <= 2 * low, (ours, low)
    calls: dict[str, Callable[[], object]] = {
        TORCH: lambda: linear(x, weight),
        PLAIN: lambda: int4_linear(x, plain, device),
        FULL: lambda: int4_linear(x, full, device),
    }
    if quant.out_features == out:
        calls[QUANT] = lambda: quant(x)
    times: dict[str, list[float]] = {name: [] for name in calls}
    with torch.inference_mode(), device.stream():
        for k in range(runs + 3):
            for name, call in calls.items():
                found = seconds(call)
                if k > 2:
                    times[name].append(found)
    case, result = f"{rows} rows, {width} -> {out}", []
    for name, found in times.items():
        result.append(row(QUESTION, f"{case}, {name}", "time", [1e6 * s for s in found], "us"))
        rate = 2 * rows * width * out / median(found) / 1e12
        result.append(row(QUESTION, f"{case}, {name}", "arithmetic of the dense product", rate, "T/s"))
        if name not in (TORCH, QUANT):
            for baseline in (TORCH, QUANT):
                if baseline in times:
                    gain = median(times[baseline]) / median(found)
                    result.append(row(QUESTION, f"{case}, {name}", f"times {baseline}", gain, "x", baseline=baseline))
    result.append(row(QUESTION, f"{case}, {FULL}", "relative error", 100 * ours, "%", baseline=f"bf16 branches: {100 * low:.3g} %"))
    return result


def chain_seconds(engine: Engine, steps: int) -> float:
    torch.cuda.synchronize()
    began = time.monotonic()
    sample_ids(engine, engine.config, 1, 0, MOLECULES, steps, MOLECULES)
    return time.monotonic() - began


def measure_step(runs: int) -> list[dict]:
    """The rows of a denoising step by each engine."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "artifact.safetensors"
        quantize(MODEL, RECIPE, out=path, executor="local", quiet=True)
        engines = {
            f"ours {RECIPE}": load_engine(path, "cuda", engine="kernels"),
            f"QuantLinear in torch, {RECIPE}": load_engine(path, "cuda", engine="torch"),
            "torch float32, not quantized": load_engine(MODEL, "cuda", "fp32", engine="torch"),
            "torch bf16, not quantized": load_engine(MODEL, "cuda", "bf16", engine="torch"),
        }
    steps: dict[str, list[float]] = {name: [] for name in engines}
    for k in range(runs + 1):
        for name, engine in engines.items():
            short = chain_seconds(engine, 4)
            if k:
                steps[name].append((chain_seconds(engine, 14) - short) / 10)
    result, ours = [], next(iter(engines))
    for name, found in steps.items():
        case = f"{MOLECULES} molecules, {name}"
        result.append(row(QUESTION, case, "step", [1000 * s for s in found], "ms"))
        result.append(row(QUESTION, case, "molecules/s, T=500", [MOLECULES / 500 / s for s in found], "1/s"))
        if name != ours:
            gain = median(found) / median(steps[ours])
            result.append(row(QUESTION, f"{MOLECULES} molecules, {ours}", f"times {name}", gain, "x", baseline=name))
    return result


def main() -> None:
    """Parse the options and run."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--runs", type=int, default=20)
    p.add_argument("--results", type=Path, default=RESULTS)
    a = p.parse_args()
    device = Device()
    for width, out, rows in SHAPES:
        keep(QUESTION, measure(width, out, rows, device, a.runs), a.results)
    keep(QUESTION, measure_step(3), a.results)


if __name__ == "__main__":
    main()
