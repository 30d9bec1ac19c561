"""What a campaign has done so far: a fold over its commit records (law L3).

Guarantees: reads `campaign.json` and the commit records only; the same records give the same numbers before and
after a restart, from any machine.
Knows nothing of: running workers.
"""

from dataclasses import dataclass
from functools import reduce
from typing import Any

from bitdgdm.infra.commit import CommitRecord, campaign_digest, read_commits, read_quarantine
from bitdgdm.infra.storage import open_store
from bitdgdm.models.summary import fold_stats
from bitdgdm.pipelines.campaign import Campaign, load_campaign

SUCCESS = "_SUCCESS"


@dataclass(frozen=True)
class Status:
    """A campaign in numbers. `stats` is the merged statistics of every committed unit, None before the first."""

    campaign: str
    out: str
    state: str  # "complete", "incomplete" or "partial" (units set aside)
    units: int
    committed: int
    quarantined: dict[int, str]
    count: int
    molecules: int
    bytes: int
    worker_seconds: float
    hardware: dict[str, int]
    digest: str | None
    fingerprint: str
    model: dict[str, Any]
    steps: int
    seed: int
    stats: dict[str, Any] | None

    @property
    def per_worker_second(self) -> float:
        """Molecules that one worker made in a second, start of the worker excluded."""
        return self.molecules / self.worker_seconds if self.worker_seconds else 0.0


def read_status(url: str) -> Status:
    """Return the state of the campaign at `url`. Raises: CampaignNotFound, StorageRefused, StorageUnavailable."""
    campaign = load_campaign(url)
    store = open_store(url)
    records = read_commits(store)
    return fold_status(
        campaign, records, {u: q.error for u, q in read_quarantine(store).items()}, store.exists(SUCCESS)
    )


def fold_status(
    campaign: Campaign, records: dict[int, CommitRecord], quarantined: dict[int, str], success: bool
) -> Status:
    """Return the fold of `records`, in unit order."""
    ordered = [records[unit] for unit in sorted(records)]
    hardware: dict[str, int] = {}
    for record in ordered:
        hardware[record.hardware] = hardware.get(record.hardware, 0) + record.rows
    spec = campaign.spec
    assert spec.steps
    return Status(
        campaign=campaign.campaign, out=spec.out, units=campaign.units, committed=len(ordered),
        state="complete" if success else "partial" if quarantined else "incomplete", quarantined=quarantined,
        count=spec.count, molecules=sum(r.rows for r in ordered), bytes=sum(r.bytes for r in ordered),
        worker_seconds=sum(r.seconds for r in ordered), hardware=hardware,
        digest=campaign_digest(ordered) if len(ordered) == campaign.units else None,
        fingerprint=campaign.fingerprint, model=campaign.model, steps=spec.steps, seed=spec.seed,
        stats=reduce(fold_stats, (r.stats for r in ordered)) if ordered else None,
    )  # fmt: skip
