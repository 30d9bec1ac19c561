"""The scoreboard for people: tables by stored bits, the studies of the paper beside ours, pictures.

Guarantees: every figure of ours comes from rows of question "scoreboard"; figures of the paper are marked as published
and carry where they are from.
Knows nothing of: how rows were measured.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bitdgdm.infra.rows import ends
from bitdgdm.pipelines.measure import BITS, KL
from bitdgdm.pipelines.pareto_plot import Point, pareto, png

QUESTION = "scoreboard"
Row = dict[str, Any]
Metrics = dict[str, Row]
_SAMPLED = re.compile(r"^(?P<recipe>.+), (?P<count>\d+) samples, (?P<steps>\d+) steps$")
_PAPER = "Bit-DGDM, PMLR 267:19996-20015; CATH with GraDe-IF, W4A4"
# Source: abstract and public reviews of the paper. Rank, perplexity, recovery %, speed, memory GB (workspace included).
PUBLISHED_RANKS = {8: (5.1, 46.5, 2.6, 4.7), 16: (4.5, 51.6, 2.5, 4.9), 32: (4.5, 51.8, 2.2, 5.4)}
_RANKS = ("bitdgdm-w4a4-r{}-s1-f16", "bitdgdm-w4a4-r{}-s1")  # factors in 16 bit, as published, and in 8
_ABLATIONS = (
    ("the method (reading R2)", "perplexity 4.5, 2.5 x", "bitdgdm-w4a4-r16-s1"),
    ("(ii) weight outliers by magnitude, the rest dense", '"competitive", 2.2 x', "bitdgdm-r3-w4a4-s1"),
    ("(ii) the same, then rank 16 of the rest", "", "bitdgdm-threshold-w4a4-r16-s1"),
    (
        "(iii) without the product of sparse inputs and sparse weights",
        "perplexity 4.7, 2.6 x",
        "bitdgdm-minus-w4a4-r16-s1",
    ),
    ("(iii) taken to its end: nothing sparse", "", "bitdgdm-nosparse-w4a4-r16"),
    ("the literal reading R1: factors and sparse alone", "", "bitdgdm-r1-w4a4-r16-s5"),
)


def boards(rows: Sequence[Row]) -> dict[str, dict[str, Metrics]]:
    """Return {hardware: {recipe: {metric: row}}}; figures of samples take their place beside the others.

    Of several numbers of samples the largest counts.
    """
    found: dict[str, dict[str, Metrics]] = {}
    order = sorted((r for r in rows if r["question"] == QUESTION), key=lambda r: _samples(r["case"]))
    for r in order:
        sampled = _SAMPLED.match(r["case"])
        recipe = sampled["recipe"] if sampled else r["case"]
        found.setdefault(r["hardware"], {}).setdefault(recipe, {})[r["metric"]] = r
    return found


def _samples(case: str) -> int:
    sampled = _SAMPLED.match(case)
    return int(sampled["count"]) if sampled else 0


def section(rows: Sequence[Row]) -> str:
    """Return the tables of every hardware, the best known first: the one with most samples."""
    found = boards(rows)
    if not found:
        return "_No result file yet: `python benchmarks/scoreboard.py`, then `make results`._\n"
    parts = []
    for hardware in sorted(found, key=lambda h: -sum("validity" in m for m in found[h].values())):
        board = found[hardware]
        parts.append(f"### {hardware}\n\n{_table(board)}\n{_origins(board)}\n")
    return "\n".join(parts)


def brief(rows: Sequence[Row]) -> str:
    """Return the table of what was sampled on the hardware with most samples, without what few look for.

    Variants of the published method are in the tables of `ranks` and `ablations`.
    """
    method = _ABLATIONS[0][2]
    variants = {name.format(rank) for rank in PUBLISHED_RANKS for name in _RANKS} | {name for *_, name in _ABLATIONS}
    sampled = {name: of for name, of in _best(rows).items() if "validity" in of and name not in variants - {method}}
    left_out = ("weight error, median", "quantize", "novelty (of distinct)", "scaffold similarity")
    return _table(sampled, left_out) if sampled else "_No samples yet._\n"


_TITLES = (
    (BITS, "bits a weight"), (KL, "KL, 1e-4"), ("weight error, median", "weight error"), ("quantize", "quantize"),
    ("validity", "valid"), ("uniqueness (distinct of valid)", "unique"), ("novelty (of distinct)", "novel"), ("FCD", "FCD"),
    ("scaffold similarity", "scaffolds"), ("molecules/s, ids to graphs", "molecules/s"),
)  # fmt: skip


def _table(board: dict[str, Metrics], left_out: Sequence[str] = ()) -> str:
    titles = [(m, t) for m, t in _TITLES if m not in left_out]
    there = [(m, t) for m, t in titles if any(m in of for of in board.values())]
    lines = [["recipe", *(t for _, t in there)]]
    for name, of in sorted(
        board.items(), key=lambda item: (_value(item[1], BITS, 99.0), _value(item[1], KL, 0.0))
    ):
        lines.append(
            [
                f"`{name}`" if not name.startswith("full-precision") else name,
                *(_cell(of.get(m)) for m, _ in there),
            ]
        )
    return _markdown(lines)


def _value(of: Metrics, metric: str, otherwise: float) -> float:
    return of[metric]["value"] if metric in of else otherwise


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    value, unit = row["value"], row["unit"]
    if unit == "%":
        text = f"{value:.2f} %"
    elif row["metric"] == BITS:
        text = f"{value:.2f}"
    else:
        text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
        text = f"{text} {unit}" if unit == "s" else text
    interval = ends(row["spread"])
    return f"{text} ({row['spread'].replace('..', ' to ')})" if interval else text


def ranks(rows: Sequence[Row]) -> str:
    """Return the rank study: the paper's figures beside ours."""
    board = _best(rows)
    lines = [[
        "rank", "published perplexity", "published recovery", "published speed", "published memory", "our recipe",
        "our bits a weight", "our KL, 1e-4", "our weight error", "our validity", "our FCD",
    ]]  # fmt: skip
    for rank, (perplexity, recovery, speed, memory) in PUBLISHED_RANKS.items():
        of_paper = [f"{perplexity}", f"{recovery} %", f"{speed} x", f"{memory} GB"]
        for k, name in enumerate(name.format(rank) for name in _RANKS):
            lines.append([str(rank), *(of_paper if k == 0 else [""] * 4), f"`{name}`", *_ours(board, name)])
    return (
        _markdown(lines)
        + f"\nPublished: {_PAPER}. Ours: DiGress on QM9; the two tasks can't be compared, the trend can.\n"
    )


def ablations(rows: Sequence[Row]) -> str:
    """Return the ablations: the paper's figures beside ours."""
    board = _best(rows)
    lines = [
        [
            "variant",
            "published",
            "our recipe",
            "our bits a weight",
            "our KL, 1e-4",
            "our weight error",
            "our validity",
            "our FCD",
        ]
    ]
    for meaning, published, recipe in _ABLATIONS:
        lines.append([meaning, published, f"`{recipe}`", *_ours(board, recipe)])
    return _markdown(lines) + f"\nPublished: {_PAPER}.\n"


def _ours(board: dict[str, Metrics], recipe: str) -> list[str]:
    of = board.get(recipe, {})
    return [_cell(of.get(m)) for m in (BITS, KL, "weight error, median", "validity", "FCD")]


# of a network and its weights: the same on every machine up to rounding
_ANYWHERE = (BITS, KL, "weight error, median")


def _best(rows: Sequence[Row]) -> dict[str, Metrics]:
    """Return the board with most samples; what no machine changes comes from another board where it has none."""
    found = boards(rows)
    least_first = sorted(
        found.values(), key=lambda board: (sum("validity" in m for m in board.values()), len(board))
    )
    if not least_first:
        return {}
    *others, most = least_first
    best: dict[str, Metrics] = {}
    for board in others:
        for name, of in board.items():
            best.setdefault(name, {}).update({m: of[m] for m in _ANYWHERE if m in of})
    for name, of in most.items():
        best.setdefault(name, {}).update(of)
    return best


def pictures(rows: Sequence[Row]) -> dict[str, bytes]:
    """Return {file name: PNG} of the board with most samples; none if there is no board."""
    board = {name: of | _invalid(of) for name, of in _best(rows).items()}
    full = board.get("full-precision", {})
    drawn = {}
    for file, (x, y, x_title, y_title) in _PICTURES.items():
        points = [_point(name, of, x, y) for name, of in board.items() if x in of and y in of]
        if x == _RATE and not any(p.group == "our kernels" for p in points):
            continue  # fake quantization costs time that says nothing of the recipe
        level = ("full precision", full[y]["value"]) if y in full else None
        subject = y_title.split(",")[0]
        title = f"{subject[0].upper()}{subject[1:]} by recipe, QM9"
        figure = pareto(points, x_title, y_title, title, log_x=x == _RATE, log_y=True, level=level)
        if figure is not None and len(points) > 1:
            drawn[file] = png(figure, dpi=100)
    return drawn


_RATE, _INVALID = "molecules/s, ids to graphs", "invalid"
_PICTURES = {
    "scoreboard-size-kl.png": (BITS, KL, "stored bits a weight", "KL to full precision, 1e-4"),
    "scoreboard-size-invalid.png": (BITS, _INVALID, "stored bits a weight", "invalid molecules, %"),
    "scoreboard-size-fcd.png": (BITS, "FCD", "stored bits a weight", "FCD to held-out molecules"),
    "scoreboard-speed-kl.png": (_RATE, KL, "ms a molecule, drawing alone", "KL to full precision, 1e-4"),
}


def _invalid(of: Metrics) -> Metrics:
    """What is missing to a validity of 100 %: the part that a logarithmic axis can show."""
    if "validity" not in of:
        return {}
    row = of["validity"]
    low, high = ends(row["spread"]) or (row["value"], row["value"])
    return {_INVALID: {**row, "value": 100 - row["value"], "spread": f"{max(100 - high, 1e-3)}..{100 - low}"}}


def _point(name: str, of: Metrics, x: str, y: str) -> Point:
    low, high = ends(of[y]["spread"]) or (None, None)
    value = of[x]["value"]
    if x == _RATE:
        return Point(name, 1000 / value, of[y]["value"], low, high, of[x]["baseline"])
    widths = re.search(r"-(w\d+a\d+)", name)
    return Point(name, value, of[y]["value"], low, high, widths[1] if widths else name)


def write_pictures(rows: Sequence[Row], folder: Path) -> list[str]:
    """Write the pictures; return their names."""
    drawn = pictures(rows)
    for file, data in drawn.items():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(data)
    return list(drawn)


def gallery(rows: Sequence[Row], folder: Path) -> str:
    """Return the Markdown that shows the pictures that are there."""
    titles = {
        "scoreboard-size-kl.png": "KL to full precision against stored bits a weight; the dashed line joins recipes that none beats",
        "scoreboard-size-invalid.png": "Share of invalid molecules against stored bits a weight",
        "scoreboard-size-fcd.png": "Fréchet ChemNet distance against stored bits a weight",
        "scoreboard-speed-kl.png": "KL against the time to draw a molecule, by what ran",
    }
    return "\n".join(
        f"![{title}](pictures/{file})\n" for file, title in titles.items() if (folder / file).exists()
    )


_PLACES = re.compile(r" --(?:results|artifacts|tables|limit) \S+| --again")
_NAMES = re.compile(r" --recipes(?: (?!--)\S+)+")


def _origins(board: dict[str, Metrics]) -> str:
    """Who made the rows: commands without their places and lists of names, once each."""
    made = dict.fromkeys(
        (
            r["date"],
            r["commit"],
            json.dumps(r["versions"]),
            _NAMES.sub(" --recipes ...", _PLACES.sub("", r["command"])),
        )
        for of in board.values()
        for r in of.values()
    )
    return "".join(
        f"- {date}, code {commit}, {', '.join(f'{k} {v}' for k, v in json.loads(versions).items() if v != 'None')}: `{command}`\n"
        for date, commit, versions, command in made
    )


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    head, *body = lines
    rule = ["---", *("---:" for _ in head[1:])]
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, rule, *body))
