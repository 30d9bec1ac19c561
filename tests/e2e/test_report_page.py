"""Run: .venv/bin/python -m pytest tests/e2e/test_report_page.py (needs chromium: apt-get install -y chromium)

The report in a real browser: silent, self-contained, readable in light, dark, narrow and on paper.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bitdgdm.pipelines.report import write_report
from tests.e2e import browser
from tests.pipelines.fake_campaign import make_campaign

pytestmark = pytest.mark.skipif(
    browser.CHROMIUM is None, reason="needs Chromium: apt-get install -y chromium"
)
EVIL = """<script>alert(1)</script><img src=http://127.0.0.1:9/x onerror=alert(2)>"'<svg onload=alert(3)>"""
WIDTHS = (360, 768, 1280)

# Contrast of every piece of text with the nearest opaque colour behind it. Source: WCAG 2.2, relative luminance.
CONTRAST = """
(() => {
  const rgb = c => c.match(/[\\d.]+/g).map(Number);
  const part = v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const lum = c => { const [r, g, b] = rgb(c).map(part); return 0.2126 * r + 0.7152 * g + 0.0722 * b };
  const behind = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
    const v = rgb(c); if (v.length === 3 || v[3] === 1) return c } return 'rgb(255, 255, 255)' };
  const worst = {};
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) { const e = walk.currentNode.parentElement;
    if (!walk.currentNode.data.trim() || !e.getClientRects().length || e.closest('title, style')) continue;
    const style = getComputedStyle(e), ink = e.closest('svg') ? style.fill : style.color;
    const [a, b] = [lum(ink), lum(behind(e))].sort((x, y) => y - x);
    const key = e.tagName + '.' + e.className; worst[key] = Math.min(worst[key] ?? 99, (a + 0.05) / (b + 0.05)) }
  return worst })()
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    made = {
        "complete": make_campaign(str(folder / "complete")),
        "partial": make_campaign(str(folder / "partial"), missing=[1, 4], quarantined=[4]),
        "empty": make_campaign(str(folder / "empty"), units=1, missing=[0]),
        "hostile": make_campaign(
            str(folder / "hostile"), name=EVIL, hardware=EVIL, error=EVIL, missing=[2], quarantined=[2],
            spec={"model": EVIL},
        ),
    }  # fmt: skip
    return {name: Path(write_report(store.url)) for name, store in made.items()}


@pytest.fixture
def tab() -> Iterator[browser.Tab]:
    with browser.tab() as found:
        yield found


@pytest.mark.parametrize("name", ["complete", "partial", "empty", "hostile"])
def test_the_page_renders_without_a_word_on_the_console_or_a_request(
    pages: dict[str, Path], tab: browser.Tab, name: str
) -> None:
    tab.open(pages[name].as_uri())
    assert tab.value("document.readyState") == "complete"
    assert tab.seen("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown") == []
    assert tab.seen("Page.javascriptDialogOpening") == []
    requested = [event["request"]["url"] for event in tab.seen("Network.requestWillBeSent")]
    assert [url for url in requested if not url.startswith("data:")] == [pages[name].as_uri()]


def test_a_hostile_campaign_name_is_shown_as_it_is_and_runs_nothing(
    pages: dict[str, Path], tab: browser.Tab
) -> None:
    tab.open(pages["hostile"].as_uri())
    assert tab.value("document.querySelector('h1').textContent") == EVIL
    assert tab.value("document.querySelectorAll('script, img, [onload], [onerror]').length") == 0
    assert tab.value("document.title").startswith(EVIL)


@pytest.mark.parametrize("name", ["complete", "partial", "empty", "hostile"])
def test_nothing_sticks_out_at_the_side_of_a_phone_a_tablet_or_a_desktop(
    pages: dict[str, Path], tab: browser.Tab, name: str
) -> None:
    tab.open(pages[name].as_uri())
    for width in WIDTHS:
        tab.look(width)
        assert tab.value("document.documentElement.scrollWidth") <= width, f"{width} px"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_is_readable_in_both_colour_schemes(
    pages: dict[str, Path], tab: browser.Tab, scheme: str
) -> None:
    tab.open(pages["partial"].as_uri())
    tab.look(1280, scheme)
    contrast: dict[str, Any] = tab.value(CONTRAST)
    assert len(contrast) > 20
    assert {key: value for key, value in contrast.items() if value < 4.5} == {}


def test_the_dark_scheme_is_dark_and_paper_is_white(pages: dict[str, Path], tab: browser.Tab) -> None:
    tab.open(pages["complete"].as_uri())
    page = (
        "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number).reduce((a, b) => a + b)"
    )
    tab.look(1280, "dark")
    assert tab.value(page) < 150
    tab.look(1280, "dark", media="print")
    assert tab.value(page) == 3 * 255


def test_a_printed_report_is_a_pdf_of_a_few_pages(pages: dict[str, Path], tab: browser.Tab) -> None:
    tab.open(pages["complete"].as_uri())
    pdf = tab.pdf()
    assert pdf.startswith(b"%PDF-")
    assert 2 <= pdf.count(b"/Type /Page\n") <= 6


def test_text_in_charts_and_pictures_has_the_size_of_small_print(
    pages: dict[str, Path], tab: browser.Tab
) -> None:
    tab.open(pages["complete"].as_uri())
    heights = "[...document.querySelectorAll('.tick')].map(t => t.getBoundingClientRect().height)"
    for width in WIDTHS:
        tab.look(width)
        assert min(tab.value(heights)) >= 10 and max(tab.value(heights)) <= 26, f"{width} px"


def test_the_report_command_prints_where_the_page_is(
    pages: dict[str, Path], bitdgdm: Any, tmp_path: Path
) -> None:
    campaign = str(pages["complete"].parent)
    to = tmp_path / "page.html"
    assert bitdgdm.json("report", campaign, "--to", str(to)) == {"report": str(to)}
    assert to.read_bytes() == pages["complete"].read_bytes()
    assert bitdgdm("report", campaign).stdout.split() == [str(pages["complete"])]
