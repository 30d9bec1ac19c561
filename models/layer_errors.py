"""What a quantized network does to the output of each Linear, on inputs that full precision meets while it samples.

Guarantees: each Linear is fed the full-precision network's own input, so that errors of layers before it don't count;
rows of padding don't count; the same figures for the same (models, molecules, steps, seed) on one kind of machine.
Knows nothing of: recipes, files.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitdgdm.models.source import SourceModel
from bitdgdm.models.trajectory import Where, walk
from bitdgdm.quant.linear import set_time


@dataclass(frozen=True)
class OutputError:
    """||y - y^||_F / ||y||_F of one Linear over the rows of one time."""

    name: str
    t: int
    relative: float
    rows: int

    @property
    def sqnr_db(self) -> float:
        """Signal to quantization noise; infinite if nothing was lost."""
        return -20 * math.log10(self.relative) if self.relative > 0 else math.inf


def output_errors(
    source: SourceModel,
    network: nn.Module,
    names: Sequence[str],
    *,
    molecules: int = 32,
    steps: int = 10,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Callable[[float], object] | None = None,
) -> list[OutputError]:
    """Return one error a Linear and time, by name in the order of `names`, then by falling t.

    network: quantized, its Linears under the names of the source's.
    """
    network = network.to(device).eval()
    modules = {name: network.get_submodule(name) for name in names}
    weights = {name: source.weights[f"{name}.weight"].to(device, torch.float32) for name in names}
    biases = {name: source.weights.get(f"{name}.bias") for name in names}
    sums: dict[tuple[str, int], Tensor] = {}
    rows_of: dict[tuple[str, int], int] = {}

    def visit(name: str, where: Where, t: int, x: Tensor) -> None:
        bias = biases[name]
        exact = F.linear(x, weights[name], None if bias is None else bias.to(device, torch.float32))
        set_time(modules[name], torch.full((1,), t, device=x.device))
        lost = (modules[name](x) - exact).double().square().sum()
        pair = torch.stack((lost, exact.double().square().sum()))
        key = (name, t)
        sums[key] = sums[key] + pair if key in sums else pair
        rows_of[key] = rows_of.get(key, 0) + len(x)

    with torch.inference_mode():
        walk(
            source,
            names,
            visit,
            molecules=molecules,
            steps=steps,
            seed=seed,
            device=device,
            progress=progress,
        )
    order = {name: k for k, name in enumerate(names)}
    found = []
    for (name, t), pair in sorted(sums.items(), key=lambda item: (order[item[0][0]], -item[0][1])):
        lost, whole = pair.tolist()
        found.append(OutputError(name, t, math.sqrt(lost / whole) if whole > 0 else 0.0, rows_of[name, t]))
    return found


def over_time(errors: Sequence[OutputError]) -> dict[str, float]:
    """Return the root mean square over times of each Linear's error."""
    found: dict[str, list[float]] = {}
    for e in errors:
        found.setdefault(e.name, []).append(e.relative**2)
    return {name: math.sqrt(sum(squares) / len(squares)) for name, squares in found.items()}


def kind_of(name: str) -> str:
    """Return the kind of a Linear: its name without the layer, "tf_layers.3.self_attn.e_out" -> "e_out"."""
    return (
        name.split(".", 2)[-1].removeprefix("self_attn.").removesuffix(".lin")
        if name.startswith("tf_layers.")
        else name
    )
