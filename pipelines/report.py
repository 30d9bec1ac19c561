"""`report.html`: what a campaign made, on one page that needs nothing else.

Guarantees: the page is a function of the commit records, the shards they name and campaign.json (law L3),
whatever the order of reading; it works for a campaign that is empty, running, complete or partial; it holds no
script and loads nothing; all that a user, a model or a molecule could have written in it is escaped.
Knows nothing of: running campaigns.
"""

import logging
import shlex
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from bitdgdm.infra.commit import CommitRecord, Quarantine, read_commits, read_quarantine
from bitdgdm.infra.storage import Store, open_store
from bitdgdm.infra.version import VERSION
from bitdgdm.pipelines.campaign import Campaign, load_campaign, model_key
from bitdgdm.pipelines.report_census import Census, Example, take_census
from bitdgdm.pipelines.report_charts import NO_PICTURES, draw_histogram, draw_molecule
from bitdgdm.pipelines.report_facts import (
    MONOSPACED,
    PROPERTIES,
    PropertyFacts,
    Share,
    duration,
    hardware_facts,
    lineage,
    property_facts,
    reproduce,
    score_text,
    size,
)
from bitdgdm.pipelines.status import SUCCESS, fold_status

REPORT_FILE = "report.html"
BEST, SAMPLE = 18, 12
_ALERTS = 12
log = logging.getLogger("bitdgdm.report")
_TEMPLATE = Path(__file__).with_name("report.html.j2")


def write_report(url: str, to: Path | None = None) -> str:
    """Write the report of the campaign at `url` to `to`, or beside the campaign's data; return where it is.

    Raises: CampaignNotFound, CampaignDamaged, StorageRefused, StorageUnavailable.
    """
    campaign, store = load_campaign(url), open_store(url)
    success = store.exists(SUCCESS)  # before the records: success then implies that all of them are read
    records, quarantine = read_commits(store), read_quarantine(store)
    census = take_census(store, records, SAMPLE)
    page = render(campaign, store, records, quarantine, census, success).encode()
    if NO_PICTURES:
        log.warning(
            "the report has no pictures of molecules: %s. Install it (Debian: libxrender1), then: bitdgdm report %s",
            NO_PICTURES, url,
        )  # fmt: skip
    if to is None:
        store.write(REPORT_FILE, page)
        return store.path(REPORT_FILE)
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_bytes(page)
    return str(to)


@dataclass(frozen=True)
class Tile:
    """A molecule in the grid."""

    picture: Markup
    smiles: str
    sample_id: int
    score: str


def render(
    campaign: Campaign, store: Store, records: dict[int, CommitRecord], quarantine: dict[int, Quarantine],
    census: Census, success: bool,
) -> str:  # fmt: skip
    """Return the page."""
    pending = {unit: q for unit, q in quarantine.items() if unit not in records}
    status = fold_status(campaign, records, {unit: q.error for unit, q in pending.items()}, success)
    ordered = [records[unit] for unit in sorted(records)]
    stats, score = status.stats, campaign.spec.score
    counts = stats["counts"] if stats else {}
    n, valid = counts.get("n", 0), counts.get("valid", 0)
    best = [Example(int(row[1]), row[2], row[0]) for row in stats["top"]["rows"][:BEST]] if stats else []
    return _template().render(
        campaign=campaign, spec=campaign.spec, status=status, version=VERSION, root=store.url,
        valid=Share(valid, n), relaxed=Share(counts.get("valid_relaxed", 0), n),
        connected=Share(counts.get("connected", 0), n), unique=Share(census.distinct, valid),
        novel=Share(census.distinct_novel, census.distinct) if campaign.spec.novelty else None,
        novel_rows=Share(counts.get("novel", 0), counts.get("compared", 0)),
        alerted=Share(counts.get("alerted", 0), valid),
        alerts=[(*name.partition(":")[::2], Share(k, valid)) for name, k in census.alerts[:_ALERTS]],
        more_alerts=len(census.alerts) - _ALERTS,
        properties=[(p, _chart(p)) for p in property_facts(stats)] if stats else [],
        score=PROPERTIES[score].title, best=[_tile(e, score) for e in best],
        sample=[_tile(e, score) for e in census.sample],
        hardware=hardware_facts(ordered), quarantine=pending, lineage=lineage(campaign, status, ordered, store.url),
        command=reproduce(campaign, best[0].sample_id if best else campaign.spec.first_id),
        model_copy=model_key(campaign.model["digest"]), mono=MONOSPACED, spec_json=campaign.spec.model_dump_json(indent=1),
    )  # fmt: skip


def _chart(p: PropertyFacts) -> Markup:
    label = f"{p.about.title} in {p.about.unit}: mean {p.mean}, 5 % are below {p.low}, 5 % above {p.high}"
    return draw_histogram(p.histogram, label, *((232, 128) if p.about.small else (320, 150)))


def _tile(example: Example, score: str) -> Tile:
    picture = draw_molecule(example.smiles)
    return Tile(picture, example.smiles, example.sample_id, score_text(score, example.score))


def _template() -> Template:
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page.filters["duration"] = duration
    page.filters["size"] = size
    page.filters["shell"] = shlex.quote
    page.filters["pyrepr"] = repr
    page.filters["thousands"] = lambda n: f"{n:,}"
    return page.from_string(_TEMPLATE.read_text(encoding="utf-8"))
