"""Run: .venv/bin/python -m pytest tests/pipelines/test_report_charts.py

What the report draws and rounds, without a campaign: intervals, percentages, quantiles, pictures.
"""

import html
import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitdgdm.pipelines.report_charts import Histogram, draw_histogram, draw_molecule
from bitdgdm.pipelines.report_facts import Share

SVG = "{http://www.w3.org/2000/svg}"


@given(st.integers(0, 5000), st.integers(1, 5000))
def test_intervals_are_the_roots_of_the_score_equation(part: int, whole: int) -> None:
    part = min(part, whole)
    p, z2 = part / whole, 1.959963984540054**2
    # |p - x| = z sqrt(x (1 - x) / n), squared and solved for x
    low, high = sorted(np.roots([1 + z2 / whole, -2 * p - z2 / whole, p * p]).real)
    assert Share(part, whole).interval == pytest.approx((max(0, low), min(1, high)), abs=1e-7)


@given(st.integers(0, 20_000), st.integers(1, 20_000))
def test_all_and_none_are_said_only_of_all_and_none(part: int, whole: int) -> None:
    part = min(part, whole)
    text = Share(part, whole).text.removesuffix("\N{NO-BREAK SPACE}%")
    assert (text == "100") == (part == whole)
    assert (text == "0") == (part == 0)
    assert float(text) == pytest.approx(100 * part / whole, abs=0.1)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=400))
def test_quantiles_of_whole_numbers_are_those_of_the_sorted_list(values: list[int]) -> None:
    h = Histogram(0, 1, np.bincount(values, minlength=31).tolist(), whole=True)
    for q in (0.05, 0.5, 0.95):
        assert h.quantile(q) == sorted(values)[math.ceil(q * len(values)) - 1]


@given(
    st.lists(st.integers(0, 10**7), min_size=1, max_size=60).filter(any), st.booleans(),
    st.sampled_from([(0.0, 0.02), (-8.0, 0.25), (0.0, 1.0), (0.0, 5.0)]),
)  # fmt: skip
def test_any_histogram_becomes_a_picture_inside_its_frame(
    counts: list[int], whole: bool, axis: tuple[float, float]
) -> None:
    h = Histogram(axis[0], 1.0 if whole else axis[1], counts, whole)
    svg = str(draw_histogram(h, "a & b < c")).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    root = ElementTree.fromstring(svg)
    assert root.get("aria-label") == "a & b < c"
    path = root.find(f"{SVG}path[@class='bars']")
    assert path is not None
    down = [float(v) for v in re.findall(r"V(-?[\d.]+)", path.get("d", ""))]
    across = [float(v) for v in re.findall(r"H(-?[\d.]+)", path.get("d", ""))]
    assert all(0 <= v <= 150 for v in down) and all(0 <= v <= 320 for v in across)
    shown = sum(
        int(t.text.split(": ")[1].split(" ")[0].replace(",", "")) for t in root.iter(f"{SVG}title") if t.text
    )
    assert shown >= 0.998 * sum(counts)
    assert 2 <= len(root.findall(f"{SVG}path[@class='grid']")) <= 4


def test_a_picture_shows_every_kind_of_atom_in_its_colour() -> None:
    svg = str(draw_molecule("NC(=O)CF"))
    assert {'class="area n"', 'class="area o"', 'class="area f"', 'class="line c"'} <= set(
        re.findall(r'class="\w+ \w+"', svg)
    )
    assert html.escape("NC(=O)CF") in svg
