"""Inline SVG for the report: histograms and pictures of molecules.

Guarantees: what is drawn is a function of the numbers or the SMILES only; colours are CSS variables, so that
one picture serves light, dark and paper; all text is escaped.
Knows nothing of: campaigns, the page around it.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from xml.etree import ElementTree

from markupsafe import Markup
from rdkit import Chem, rdBase

try:
    from rdkit.Chem.Draw import rdMolDraw2D
except ImportError as error:  # RDKit draws with libXrender, which a bare GPU host doesn't have
    rdMolDraw2D, NO_PICTURES = None, str(error)
else:
    NO_PICTURES = ""

_LEFT, _RIGHT, _TOP, _BOTTOM = 34, 8, 8, 22
_TAIL = 5e-4  # of the molecules, on either side, may lie outside the drawn range
_PICTURE = (180, 126)
_INKS = {
    "#0000FF": "n", "#FF0000": "o", "#33CCCC": "f", "#CCCC00": "s", "#00CC00": "cl", "#7F4C19": "br",
    "#A01EEF": "i", "#FF7F00": "p",
}  # fmt: skip


@dataclass(frozen=True)
class Histogram:
    """Counts in equal bins [low + k width, low + (k + 1) width). whole: values are integers, one bin each."""

    low: float
    width: float
    counts: Sequence[int]
    whole: bool

    @cached_property
    def total(self) -> int:
        return sum(self.counts)

    def quantile(self, q: float) -> float:
        """Return the q-quantile: exact for whole numbers, else interpolated inside its bin."""
        wanted, below = q * self.total, 0
        for k, count in enumerate(self.counts):
            if count and below + count >= wanted:
                inside = 0.0 if self.whole else (wanted - below) / count
                return self.low + (k + inside) * self.width
            below += count
        return self.low + len(self.counts) * self.width

    @cached_property
    def drawn(self) -> tuple[int, int]:
        """The bins [first, last) worth drawing: all but tails of half a per mille."""
        first = _without_tail(self.counts, self.total)
        last = len(self.counts) - _without_tail(self.counts[::-1], self.total)
        margin = 0 if self.whole else 1
        return max(0, first - margin), min(len(self.counts), last + margin)


def _without_tail(counts: Sequence[int], total: int) -> int:
    tail = 0
    for k, count in enumerate(counts):
        tail += count
        if tail > _TAIL * total:
            return k
    return 0


@dataclass(frozen=True)
class _Frame:
    """Where a histogram lands on the canvas: bin k to x, share of the molecules to y."""

    histogram: Histogram
    width: int
    height: int

    @cached_property
    def bin_width(self) -> float:
        first, last = self.histogram.drawn
        return (self.width - _LEFT - _RIGHT) / (last - first)

    @cached_property
    def top_and_step(self) -> tuple[float, float]:
        first, last = self.histogram.drawn
        return _axis(max(self.histogram.counts[first:last]) / max(1, self.histogram.total))

    @property
    def floor(self) -> float:
        return self.height - _BOTTOM

    def x(self, k: float) -> float:
        return _LEFT + (k - self.histogram.drawn[0]) * self.bin_width

    def y(self, share: float) -> float:
        return self.floor - (self.floor - _TOP) * share / self.top_and_step[0]


def draw_histogram(h: Histogram, label: str, width: int = 320, height: int = 150) -> Markup:
    """Return the SVG of `h`, drawn for a place `width` CSS pixels wide; screen readers read out `label`.

    h: holds at least one molecule.
    """
    frame = _Frame(h, width, height)
    opening = Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">')
    parts = [_grid(frame), _shape(frame), *_hover(frame), *_labels(frame)]
    return opening.format(width, height, label) + Markup("").join(parts) + Markup("</svg>")


def _grid(frame: _Frame) -> Markup:
    line = Markup(
        '<path class="grid" d="M{} {:.1f}H{}"/><text class="tick" x="{}" y="{:.1f}" text-anchor="end">{}</text>'
    )
    top, step = frame.top_and_step
    lines = round(top / step)
    shares = [(i * step, " %" if i == lines else "") for i in range(lines + 1)]
    return Markup("").join(
        line.format(
            _LEFT, frame.y(s), frame.width - _RIGHT, _LEFT - 6, frame.y(s) + 3.5, f"{100 * s:g}{unit}"
        )
        for s, unit in shares
    )


def _shape(frame: _Frame) -> Markup:
    """Return bars for whole numbers, one stepped outline otherwise: no seams between bins at any zoom."""
    h, floor = frame.histogram, frame.floor
    gap = 0.11 * frame.bin_width if h.whole else 0.0
    path = [f"M{frame.x(h.drawn[0]):.1f} {floor:.1f}"]
    for k in range(*h.drawn):
        left, right, top = frame.x(k) + gap, frame.x(k + 1) - gap, frame.y(h.counts[k] / h.total)
        if not h.whole:
            path.append(f"V{top:.1f}H{right:.1f}")
        elif h.counts[k]:
            path.append(f"M{left:.1f} {floor:.1f}V{top:.1f}H{right:.1f}V{floor:.1f}Z")
    return Markup('<path class="bars" d="{}"/>').format("".join(path) + ("" if h.whole else f"V{floor:.1f}"))


def _hover(frame: _Frame) -> Iterator[Markup]:
    h = frame.histogram
    place = Markup('<rect class="hit" x="{:.1f}" y="{}" width="{:.1f}" height="{}"><title>{}</title></rect>')
    for k in range(*h.drawn):
        if h.counts[k]:
            low = h.low + k * h.width
            span = f"{low:g}" if h.whole else f"{low:.6g} to {low + h.width:.6g}"
            text = f"{span}: {h.counts[k]:,} ({h.counts[k] / h.total:.2%})"
            yield place.format(frame.x(k), _TOP, frame.bin_width, frame.floor - _TOP, text)


def _labels(frame: _Frame) -> Iterator[Markup]:
    h = frame.histogram
    first, last = (h.low + k * h.width for k in h.drawn)
    for value in _ticks(first, last, whole=h.whole):
        at = frame.x((value - h.low) / h.width + (0.5 if h.whole else 0))
        if at <= frame.width - _RIGHT + 0.1:
            text = f"{value:g}".replace("-", "\N{MINUS SIGN}")
            label = Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="middle">{}</text>')
            yield label.format(at, frame.height - 6, text)


def _axis(peak: float) -> tuple[float, float]:
    """Return (top of the axis, distance of its lines): at most three round steps."""
    scale = 10.0 ** math.floor(math.log10(peak))
    step = next(
        s for s in (scale * m for m in (0.2, 0.25, 0.5, 1, 2, 2.5, 5)) if math.ceil(peak / s - 1e-9) <= 3
    )
    return step * math.ceil(peak / step - 1e-9), step


def _ticks(low: float, high: float, *, whole: bool) -> list[float]:
    rough = (high - low) / 5
    scale = 10.0 ** math.floor(math.log10(rough))
    step = next(s for s in (scale * m for m in (1, 2, 2.5, 5, 10)) if s >= rough - 1e-12)
    if whole:
        step = max(1, math.ceil(step))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(k * step, 10) for k in range(first, last + 1)]


def draw_molecule(smiles: str) -> Markup:
    """Return the SVG of a molecule; small molecules share one bond length.

    Empty if RDKit can't read `smiles`, or can't draw on this machine (NO_PICTURES says why).
    """
    with rdBase.BlockLogs():
        molecule = Chem.MolFromSmiles(smiles)
    if molecule is None or rdMolDraw2D is None:
        return Markup("")
    canvas = rdMolDraw2D.MolDraw2DSVG(*_PICTURE)
    options = canvas.drawOptions()
    options.clearBackground, options.fixedBondLength, options.padding = False, 22, 0.06
    rdMolDraw2D.PrepareAndDrawMolecule(canvas, molecule)
    canvas.FinishDrawing()
    return _slim(canvas.GetDrawingText(), f"structure of {smiles}")


def _slim(svg: str, label: str) -> Markup:
    """Return RDKit's drawing with one path a colour and classes instead of colours: a fifth of its size."""
    paths: dict[tuple[str, str], list[str]] = {}
    for element in ElementTree.fromstring(svg.encode("iso-8859-1")).iter("{http://www.w3.org/2000/svg}path"):
        style = dict(item.split(":", 1) for item in element.get("style", "").split(";") if ":" in item)
        fill = element.get("fill") or style.get("fill", "none")
        kind, colour = ("line", style.get("stroke", "")) if fill == "none" else ("area", fill)
        data = re.sub(r"\s*([A-Z])\s*", r"\1", element.get("d", "")).strip()
        paths.setdefault((kind, _INKS.get(colour.upper(), "c")), []).append(data)
    drawn = (Markup('<path class="{} {}" d="{}"/>').format(*key, "".join(d)) for key, d in paths.items())
    opening = Markup('<svg class="mol" viewBox="0 0 {} {}" role="img" aria-label="{}">')
    return opening.format(*_PICTURE, label) + Markup("").join(drawn) + Markup("</svg>")
