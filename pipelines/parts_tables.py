"""The parts of layers as tables on a terminal.

Knows nothing of: how the figures were found (parts_report.py).
Guarantees: a figure that isn't known is a dash.
"""

from collections.abc import Sequence

from rich.table import Table

from bitdgdm.pipelines.console import table
from bitdgdm.pipelines.parts_report import LayerParts, Part, by_kind

MEANING = (
    "cost: stored bits a weight. worth: bits a weight that the remainder would need to make up for the part, "
    "log2(error without it / error). A part earns its cost (yes) if it is worth more than it stores."
)


def layers_table(layers: Sequence[LayerParts]) -> Table:
    """One line a layer: its error, then cost, error without, worth and verdict of each part."""
    names = _names(layers)
    head = [
        "layer",
        "of",
        "error",
        "remainder",
        *(title for n in names for title in (n, "without", "worth", "earns")),
    ]
    lines = []
    for layer in layers:
        of = {p.name: p for p in layer.parts}
        cells = [cell for n in names for cell in _cells(of.get(n))]
        lines.append([layer.layer, layer.of, _percent(layer.error), f"{layer.rest:.2f}", *cells])
    return table(
        head, lines, title=f"{len(layers)} layers: cost in bits a weight, errors with and without each part"
    )


def kinds_table(layers: Sequence[LayerParts]) -> Table:
    """One line a kind of layer: means, and in how many layers each part earns its cost."""
    names, kinds = _names(layers), by_kind(layers)
    head = ["kind", "layers", "error", *(title for n in names for title in (n, "worth", "earns in"))]
    lines = []
    for kind in kinds:
        of = {p[0]: p for p in kind.parts}
        cells: list[str] = []
        for n in names:
            if n not in of:
                cells += ["-"] * 3
                continue
            _, bits, worth, earns = of[n]
            cells += [
                f"{bits:.2f}",
                "-" if worth is None else f"{worth:.2f}",
                f"{earns} of {kind.layers}" if bits else "-",
            ]
        lines.append([kind.kind, str(kind.layers), _percent(kind.error), *cells])
    return table(head, lines, title="by kind of layer")


def _names(layers: Sequence[LayerParts]) -> list[str]:
    return list(dict.fromkeys(p.name for layer in layers for p in layer.parts))


def _cells(part: Part | None) -> list[str]:
    if part is None:
        return ["-"] * 4
    verdict = "-" if part.earns is None else "yes" if part.earns else "no"
    worth = "-" if part.worth is None else f"{part.worth:.2f}"
    return [
        f"{part.bits:.2f}" if part.bits else "-",
        "-" if part.without is None else _percent(part.without),
        worth,
        verdict,
    ]


def _percent(error: float) -> str:
    return f"{100 * error:.2f} %"
