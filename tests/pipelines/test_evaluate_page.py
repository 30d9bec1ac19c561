"""Run: .venv/bin/python -m pytest tests/pipelines/test_evaluate_page.py   (browser part needs chromium: apt-get install -y chromium)

The page of an evaluation and its pictures: everything is shown, nothing is loaded, hostile names stay text.
"""

import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bitdgdm.pipelines import evaluate_plots as plots
from bitdgdm.pipelines.evaluate import Evaluated
from bitdgdm.pipelines.evaluate_page import compare_page, compare_pictures, figure_text, page, pictures
from bitdgdm.pipelines.pareto_plot import Point, pareto, png, quality_points
from tests.e2e import browser
from tests.e2e.test_report_page import CONTRAST, WIDTHS
from tests.pipelines.fake_evaluation import LAYERS, fake_evaluation, fake_rows

EVIL = """<script>alert(1)</script><img src=http://127.0.0.1:9/x onerror=alert(2)>"'"""
needs_chromium = pytest.mark.skipif(
    browser.CHROMIUM is None, reason="needs Chromium: apt-get install -y chromium"
)


@pytest.fixture(scope="module")
def found() -> Evaluated:
    return fake_evaluation()


@pytest.fixture(scope="module")
def files(found: Evaluated, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    rows = [
        {**r, "case": r["case"].replace(found.recipe, EVIL), "hardware": EVIL, "command": EVIL}
        for r in found.rows
    ]
    hostile = replace(found, recipe=EVIL, model=EVIL, rows=rows, spectra={})
    both = [("a", fake_rows("rtn-w4a4", 1)), ("b", fake_rows("rtn-w8a8", 2))]
    made = {
        "one": page(found, pictures(found)), "hostile": page(hostile, pictures(hostile)),
        "both": compare_page(both, compare_pictures(both)),
    }  # fmt: skip
    for name, text in made.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in made}


@pytest.fixture
def tab() -> Iterator[browser.Tab]:
    with browser.tab() as opened:
        yield opened


def size_of(data: bytes) -> tuple[int, int]:
    assert data.startswith(b"\x89PNG")
    return struct.unpack(">II", data[16:24])


def test_every_picture_is_drawn_small_and_the_same_each_time(found: Evaluated) -> None:
    drawn = pictures(found)
    assert [p.file for p in drawn] == [
        "divergence.png",
        "sensitivity.png",
        "errors.png",
        "outliers.png",
        "spectra.png",
    ]
    for p, again in zip(drawn, pictures(found), strict=True):
        width, height = size_of(p.data)
        assert 700 <= width <= 1300 and 300 <= height <= 900 and len(p.data) < 150_000
        assert p.data == again.data


def test_nothing_gives_no_picture() -> None:
    assert plots.over_time([]) is None and plots.by_kind([]) is None and plots.spectra({}) is None
    assert plots.layer_map([], "output error", "", "") is None and pareto([], "x", "y", "t") is None
    assert pareto([Point("a", 1.0, 0.0)], "x", "y", "t", log_y=True) is None
    assert pictures(Evaluated("m", "d", "r", "s", fake_rows("r", samples=0)[:3], {})) == []


def test_the_front_holds_what_nothing_beats() -> None:
    rng = np.random.default_rng(0)
    points = [Point(str(i), float(x), float(y)) for i, (x, y) in enumerate(rng.random((40, 2)))]
    figure = pareto(points, "x", "y", "t", best="low")
    assert figure is not None
    front = max(
        figure.axes[0].lines, key=lambda line: len(line.get_xdata()) if line.get_marker() == "None" else 0
    )
    shown = set(zip(front.get_xdata(), front.get_ydata(), strict=True))
    unbeaten = {
        (p.x, p.y) for p in points if not any((q.x <= p.x and q.y <= p.y) and q is not p for q in points)
    }
    assert shown == unbeaten
    assert {t.get_text() for t in figure.axes[0].texts} == {p.label for p in points if (p.x, p.y) in unbeaten}


def test_a_point_takes_its_interval_from_the_row() -> None:
    rows = fake_rows("rtn-w4a4", 1)
    (point,) = [p for p in quality_points(rows, "bits a weight", "validity") if p.label == "rtn-w4a4"]
    assert point.low is not None and point.high is not None and point.low < point.y < point.high
    assert size_of(png(pareto([point], "x", "y", "t", best="high")))[0] > 500  # type: ignore[arg-type]


def test_a_map_has_a_row_a_kind_and_shows_the_worst(found: Evaluated) -> None:
    figure = plots.layer_map(found.rows, "output error", "t", "%")
    assert figure is not None
    depth, time = (axes.images[0].get_array() for axes in figure.axes[:2])
    values = [r["value"] for r in found.rows if r["metric"] == "output error" and ", t=" in r["case"]]
    assert depth.shape == (22, 9) and time.shape == (22, 10)
    assert np.nanmax(depth) == np.nanmax(time) == max(values)
    assert np.isnan(np.asarray(depth.filled(np.nan))).sum() == 22 * 9 - len(LAYERS)


def test_the_page_holds_every_figure_of_the_whole_model_and_its_worst_layers(
    found: Evaluated, files: dict[str, Path]
) -> None:
    text = files["one"].read_text()
    for r in found.rows:
        if r["case"] == found.recipe:
            assert figure_text(r) in text and r["metric"].replace("'", "&#39;") in text
    errors = {
        r["case"].rpartition(" ")[2]: r["value"]
        for r in found.rows
        if r["metric"] == "output error" and ", t=" not in r["case"]
    }
    worst = sorted(errors, key=lambda name: -errors[name])
    assert worst[0] in text and worst[-1] not in text and text.count("data:image/png") == 5


def test_a_hostile_name_is_text(files: dict[str, Path]) -> None:
    text = files["hostile"].read_text()
    assert "<script" not in text and "onerror=alert(2)>" not in text and "&lt;script&gt;" in text


@needs_chromium
@pytest.mark.parametrize("name", ["one", "hostile", "both"])
def test_the_page_is_silent_loads_nothing_and_fits(
    files: dict[str, Path], tab: browser.Tab, name: str
) -> None:
    tab.open(files[name].as_uri())
    assert tab.seen("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown") == []
    requested = [event["request"]["url"] for event in tab.seen("Network.requestWillBeSent")]
    assert [url for url in requested if not url.startswith("data:")] == [files[name].as_uri()]
    broken = "[...document.images].filter(i => !i.complete || !i.naturalWidth).length"
    assert tab.value(broken) == 0
    for width in WIDTHS:
        tab.look(width)
        assert tab.value("document.documentElement.scrollWidth") <= width, f"{width} px"


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_of_the_page_is_readable(files: dict[str, Path], tab: browser.Tab, scheme: str) -> None:
    tab.open(files["one"].as_uri())
    tab.look(1280, scheme)
    contrast = tab.value(CONTRAST)
    assert len(contrast) > 10
    assert {key: value for key, value in contrast.items() if value < 4.5} == {}
