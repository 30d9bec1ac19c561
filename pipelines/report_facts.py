"""The numbers of a report, ready to print.

Guarantees: a pure function of (campaign, commit records, quarantine records, census); no clock, no order of
arrival; every share comes with its 95 % Wilson interval.
Knows nothing of: HTML, storage.
"""

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bitdgdm.infra.commit import CommitRecord
from bitdgdm.models.summary import BINS, LOWER_IS_BETTER, mean
from bitdgdm.pipelines.campaign import Campaign
from bitdgdm.pipelines.report_charts import Histogram
from bitdgdm.pipelines.status import Status

_Z95 = 1.959963984540054
PERCENT = "\N{NO-BREAK SPACE}%"
MONOSPACED = ("digest", "source digest", "fingerprint", "campaign digest", "their digest", "command")


@dataclass(frozen=True)
class Property:
    """How a column is called and measured. whole: integers. small: drawn in the second row."""

    title: str
    unit: str
    whole: bool
    note: str
    small: bool = False


PROPERTIES: Mapping[str, Property] = {
    "qed": Property("QED", "0 to 1", False, "drug-likeness, higher is better"),
    "sa_score": Property("SA score", "1 to 10", False, "synthetic accessibility, lower is easier"),
    "logp": Property("logP", "log units", False, "Crippen estimate, octanol/water"),
    "mw": Property("Molecular weight", "g/mol", False, "average isotopes"),
    "tpsa": Property("TPSA", "Å²", False, "topological polar surface area"),
    "n_heavy_atoms": Property("Heavy atoms", "atoms", True, "of the largest fragment"),
    "n_rings": Property("Rings", "rings", True, "smallest set of smallest rings", small=True),
    "hbd": Property("H-bond donors", "groups", True, "as RDKit counts them", small=True),
    "hba": Property("H-bond acceptors", "groups", True, "as RDKit counts them", small=True),
    "n_rotatable_bonds": Property(
        "Rotatable bonds", "bonds", True, "amide and ester bonds not counted", small=True
    ),
}


@dataclass(frozen=True)
class Share:
    """`part` of `whole`, with its 95 % interval."""

    part: int
    whole: int

    @property
    def interval(self) -> tuple[float, float]:
        """Return the 95 % interval. Source: Wilson, J. Am. Stat. Assoc. 22, 1927."""
        n = self.whole
        if not n:
            return 0.0, 1.0
        p, z2 = self.part / n, _Z95**2
        centre = (p + z2 / (2 * n)) / (1 + z2 / n)
        half = _Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
        return max(0.0, centre - half), min(1.0, centre + half)

    @property
    def value(self) -> float:
        return self.part / self.whole if self.whole else 0.0

    @property
    def text(self) -> str:
        """Return the percentage: "100 %" and "0 %" are said only of all and of none."""
        if not self.whole:
            return "–"
        if self.part in (0, self.whole):
            return f"{100 * self.value:.0f}{PERCENT}"
        digits = 2 if self.whole >= 10_000 else 1
        nearest = 10.0**-digits
        return f"{min(max(round(100 * self.value, digits), nearest), 100 - nearest):.{digits}f}{PERCENT}"

    @property
    def interval_text(self) -> str:
        low, high = self.interval
        digits = 2 if self.whole >= 10_000 else 1
        return f"{100 * low:.{digits}f} to {100 * high:.{digits}f}{PERCENT}"


@dataclass(frozen=True)
class PropertyFacts:
    """One property over the valid molecules."""

    column: str
    about: Property
    histogram: Histogram
    mean: str
    low: str
    high: str


def property_facts(stats: Mapping[str, Any]) -> list[PropertyFacts]:
    """Return the properties that have at least one molecule: mean exact, 5 and 95 % quantiles from the bins."""
    found = []
    for column, about in PROPERTIES.items():
        low, high, bins = BINS[column]
        width = (high - low) / bins
        h = Histogram(low, width, stats["histograms"][column], about.whole)
        average = mean(stats, column)
        if average is None:
            continue
        digits = 0 if about.whole else max(0, -math.floor(math.log10(width)))
        low_q, high_q = (_number(h.quantile(q), digits) for q in (0.05, 0.95))
        found.append(PropertyFacts(column, about, h, _number(average, max(1, digits)), low_q, high_q))
    return found


def _number(value: float, digits: int) -> str:
    return f"{value:,.{digits}f}".replace("-", "\N{MINUS SIGN}")


@dataclass(frozen=True)
class Hardware:
    """What one kind of hardware did."""

    name: str
    hosts: int
    units: int
    molecules: int
    seconds: float
    slowest: float

    @property
    def rate(self) -> float:
        return self.molecules / self.seconds if self.seconds else 0.0


def hardware_facts(records: Sequence[CommitRecord]) -> list[Hardware]:
    """Return one row a kind of hardware, the one with most molecules first."""
    rows = []
    for name in sorted({record.hardware for record in records}):
        of = [record for record in records if record.hardware == name]
        rows.append(
            Hardware(
                name,
                len({r.host for r in of}),
                len(of),
                sum(r.rows for r in of),
                math.fsum(r.seconds for r in of),
                max(r.seconds for r in of),
            )
        )
    return sorted(rows, key=lambda row: (-row.molecules, row.name))


def duration(seconds: float) -> str:
    """Return a time span for people."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, s = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {s:02d} s"
    hours, m = divmod(minutes, 60)
    return f"{hours:,} h {m:02d} min"


def size(count: int) -> str:
    """Return a number of bytes for people."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} bytes"


def score_text(column: str, score: float) -> str:
    """Return the property that ranks, as it is measured: a score is negated where lower is better."""
    value = -score if column in LOWER_IS_BETTER else score
    return _number(value, 0 if PROPERTIES[column].whole else 3 if column == "qed" else 2)


def lineage(
    campaign: Campaign, status: Status, records: Sequence[CommitRecord], root: str
) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return titled groups of (name, value): all that the shards depend on, and who asked for them."""
    spec, model, asked, identity = campaign.spec, campaign.model, campaign.provenance, campaign.identity
    source, git = model.get("source") or {}, asked.get("git") or {}
    versions = {"python": asked.get("python"), **(asked.get("packages") or {})}
    last = spec.first_id + spec.count - 1
    groups: list[tuple[str, list[tuple[str, Any]]]] = [
        ("Model", [
            ("model", model.get("uri")), ("digest", model.get("digest")), ("recipe", model.get("recipe")),
            ("source model", source.get("name")), ("source uri", source.get("uri")), ("source digest", source.get("digest")),
        ]),
        ("Sampling", [
            ("seed", spec.seed), ("sample ids", f"{spec.first_id:,} to {last:,}"), ("denoising steps", spec.steps),
            ("engine", spec.engine), ("precision", spec.precision), ("device", spec.device), ("micro-batch", f"{spec.micro_batch} molecules"),
            ("unit", f"{spec.unit_size} molecules a shard"), ("ranked by", spec.score), ("known molecules", spec.novelty),
            ("their digest", identity.get("novelty_digest")),
        ]),
        ("Campaign", [
            ("fingerprint", campaign.fingerprint), ("campaign digest", status.digest), ("location", root),
            ("hardware", ", ".join(sorted({r.hardware for r in records}))),
            ("code at submit", campaign.code_version),
            ("code at work", ", ".join(sorted({r.code_version for r in records}))),
            ("written by", ", ".join(f"{k} {identity[k]}" for k in ("bitdgdm", "pyarrow", "rdkit", "torch") if k in identity)),
        ]),
        ("Submitted", [
            ("by", " on ".join(filter(None, (asked.get("user"), asked.get("host"))))), ("at", asked.get("time")),
            ("command", shlex.join(asked.get("argv") or [])),
            ("from", " ".join(filter(None, (git.get("remote"), git.get("commit"), "(changed)" if git.get("dirty") else "")))),
            ("software", ", ".join(f"{name} {version}" for name, version in versions.items() if version)),
        ]),
    ]  # fmt: skip
    return [
        (title, [(name, str(value)) for name, value in rows if value not in (None, "")])
        for title, rows in groups
    ]


def reproduce(campaign: Campaign, sample_id: int) -> str:
    """Return the command that makes one sample of the campaign again, with every setting its row depends on."""
    spec = campaign.spec
    command = [
        "bitdgdm", "generate", "--model", spec.model, "--seed", spec.seed, "--steps", spec.steps, "--first-id", sample_id,
        "--count", 1, "--micro-batch", spec.micro_batch, "--device", spec.device, "--engine", spec.engine,
        "--precision", spec.precision, "--novelty", spec.novelty or "none", "--score", spec.score, *([] if spec.alerts else ["--no-alerts"]),
        "--out", f"sample-{sample_id}",
    ]  # fmt: skip
    return shlex.join(map(str, command))
