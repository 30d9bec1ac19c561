"""Pictures of one evaluation: over time, by kind of layer, over depth, spectra.

Guarantees: a picture is a function of rows only; colours can be told apart with any colour vision (Okabe and Ito,
2008; viridis); a picture of nothing is None, never an empty frame.
Knows nothing of: how figures were measured, pages.
"""

import re
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogFormatterMathtext

from bitdgdm.infra.rows import Row
from bitdgdm.models.layer_errors import kind_of
from bitdgdm.pipelines.pareto_plot import COLOURS, STYLE, figure_of

_LAYER = re.compile(r", layer (?P<name>[\w.]+)(?:, t=(?P<t>\d+))?$")


def over_time(rows: Sequence[Row]) -> Figure | None:
    """Return KL (left) and total variation (right) over the diffusion time, of nodes and edges."""
    series: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for r in rows:
        found = re.search(r", (held-out|own), t=(\d+)$", r["case"])
        if found:
            series.setdefault((found[1], r["metric"]), []).append((int(found[2]), r["value"]))
    if not series:
        return None
    figure, axes = figure_of(9.6, 3.7, 2)
    with matplotlib.rc_context(STYLE):
        for panel, (axis, what) in enumerate(zip(axes, ("KL", "TV"), strict=True)):
            for k, part in enumerate(("nodes", "edges")):
                for where, line in (("held-out", "-"), ("own", (0, (3, 2)))):
                    points = sorted(series.get((where, f"{what} of {part}"), []))
                    if points:
                        t, values = zip(*points, strict=True)
                        title = {"held-out": "held-out molecules", "own": "own trajectories"}[where]
                        axis.plot(
                            t,
                            values,
                            color=COLOURS[k],
                            linestyle=line,
                            linewidth=1.5,
                            label=f"{part}, {title}",
                        )
            axis.set(xlabel="diffusion time t (0: molecule)", ylabel=f"{what} to full precision, 1e-4", ylim=(0, None),
                     title="KL divergence" if panel == 0 else "total variation")  # fmt: skip
        axes[0].legend(fontsize=8)
    return figure


def by_kind(rows: Sequence[Row]) -> Figure | None:
    """Return KL when the layers of one kind alone are quantized, the most sensitive first."""
    metric = "KL, only this kind quantized"
    found = sorted((r["value"], r["case"].rpartition(", kind ")[2]) for r in rows if r["metric"] == metric)
    if not found:
        return None
    figure, (axes,) = figure_of(7.6, 0.9 + 0.21 * len(found))
    with matplotlib.rc_context(STYLE):
        places = range(len(found))
        axes.barh(places, [v for v, _ in found], color=COLOURS[0], height=0.7)
        axes.set_yticks(places, [k for _, k in found], fontsize=8.5)
        axes.set(
            xlabel="KL to full precision, 1e-4, on held-out molecules",
            title="Sensitivity: one kind of layer quantized at a time",
        )
        axes.grid(axis="y", visible=False)
        for at, (value, _) in zip(places, found, strict=True):
            axes.annotate(
                f"{value:.3g}",
                (value, at),
                xytext=(3, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        axes.margins(x=0.1, y=0.01)
    return figure


def layer_map(rows: Sequence[Row], metric: str, title: str, unit: str, *, log: bool = True) -> Figure | None:
    """Return `metric` by kind of layer: over depth (left, root mean square or largest over time) and over time (right).

    Over time the worst layer of a kind is shown.
    """
    values: dict[tuple[str, int, int], float] = {}
    for r in rows:
        match = _LAYER.search(r["case"])
        if r["metric"] == metric and match and match["t"]:
            depth = re.match(r"tf_layers\.(\d+)\.", match["name"])
            values[kind_of(match["name"]), int(depth[1]) if depth else 0, int(match["t"])] = r["value"]
    if not values:
        return None
    kinds = list(dict.fromkeys(k for k, _, _ in values))
    depths, times = sorted({key[1] for key in values}), sorted({key[2] for key in values})
    by_depth, by_time = np.full((len(kinds), len(depths)), np.nan), np.full((len(kinds), len(times)), np.nan)
    for (kind, at_depth, t), value in values.items():
        i, j, k = kinds.index(kind), depths.index(at_depth), times.index(t)
        by_depth[i, j], by_time[i, k] = np.fmax(by_depth[i, j], value), np.fmax(by_time[i, k], value)
    order = np.argsort(-np.nanmax(by_time, 1))
    figure, axes = figure_of(9.6, 1.3 + 0.2 * len(kinds), 2)
    with matplotlib.rc_context(STYLE):
        positive = by_time[np.isfinite(by_time) & (by_time > 0)]
        low, high = (float(positive.min()), float(positive.max())) if positive.size else (0.1, 1.0)
        norm = (
            matplotlib.colors.LogNorm(low, max(high, low * 1.01))
            if log
            else matplotlib.colors.Normalize(0, high)
        )
        for axis, grid, ticks, label in (
            (axes[0], by_depth, depths, "layer (worst time)"), (axes[1], by_time, times, "diffusion time t (worst layer)"),
        ):  # fmt: skip
            image = axis.imshow(
                grid[order], aspect="auto", cmap="viridis", norm=norm, interpolation="nearest"
            )
            axis.set_xticks(range(len(ticks)), [str(t) for t in ticks], fontsize=8)
            axis.set_yticks(
                range(len(kinds)),
                [kinds[i] for i in order] if axis is axes[0] else [""] * len(kinds),
                fontsize=8,
            )
            axis.set_xlabel(label)
            axis.grid(visible=False)
        axes[0].set_title(title)
        plain = FuncFormatter(lambda v, _: f"{v:g}")
        bar = figure.colorbar(image, ax=axes, label=unit, fraction=0.03, pad=0.01, format=plain)
        bar.ax.yaxis.set_minor_formatter(plain)
        bar.ax.tick_params(which="both", labelsize=8)
    return figure


def spectra(found: Mapping[str, Sequence[float]]) -> Figure | None:
    """Return the singular values of the weights, median over layers of each kind, as shares of the largest."""
    kinds: dict[str, list[Sequence[float]]] = {}
    for name, values in found.items():
        kinds.setdefault(kind_of(name), []).append(values)
    if not kinds:
        return None
    figure, axes = figure_of(9.6, 3.9, 3)
    with matplotlib.rc_context(STYLE):
        groups = {"node path": [], "edge path": [], "graph path": []}  # type: dict[str, list[str]]
        for kind in kinds:
            groups[_path_of(kind)].append(kind)
        lines = ("-", (0, (5, 2)), (0, (1.5, 1.2)))
        for axis, (group, of) in zip(axes, groups.items(), strict=True):
            for k, kind in enumerate(of):
                shortest = min(map(len, kinds[kind]))
                middle = np.median([np.asarray(v[:shortest]) for v in kinds[kind]], axis=0)
                axis.plot(np.arange(1, shortest + 1) / shortest, np.maximum(middle, 1e-4), color=COLOURS[k % 7],
                          linestyle=lines[k // 7], linewidth=1.4, label=f"{kind} ({shortest})")  # fmt: skip
            axis.set(xlabel="rank, as a share of full", title=group, yscale="log", ylim=(3e-3, 1.15))
            axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
            axis.yaxis.set_minor_formatter(LogFormatterMathtext(labelOnlyBase=True))
            axis.legend(fontsize=7, loc="lower left", ncols=1 + len(of) // 8)
        axes[0].set_ylabel("singular value, of the largest")
    return figure


def _path_of(kind: str) -> str:
    if kind in ("e_add", "e_mul", "e_out", "linE1", "linE2"):
        return "edge path"
    return "node path" if kind in ("q", "k", "v", "x_out", "linX1", "linX2") else "graph path"
