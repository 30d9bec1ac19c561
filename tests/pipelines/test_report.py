"""Run: .venv/bin/python -m pytest tests/pipelines/test_report.py

The report page without a browser: its numbers against DuckDB, its order-independence, its escaping, its snippets.
How it looks and behaves in a browser: tests/e2e/test_report_page.py.
"""

import random
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import duckdb
import pytest
import typer

from bitdgdm.infra.commit import read_commits, read_quarantine, visible_shards
from bitdgdm.infra.errors import CampaignDamaged, CampaignNotFound
from bitdgdm.infra.storage import Store
from bitdgdm.models.summary import BINS
from bitdgdm.pipelines.campaign import load_campaign
from bitdgdm.pipelines.cli import app
from bitdgdm.pipelines.report import SAMPLE, render, write_report
from bitdgdm.pipelines.report_census import take_census
from bitdgdm.pipelines.report_charts import draw_molecule
from bitdgdm.pipelines.report_facts import PROPERTIES
from tests.pipelines.fake_campaign import SMILES, make_campaign

SVG = "{http://www.w3.org/2000/svg}"
VOID = {"meta", "link", "br"}
BREAKS = {"br", "p", "div", "dd", "dt", "td", "th", "h3", "li"}


class Page(HTMLParser):
    """Every element of a page with its attributes and the text inside it, script-like elements refused."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self._open: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.feed(text)
        assert not self._open, f"not closed: {[tag for tag, _, _ in self._open]}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = (tag, dict(attrs), list[str]())
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(element)
        if tag in BREAKS:
            self.handle_data(" ")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), []))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        for _, _, texts in self._open:
            texts.append(data)

    def text(self, tag: str = "main", **attributes: str) -> str:
        """Return the text of the first such element, blanks squeezed."""
        for found, attrs, texts in self.elements:
            if found == tag and all(attrs.get(key.rstrip("_")) == value for key, value in attributes.items()):
                return " ".join("".join(texts).replace("\N{NO-BREAK SPACE}", " ").split())
        raise AssertionError(f"there is no <{tag}> with {attributes}")


def page_of(url: object) -> Page:
    where = write_report(str(url))
    return Page(Path(where).read_text(encoding="utf-8"))


def card(page: Page, title: str) -> str:
    for tag, attrs, texts in page.elements:
        if tag == "div" and attrs.get("class") == "card figure":
            text = " ".join("".join(texts).replace("\N{NO-BREAK SPACE}", " ").split())
            if text.startswith(title):
                return text
    raise AssertionError(f"there is no card {title!r}")


def parts(text: str) -> tuple[int, int]:
    """Return (part, whole) of "99.1 % 1,234 of 5,678 ..."."""
    found = re.search(r"([\d,]+) of ([\d,]+)", text)
    assert found, text
    return int(found[1].replace(",", "")), int(found[2].replace(",", ""))


def query(store: Store, sql: str) -> list[tuple]:
    shards = [store.path(key) for key in visible_shards(store)]
    return duckdb.execute(sql, {"shards": shards}).fetchall()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_campaign(str(tmp_path_factory.mktemp("finished") / "campaign"))


def test_the_shares_on_the_page_equal_an_independent_count_over_the_parquet(finished: Store) -> None:
    page = page_of(finished.url)
    rows, valid, unique, novel, relaxed, whole, alerted = query(
        finished,
        """SELECT count(*), count(*) FILTER (is_valid), count(DISTINCT smiles) FILTER (is_valid),
                  count(DISTINCT smiles) FILTER (is_valid AND is_novel), count(*) FILTER (is_valid_relaxed),
                  count(*) FILTER (is_valid AND n_fragments = 1), count(*) FILTER (is_valid AND len(alerts) > 0)
           FROM read_parquet($shards)""",
    )[0]
    assert parts(card(page, "Valid")) == (valid, rows)
    assert parts(card(page, "Unique")) == (unique, valid)
    assert parts(card(page, "Novel")) == (novel, unique)
    assert f"Samples {rows}" in card(page, "Samples")
    aside = page.text("dl", class_="card aside")
    assert f"Valid, charges allowed {100 * relaxed / rows:.1f} %" in aside
    assert f"Valid and in one piece {100 * whole / rows:.1f} %" in aside
    assert f"({alerted}; 95 %" in page.text()


@pytest.mark.parametrize("column", sorted(PROPERTIES))
def test_every_bar_of_a_histogram_equals_a_count_over_the_parquet(finished: Store, column: str) -> None:
    low, high, bins = BINS[column]
    width = (high - low) / bins
    expected = dict(query(
        finished, f"""SELECT floor(({column}::DOUBLE - {low}) / ({high} - {low}) * {bins})::INT AS bin, count(*)
                      FROM read_parquet($shards) WHERE is_valid GROUP BY bin""",
    ))  # fmt: skip
    page = page_of(finished.url)
    titles, inside = [], False
    for tag, attrs, texts in page.elements:
        if tag == "svg":
            inside = (attrs.get("aria-label") or "").startswith(PROPERTIES[column].title + " in ")
        elif tag == "title" and inside:
            titles.append("".join(texts))
    found = {}
    for title in titles:
        start, count = title.split(": ")[0].split(" to ")[0], title.split(": ")[1].split(" ")[0]
        found[round((float(start) - low) / width)] = int(count.replace(",", ""))
    total = sum(expected.values())
    hidden = sum(count for k, count in expected.items() if k not in found)
    assert {k: expected[k] for k in found} == found
    assert hidden <= 0.001 * total


def test_alerts_by_pattern_equal_a_count_over_the_parquet(finished: Store) -> None:
    expected = query(
        finished,
        """SELECT alert, count(*) AS n FROM (SELECT unnest(alerts) AS alert FROM read_parquet($shards) WHERE is_valid)
           GROUP BY alert ORDER BY n DESC, alert""",
    )
    assert list(take_census(finished, read_commits(finished), 1).alerts) == expected
    name, count = expected[0]
    assert re.search(
        rf"{name.replace(':', ' ')} [\d.]+ % {count}\b", page_of(finished.url).text("table", class_="alerts")
    )


def test_the_best_molecules_are_those_of_a_sort_over_the_parquet(finished: Store) -> None:
    expected = query(
        finished,
        """SELECT smiles FROM (SELECT smiles, max(score) AS best, min(sample_id) AS id FROM read_parquet($shards)
           WHERE is_valid GROUP BY smiles) ORDER BY best DESC, id LIMIT 18""",
    )
    page = page_of(finished.url)
    shown = ["".join(texts).strip() for tag, attrs, texts in page.elements if attrs.get("class") == "smiles"]
    assert shown[:18] == [smiles for (smiles,) in expected]


def test_a_property_where_less_is_better_is_shown_as_measured_and_ascending(tmp_path: Path) -> None:
    store = make_campaign(str(tmp_path / "c"), units=1, score="sa_score")
    page = page_of(store.url)
    shown = [
        float("".join(texts).split()[1].removesuffix("id"))
        for tag, a, texts in page.elements
        if a.get("class") == "legend"
    ]
    best = shown[: min(18, len(SMILES))]
    assert best == sorted(best) and best[0] > 0


def test_the_typical_sample_holds_distinct_molecules_of_the_campaign_and_ignores_the_score(
    finished: Store,
) -> None:
    records = read_commits(finished)
    sample = take_census(finished, records, SAMPLE).sample
    rows = dict(query(finished, "SELECT sample_id, smiles FROM read_parquet($shards) WHERE is_valid"))
    assert len({e.smiles for e in sample}) == len(sample) == SAMPLE
    assert all(rows[e.sample_id] == e.smiles for e in sample)
    assert take_census(finished, records, 4).sample == sample[:4]


def test_records_read_in_any_order_give_the_same_bytes(finished: Store) -> None:
    campaign, records = load_campaign(finished.url), read_commits(finished)
    units = list(records)
    random.Random(5).shuffle(units)
    shuffled = {unit: records[unit] for unit in units}
    pages = {
        render(campaign, finished, r, read_quarantine(finished), take_census(finished, r, SAMPLE), True)
        for r in (records, shuffled)
    }
    assert len(pages) == 1 and units != sorted(units)


def test_a_second_writing_gives_the_same_bytes_and_a_file_elsewhere_is_the_same_page(
    finished: Store, tmp_path: Path
) -> None:
    first = Path(write_report(finished.url)).read_bytes()
    elsewhere = tmp_path / "new" / "page.html"
    assert write_report(finished.url, elsewhere) == str(elsewhere)
    assert Path(write_report(finished.url)).read_bytes() == first == elsewhere.read_bytes()


def test_an_orphan_shard_that_no_record_names_changes_nothing(tmp_path: Path) -> None:
    store = make_campaign(str(tmp_path / "c"), units=2, missing=[1])
    before = Path(write_report(store.url)).read_bytes()
    store.write("data/00/part-000001-deadbeef.parquet", store.read(visible_shards(store)[0]))
    assert Path(write_report(store.url)).read_bytes() == before


def test_a_campaign_in_memory_is_reported_beside_its_data() -> None:
    store = make_campaign("memory://reports/one", units=1)
    assert write_report("memory://reports/one") == store.path("report.html")
    assert b"digress-qm9-3fa1b2c4" in store.read("report.html")


def test_an_empty_campaign_is_reported_without_shares(tmp_path: Path) -> None:
    store = make_campaign(str(tmp_path / "c"), units=2, missing=[0, 1])
    page = page_of(store.url)
    assert page.text("span", class_="state incomplete") == "incomplete"
    assert "0 of 2 units are committed" in page.text()
    assert card(page, "Valid").startswith("Valid – 0 of 0")
    assert "NaN" not in page.text() and "nan" not in page.text().split()


def test_a_campaign_without_one_valid_molecule_is_reported(tmp_path: Path) -> None:
    page = page_of(make_campaign(str(tmp_path / "c"), units=1, invalid=1.0).url)
    assert parts(card(page, "Valid")) == (0, 120)
    assert card(page, "Valid").startswith("Valid 0 %")
    assert "No valid molecule is committed yet" in page.text()


def test_a_partial_campaign_names_the_units_set_aside_and_how_to_go_on(tmp_path: Path) -> None:
    store = make_campaign(str(tmp_path / "my campaign"), missing=[1, 3], quarantined=[3])
    page = page_of(store.url)
    assert page.text("span", class_="state partial") == "partial"
    assert "3 of 5 units are committed, 1 set aside" in page.text()
    assert "3 3 gpu-2 RuntimeError: CUDA error: out of memory" in page.text()
    assert f"bitdgdm generate --resume '{store.url}'" in page.text("code")


def test_a_unit_committed_after_it_was_set_aside_is_not_reported_as_lost(tmp_path: Path) -> None:
    store = make_campaign(str(tmp_path / "c"), missing=[1], quarantined=[2])
    page = page_of(store.url)
    assert page.text("span", class_="state incomplete") == "incomplete"
    assert "Units set aside" not in page.text()


def test_without_a_set_of_known_molecules_novelty_is_not_claimed(tmp_path: Path) -> None:
    page = page_of(make_campaign(str(tmp_path / "c"), units=1, novelty=False).url)
    assert card(page, "Novel").startswith("Novel – The spec names no set")
    assert "repeats counted" not in page.text("dl", class_="card aside")


def test_a_missing_shard_is_an_error_that_names_it(tmp_path: Path) -> None:
    store = make_campaign(str(tmp_path / "c"))
    lost = visible_shards(store)[2]
    store.delete(lost)
    with pytest.raises(CampaignDamaged, match=re.escape(lost)):
        write_report(store.url)


def test_a_shard_of_another_unit_in_the_place_of_one_is_an_error(tmp_path: Path) -> None:
    store = make_campaign(str(tmp_path / "c"))
    other = make_campaign(str(tmp_path / "d"), size=7)
    store.write(visible_shards(store)[0], other.read(visible_shards(other)[0]))
    with pytest.raises(CampaignDamaged, match="7 rows, its record says 120"):
        write_report(store.url)


def test_a_shard_that_is_no_parquet_is_an_error(tmp_path: Path) -> None:
    store = make_campaign(str(tmp_path / "c"))
    store.write(visible_shards(store)[0], b"PAR1 nothing PAR1")
    with pytest.raises(CampaignDamaged, match=re.escape(visible_shards(store)[0])):
        write_report(store.url)


def test_a_folder_without_a_campaign_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CampaignNotFound):
        write_report(str(tmp_path))


EVIL = """<script>alert(1)</script><img src=x onerror=alert(2)>"'&{{ 7*7 }}</pre><style>*{display:none}</style>"""


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Markup in every text that someone outside could choose, a SMILES column included."""
    return make_campaign(
        str(tmp_path_factory.mktemp("hostile") / "c'<b>$(id)"), name=EVIL, error=EVIL, hardware=EVIL, missing=[4],
        quarantined=[4], spec={"model": EVIL, "novelty": EVIL},
    )  # fmt: skip


def test_markup_in_names_errors_and_paths_stays_text(hostile: Store, finished: Store) -> None:
    page, plain = page_of(hostile.url), page_of(finished.url)
    assert {tag for tag, _, _ in page.elements} <= {tag for tag, _, _ in plain.elements} | {"th", "td"}
    assert not [a for _, attrs, _ in page.elements for a in attrs if a.startswith("on")]
    assert page.text("h1") == EVIL
    assert f"RuntimeError: {EVIL}" in page.text()


def test_a_column_of_hostile_smiles_stays_text_without_a_picture() -> None:
    assert draw_molecule(EVIL) == ""
    ElementTree.fromstring(str(draw_molecule("")))


def test_the_page_holds_no_script_and_refers_to_nothing_outside(finished: Store) -> None:
    text = Path(write_report(finished.url)).read_text()
    page = Page(text)
    assert not {"script", "iframe", "object", "embed", "img", "base", "form"} & {
        tag for tag, _, _ in page.elements
    }
    links = [
        a[key] or ""
        for _, a, _ in page.elements
        for key in ("src", "href", "xlink:href", "srcset", "action")
        if key in a
    ]
    assert links and all(link.startswith("#") or link == "data:," for link in links)
    assert "url(" not in text and "@import" not in text and "http://" not in text and "https://" not in text


def test_every_link_inside_the_page_has_its_target(finished: Store) -> None:
    page = page_of(finished.url)
    ids = [attrs["id"] for _, attrs, _ in page.elements if "id" in attrs]
    targets = [attrs["href"] for tag, attrs, _ in page.elements if tag == "a"]
    assert len(set(ids)) == len(ids) and {t[1:] for t in targets if t} <= set(ids)


def test_thirty_large_molecules_fit_in_a_megabyte(tmp_path: Path) -> None:
    large = [
        f"COc1ccc(NC(=O)c2cc(C(F)(F)F)nn2-c2ccc(S(=O)(=O)N3CCC({'C' * k}O)CC3)cc2)cc1Cl" for k in range(60)
    ]
    store = make_campaign(str(tmp_path / "c"), units=1, size=100, smiles=large)
    size = len(Path(write_report(store.url)).read_bytes())
    assert 100_000 < size < 1_000_000


def snippet(page: Page, name: str) -> str:
    return next(
        "".join(texts) for tag, attrs, texts in page.elements if tag == "pre" and attrs.get("id") == name
    )


@pytest.mark.parametrize("folder", ["plain", "it's a 'campaign' [1]"])
def test_the_snippets_for_readers_run_as_printed(tmp_path: Path, folder: str) -> None:
    store = make_campaign(str(tmp_path / folder), units=2)
    store.write("data/00/part-000001-deadbeef.parquet", b"an orphan")
    page = page_of(store.url)
    found = duckdb.execute(snippet(page, "duckdb")).fetchall()
    expected = query(
        store, """SELECT sample_id, smiles, qed, sa_score FROM read_parquet($shards)
                  WHERE is_valid AND is_novel AND len(alerts) = 0""",
    )  # fmt: skip
    assert len(expected) < 100, "the snippet is limited to 100 rows"
    assert sorted(found) == sorted(expected) and found
    names: dict = {}
    exec(snippet(page, "pyarrow"), names)
    [(valid,)] = query(store, "SELECT count(*) FROM read_parquet($shards) WHERE is_valid")
    assert len(names["frame"]) == valid and list(names["frame"]) == ["sample_id", "smiles", "qed"]


def test_the_query_of_a_campaign_without_novelty_and_alerts_asks_for_neither(tmp_path: Path) -> None:
    store = make_campaign(str(tmp_path / "c"), units=1, novelty=False, spec={"alerts": False})
    [(valid,)] = query(store, "SELECT count(*) FROM read_parquet($shards) WHERE is_valid")
    assert len(duckdb.execute(snippet(page_of(store.url), "duckdb")).fetchall()) == min(valid, 100) > 0


def test_the_command_for_one_molecule_is_accepted_and_repeats_the_campaign_settings(finished: Store) -> None:
    program, verb, *arguments = shlex.split(snippet(page_of(finished.url), "reproduce"))
    command = typer.main.get_command(app).commands[verb]  # type: ignore[attr-defined]
    given = command.make_context(verb, arguments).params
    spec = load_campaign(finished.url).spec
    for key in ("model", "seed", "steps", "micro_batch", "device", "precision", "novelty", "score"):
        assert given[key] == getattr(spec, key), key
    assert program == "bitdgdm" and given["count"] == 1
    [(smiles,)] = query(
        finished, f"SELECT smiles FROM read_parquet($shards) WHERE sample_id = {given['first_id']}"
    )
    assert smiles in page_of(finished.url).text("ol", class_="molecules")
