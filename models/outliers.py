"""Where the outliers are: per Linear and time of the denoising, and the singular spectra of the weights.

Guarantees: rows are flat and plain, one a (Linear, time bin) or a (Linear, singular value); inputs are those of real
rows along the full-precision network's own trajectories.
Knows nothing of: plots, recipes.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from bitdgdm.models.digress import quantizable
from bitdgdm.models.source import SourceModel
from bitdgdm.models.threshold_rules import limit_of, rule_of
from bitdgdm.models.trajectory import Where, walk
from bitdgdm.quant.thresholds import outlier_limit

_BITS = 4  # of the rounding whose error is reported


def layer_outliers(
    source: SourceModel,
    *,
    sigma: float = 3.0,
    bins: int = 10,
    molecules: int = 32,
    steps: int = 50,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Callable[[float], object] | None = None,
) -> list[dict[str, Any]]:
    """One row a quantizable Linear and time bin in which the trajectory has a step.

    layer, index (of the transformer layer), kind ("q", "e_out", ...), rows_of ("node", "edge", "graph"), rule (see
    threshold_rules.py); bin, t_low, t_high: bin b holds the times with (t - 1) * bins // T = b; rows;
    outlier_fraction: entries with |x| > sigma times the root mean square of their token; outliers_of_a_row: largest
    number of them in one token; limit: what that never exceeds, whatever the token; kurtosis and
    max_over_sigma: of all entries of the bin together; error_symmetric, error_asymmetric: ||Q(x) - x|| / ||x|| of
    4-bit rounding per token; error_without_outliers: of asymmetric rounding where the outliers stay as they are.
    progress is told the fraction that is done.
    """
    total = source.config.diffusion_steps
    sums: dict[tuple[str, int], _Sums] = defaultdict(_Sums)
    where_of: dict[str, Where] = {}
    last: list[tuple[Tensor, Tensor]] = []  # of the rows that were measured last: q, k and v show the same

    def visit(name: str, where: Where, t: int, rows: Tensor) -> None:
        where_of[name] = where
        known = [m for seen, m in last if seen is rows]
        measured = known[0] if known else _measure(rows, sigma)
        if not known:
            last[:] = [*last[-2:], (rows, measured)]
        sums[name, min(bins - 1, (t - 1) * bins // total)].add(measured, len(rows), rows.shape[1])

    names = quantizable(source.config)
    walk(source, names, visit, molecules=molecules, steps=steps, seed=seed, device=device, progress=progress)
    return [
        {
            **_named(name),
            "rows_of": where_of[name],
            "rule": rule_of(name),
            "bin": b,
            "t_low": -(-b * total // bins) + 1,
            "t_high": -(-(b + 1) * total // bins),
            **sums[name, b].row(),
            "limit": outlier_limit(sums[name, b].width, sigma),
        }
        for name in names
        for b in range(bins)
        if (name, b) in sums
    ]


def outliers_beyond(
    source: SourceModel,
    taus: Mapping[str, Tensor],
    k: float,
    *,
    molecules: int = 32,
    steps: int = 50,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Callable[[float], object] | None = None,
) -> list[dict[str, Any]]:
    """One row a Linear of `taus`: how many entries of real trajectories exceed thresholds that were known in advance.

    taus: float[in] by name, closed forms among them for k sigma. layer, index, kind, rule; rows; outlier_fraction:
    entries with |x| > tau; outliers_of_a_row: largest number of them in one token; limit: what the closed form says
    that never exceeds, or None.
    """
    entries, found, most = defaultdict[str, int](int), defaultdict[str, int](int), defaultdict[str, int](int)
    placed = {name: tau.to(device) for name, tau in taus.items()}

    def visit(name: str, where: Where, t: int, rows: Tensor) -> None:
        outside = (rows.abs() > placed[name]).sum(1)
        entries[name] += rows.numel()
        found[name] += int(outside.sum())
        most[name] = max(most[name], int(outside.max()))

    walk(
        source,
        list(taus),
        visit,
        molecules=molecules,
        steps=steps,
        seed=seed,
        device=device,
        progress=progress,
    )
    return [
        {
            **_named(name),
            "rule": rule_of(name),
            "rows": entries[name] // len(tau),
            "outlier_fraction": found[name] / entries[name],
            "outliers_of_a_row": most[name],
            "limit": limit_of(name, len(tau), k),
        }
        for name, tau in taus.items()
    ]


def spectra(source: SourceModel) -> list[dict[str, Any]]:
    """One row a quantizable Linear and singular value, the largest first.

    layer, index, kind; component: from 1; singular_value; energy: share of the squared norm in the components so far.
    """
    rows = []
    for name in quantizable(source.config):
        values = torch.linalg.svdvals(source.weights[f"{name}.weight"].double())
        squared = values.square()
        energy = squared.cumsum(0) / squared.sum().clamp(min=torch.finfo(torch.float64).tiny)
        rows += [
            {**_named(name), "component": i + 1, "singular_value": s, "energy": e}
            for i, (s, e) in enumerate(zip(values.tolist(), energy.tolist(), strict=True))
        ]
    return rows


def _named(name: str) -> dict[str, Any]:
    parts = name.split(".")
    return {
        "layer": name,
        "index": int(parts[1]),
        "kind": ".".join(p for p in parts[2:] if p not in ("self_attn", "lin")),
    }


def _measure(x: Tensor, sigma: float) -> Tensor:
    """float64[8]: entries beyond, most in a row, sums of x, x^2, x^4, largest |x|, and three squared errors."""
    wide = x.double()
    rms = wide.square().mean(1, keepdim=True).sqrt()
    outlier = wide.abs() > sigma * rms
    squared = wide.square()
    per_row = outlier.sum(1)
    kept = torch.where(outlier, 0.0, wide)
    return torch.stack(
        [
            per_row.sum().double(), per_row.max().double(), wide.sum(), squared.sum(),
            wide.abs().max(), (wide**3).sum(), (wide**4).sum(),
            _squared_error(wide, asymmetric=False), _squared_error(wide, asymmetric=True),
            _squared_error(kept, asymmetric=True),
        ]
    )  # fmt: skip


def _squared_error(x: Tensor, *, asymmetric: bool) -> Tensor:
    """Of rounding each row of x to 4 bits with one scale, float64."""
    tiny = torch.finfo(torch.float32).tiny
    if asymmetric:
        low, high = x.amin(1, keepdim=True).clamp(max=0), x.amax(1, keepdim=True).clamp(min=0)
        levels = 2**_BITS - 1
        step = ((high - low) / levels).clamp(min=tiny)
        zero = (low / step).round()
        codes = torch.minimum((x / step).round().maximum(zero), zero + levels)
    else:
        top = 2 ** (_BITS - 1) - 1
        step = (x.abs().amax(1, keepdim=True) / top).clamp(min=tiny)
        codes = (x / step).round().clamp(-top, top)
    return (codes * step - x).square().sum()


class _Sums:
    """Of one Linear and bin."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []
        self._rows = self.width = 0

    def add(self, measured: Tensor, rows: int, width: int) -> None:
        self._parts.append(measured)
        self._rows, self.width = self._rows + rows, width

    def row(self) -> dict[str, Any]:
        parts = torch.stack(self._parts).cpu()
        (beyond, _, s1, s2, _, s3, s4, symmetric, asymmetric, without) = parts.sum(0).tolist()
        _, most, _, _, largest, *_ = parts.amax(0).tolist()
        count = self._rows * self.width
        mean = s1 / count
        variance = s2 / count - mean**2
        fourth = s4 / count - 4 * mean * s3 / count + 6 * mean**2 * s2 / count - 3 * mean**4
        spread = variance > 0
        return {
            "rows": self._rows,
            "outlier_fraction": beyond / count,
            "outliers_of_a_row": int(most),
            "kurtosis": fourth / variance**2 if spread else 0.0,
            "max_over_sigma": largest / variance**0.5 if spread else 0.0,
            "error_symmetric": (symmetric / s2) ** 0.5 if s2 else 0.0,
            "error_asymmetric": (asymmetric / s2) ** 0.5 if s2 else 0.0,
            "error_without_outliers": (without / s2) ** 0.5 if s2 else 0.0,
        }
