"""Quality against size or time: many models in one picture.

Guarantees: a picture is a function of its points only; colours can be told apart with any colour vision (Okabe and
Ito, 2008) and every group has a mark of its own; a picture of nothing is None.
Knows nothing of: how figures were measured, pages.
"""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from bitdgdm.infra.rows import Row, ends

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKS = ("o", "s", "^", "D", "v", "P", "X")
STYLE: dict[Any, Any] = {
    "font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e3e6e8",
    "grid.linewidth": 0.7, "axes.axisbelow": True, "axes.edgecolor": "#8a949c", "legend.frameon": False,
    "axes.titlesize": 10.5, "axes.titleweight": "bold", "axes.titlelocation": "left", "svg.hashsalt": "bitdgdm",
    "font.family": "DejaVu Sans",
}  # fmt: skip


@dataclass(frozen=True)
class Point:
    """One model in a Pareto picture. low, high: interval of y. group: points of a group share colour and mark."""

    label: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None
    group: str = ""


def png(figure: Figure, dpi: int = 110) -> bytes:
    """Return the picture; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def figure_of(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots(1, columns, squeeze=False)[0]
    return figure, list(axes)


def pareto(
    points: Sequence[Point], x: str, y: str, title: str, *, log_x: bool = False, log_y: bool = False, best: str = "low",
    label_all: bool = False, level: tuple[str, float] | None = None,
) -> Figure | None:  # fmt: skip
    """Return points with the front that nothing beats: small x, and small y (best "low") or large y ("high").

    Points of the front are labelled, or all of them if label_all. level: a named height to compare with.
    """
    shown = [p for p in points if math.isfinite(p.x) and math.isfinite(p.y) and (p.y > 0 or not log_y)]
    if not shown:
        return None
    figure, (axes,) = figure_of(7.6, 4.6)
    with matplotlib.rc_context(STYLE):
        groups = list(dict.fromkeys(p.group for p in shown))
        for g, group in enumerate(groups):
            of = [p for p in shown if p.group == group]
            style: dict[str, Any] = {"color": COLOURS[g % 7], "marker": MARKS[(g + g // 7) % 7]}
            for p in of:
                if p.low is not None and p.high is not None:
                    axes.plot(
                        [p.x, p.x], [p.low, p.high], color=style["color"], linewidth=1.1, alpha=0.7, zorder=2
                    )
            axes.plot([p.x for p in of], [p.y for p in of], linestyle="none", markersize=6, markeredgecolor="white",
                      markeredgewidth=0.6, label=group or None, zorder=3, **style)  # fmt: skip
        front = _front(shown, best)
        axes.plot(
            [p.x for p in front],
            [p.y for p in front],
            color="#8a949c",
            linewidth=1,
            linestyle=(0, (4, 3)),
            zorder=1,
        )
        axes.set(
            xlabel=x,
            ylabel=y,
            title=title,
            xscale="log" if log_x else "linear",
            yscale="log" if log_y else "linear",
        )
        axes.margins(x=0.12, y=0.1)
        if level is not None:
            axes.axhline(level[1], color="#000000", linewidth=1, linestyle=(0, (1, 2)), zorder=1)
            axes.text(
                0.005,
                level[1],
                level[0],
                transform=axes.get_yaxis_transform(),
                ha="left",
                va="bottom",
                fontsize=7.5,
            )
        if log_y:
            plain = FuncFormatter(lambda v, _: f"{v:g}")
            axes.yaxis.set_major_formatter(plain)
            narrow = max(p.y for p in shown) < 10 * min(p.y for p in shown)  # a decade may hold no major tick
            axes.yaxis.set_minor_formatter(plain if narrow else NullFormatter())
        if log_x:
            axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
            axes.xaxis.set_minor_formatter(
                FuncFormatter(lambda v, _: f"{v:g}" if f"{v:e}"[0] in "235" else "")
            )
        if len(groups) > 1:
            axes.legend(fontsize=8, loc="best", ncols=1 + len(groups) // 6)
        _label(figure, axes, shown if label_all else front, shown)
    return figure


def _front(points: Sequence[Point], best: str) -> list[Point]:
    found: list[Point] = []
    for p in sorted(points, key=lambda p: (p.x, p.y if best == "low" else -p.y)):
        if not found or (p.y < found[-1].y if best == "low" else p.y > found[-1].y):
            found.append(p)
    return found


def _label(figure: Figure, axes: Axes, points: Sequence[Point], all_points: Sequence[Point]) -> None:
    """Write each name where it covers no mark and no other name, if there is such a place."""
    figure.draw_without_rendering()
    scale = figure.dpi / 72
    marks = [axes.transData.transform((p.x, p.y)) for p in all_points]
    frame, taken = (
        axes.get_window_extent(),
        [(m[0] - 4 * scale, m[1] - 4 * scale, m[0] + 4 * scale, m[1] + 4 * scale) for m in marks],
    )
    for p in points:
        px, py = axes.transData.transform((p.x, p.y))
        width, height = 4.3 * scale * len(p.label), 9 * scale
        best: tuple[float, float, float, str] | None = None
        for dx, dy in (
            (6, -3),
            (6, 6),
            (6, -12),
            (-6, 6),
            (-6, -12),
            (-6, -3),
            (6, 15),
            (6, -21),
            (-6, 15),
            (-6, -21),
        ):
            left = px + dx * scale - (width if dx < 0 else 0)
            box = (left, py + dy * scale, left + width, py + dy * scale + height)
            outside = (
                max(0, frame.x0 - box[0])
                + max(0, box[2] - frame.x1)
                + max(0, box[3] - frame.y1)
                + max(0, frame.y0 - box[1])
            )
            cost = 10 * outside + sum(_overlap(box, t) for t in taken)
            if best is None or cost < best[0]:
                best = (cost, dx, dy, "right" if dx < 0 else "left")
                place = box
        assert best is not None
        taken.append(place)
        far = {"arrowstyle": "-", "color": "#aeb6bc", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3}
        axes.annotate(p.label, (p.x, p.y), xytext=(best[1], best[2]), textcoords="offset points", fontsize=7.5,
                      ha=best[3], va="bottom", color="#333c44", arrowprops=far if abs(best[2]) > 7 else None)  # fmt: skip


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def quality_points(
    rows: Sequence[Row], x: str, y: str, groups: Mapping[str, str] | None = None
) -> list[Point]:
    """Return a point for each case that has both metrics; its interval is that of y."""
    found: dict[str, dict[str, Row]] = {}
    for r in rows:
        if r["metric"] in (x, y):
            found.setdefault(r["case"], {})[r["metric"]] = r
    points = []
    for case, both in found.items():
        if len(both) == 2:
            low, high = ends(both[y]["spread"]) or (None, None)
            points.append(
                Point(case, both[x]["value"], both[y]["value"], low, high, (groups or {}).get(case, ""))
            )
    return points
