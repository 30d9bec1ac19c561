"""`evaluation.html`: one page about one model, or about several side by side.

Guarantees: the page is a function of the rows; it needs nothing else, holds no script and loads nothing; all that a
file could have written in it is escaped.
Knows nothing of: how figures were measured.
"""

import base64
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from matplotlib.figure import Figure

from bitdgdm.infra.rows import Row
from bitdgdm.infra.version import VERSION
from bitdgdm.pipelines import evaluate_plots as plots
from bitdgdm.pipelines.evaluate import Evaluated
from bitdgdm.pipelines.measure import BITS, KL, OWN_KL, SIZE
from bitdgdm.pipelines.pareto_plot import pareto, png, quality_points

_TEMPLATE = Path(__file__).with_name("evaluate.html.j2")
_SPEED = "time of a network call, of full precision's"
WHAT = {
    BITS: "of the quantized layers: scales, factors, sparse entries and indices included",
    SIZE: "the artifact on disk",
    KL: "KL_X + 5 KL_E of the predicted molecule, full precision against this, on noised molecules it was not trained on",
    OWN_KL: "the same on the states that full precision goes through when it samples",
    "NLL bound": "upper bound of the negative log-likelihood of held-out molecules",
    "NLL by the published code's formula": "to compare with published figures: every edge counts twice there",
    "NLL bound, above full precision": "the same molecules and times for both",
    "validity": "RDKit accepts the graph as it is",
    "relaxed validity": "the same with a positive charge allowed where N, O or S has one bond more",
    "valid and connected": "and in one piece",
    "uniqueness (distinct of valid)": "distinct canonical SMILES",
    "novelty (of distinct)": "not in the set of known molecules",
    "FCD": "Fréchet ChemNet distance to the held-out molecules, 0 is best",
    "scaffold similarity": "cosine of the counts of Bemis-Murcko scaffolds with two rings or more, 1 is best",
    "fragment similarity": "cosine of the counts of BRICS fragments, 1 is best",
    "similarity to nearest (SNN)": "mean Tanimoto similarity to the nearest held-out molecule",
    _SPEED: "fake quantization in PyTorch: what the recipe computes, not what kernels would take",
}


@dataclass(frozen=True)
class Picture:
    """One picture of a page. file: its name on disk."""

    file: str
    title: str
    note: str
    data: bytes

    @property
    def source(self) -> str:
        return f"data:image/png;base64,{base64.b64encode(self.data).decode()}"


def figure_text(row: Row) -> str:
    """Return the value as people write it."""
    value, unit = row["value"], row["unit"]
    if unit == "%":
        return f"{value:.2f} %"
    number = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{number} {unit}".strip()


def interval_text(row: Row) -> str:
    """Return the interval or range of a row, "" if it has none."""
    return row["spread"].replace("..", " to ")


def summary(rows: Sequence[Row], case: str) -> list[Row]:
    """Return the rows of the whole model: those of no layer, kind or time."""
    return [r for r in rows if r["case"] == case]


def pictures(found: Evaluated) -> list[Picture]:
    """Return every picture that the rows allow."""
    drawn: tuple[tuple[str, str, str, Figure | None], ...] = (
        ("divergence.png", "Over the diffusion time", "Distance of the predictions to full precision's at each time.", plots.over_time(found.rows)),
        ("sensitivity.png", "Sensitivity", "Only the layers of one kind are quantized, the rest is full precision.", plots.by_kind(found.rows)),
        ("errors.png", "Error of each layer's output", "Each layer gets the input that full precision gives it; error of the output in % of its size. White: not in the last layer.",
         plots.layer_map(found.rows, "output error", "Relative error of outputs", "%")),
        ("outliers.png", "Outliers of each layer's input", "Largest entry over the standard deviation: what a low-bit grid has to span.",
         plots.layer_map(found.rows, "input max over sigma", "Largest input over its standard deviation", "max / sigma")),
        ("spectra.png", "Singular values of the weights", "Median over layers; a low-rank part pays where a curve falls at once.", plots.spectra(found.spectra)),
    )  # fmt: skip
    return [Picture(file, title, note, png(figure)) for file, title, note, figure in drawn if figure]


def page(found: Evaluated, drawn: Sequence[Picture]) -> str:
    """Return the page of one model."""
    whole = summary(found.rows, found.recipe)
    of = {r["metric"]: r for r in whole}
    tiles = [of[m] for m in (BITS, KL, "validity", "FCD") if m in of]
    layers = sorted(
        _layers(found.rows), key=lambda line: -line["output error"]["value"] if "output error" in line else 0
    )
    return _render(
        title=found.recipe, eyebrow="Bit-DGDM evaluation", subtitle=f"{found.model} against {found.source}",
        tiles=tiles, tables=[("Figures", ["metric", "value", "95 % interval or range", "n", "what it is"], [
            [r["metric"], figure_text(r), interval_text(r), f"{r['n']:,}", WHAT.get(r["metric"], "")] for r in whole
        ])], pictures=drawn, layers=layers[:24], all_layers=len(layers), origin=found.rows[0], digest=found.digest,
    )  # fmt: skip


def compare_page(found: Sequence[tuple[str, Sequence[Row]]], drawn: Sequence[Picture]) -> str:
    """Return the page of several models: one column each."""
    wholes = [(name, {r["metric"]: r for r in summary(rows, rows[0]["case"])}) for name, rows in found]
    metrics = list(dict.fromkeys(m for _, of in wholes for m in of))
    lines = [
        [m, *(f"{figure_text(of[m])}{_small(of[m])}" if m in of else "" for _, of in wholes)] for m in metrics
    ]
    return _render(
        title=" · ".join(name for name, _ in found), eyebrow="Bit-DGDM comparison", subtitle=f"{len(found)} evaluations",
        tiles=[], tables=[("Side by side", ["metric", *(name for name, _ in found)], lines)], pictures=drawn,
        layers=[], all_layers=0, origin=found[0][1][0], digest="",
    )  # fmt: skip


def compare_pictures(found: Sequence[tuple[str, Sequence[Row]]]) -> list[Picture]:
    """Return Pareto pictures of several models: against size and against time."""
    rows = [{**r, "case": name} for name, of in found for r in summary(of, of[0]["case"])]
    kl, valid = "KL to full precision, 1e-4", "validity, %"
    wanted = (
        ("size-kl.png", "KL against size", quality_points(rows, BITS, KL), "stored bits a weight", kl, True, "low"),
        ("time-kl.png", "KL against time", quality_points(rows, _SPEED, KL), "time of a network call, of full precision's", kl, True, "low"),
        ("size-validity.png", "Validity against size", quality_points(rows, BITS, "validity"), "stored bits a weight", valid, False, "high"),
        ("size-fcd.png", "FCD against size", quality_points(rows, BITS, "FCD"), "stored bits a weight", "FCD", False, "low"),
    )  # fmt: skip
    drawn = []
    for file, title, points, x, y, log_y, best in wanted:
        figure = pareto(points, x, y, title, log_y=log_y, best=best, label_all=True)
        if figure is not None:
            drawn.append(
                Picture(file, title, "The dashed line joins those that no other beats.", png(figure))
            )
    return drawn


def _small(row: Row) -> str:
    return f" ({interval_text(row)})" if row["spread"] else ""


def _layers(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for r in rows:
        _, mark, name = r["case"].partition(", layer ")
        if mark and ", t=" not in name:
            found.setdefault(name, {"name": name})[r["metric"]] = r
    yield from found.values()


def _render(**values: Any) -> str:
    made = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    made.filters["figure"], made.filters["interval"] = figure_text, interval_text
    return made.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(version=VERSION, **values)
