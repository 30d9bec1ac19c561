"""Sample one unit: ids in, one committed shard out. The actor of the generation pool.

Guarantees: the shard's bytes depend on the campaign's identity and the unit only (laws L1, L4), never on the actor,
the attempt or what ran before; a unit that another attempt committed is not computed again; an application error is
retried `max_attempts` times and then becomes a quarantine record (law L6), so the pool never fails as a whole.
Knows nothing of: how many units or actors there are.
"""

import logging
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitdgdm.infra.commit import (
    CommitRecord,
    Quarantine,
    commit_unit,
    is_committed,
    new_attempt,
    quarantine_unit,
)
from bitdgdm.infra.storage import Store, open_store
from bitdgdm.infra.version import VERSION, code_version
from bitdgdm.models.digress import DigressConfig
from bitdgdm.models.engine import Engine, hardware_name, load_engine
from bitdgdm.models.novelty import ReferenceSet
from bitdgdm.models.sampler import sample_batches
from bitdgdm.tasks.score_unit import Scorer, Scoring, processes, to_shard

log = logging.getLogger("bitdgdm.sample")
REPORT_EVERY_S = 1.0
MAX_DEATHS = 5  # of workers at one unit: more than a run of bad luck with spot nodes


@dataclass(frozen=True)
class UnitJob:
    """All that a worker needs to know of a campaign; small, sent once per actor."""

    out: str
    model_key: str
    fingerprint: str
    model: dict[str, Any]
    seed: int
    steps: int
    micro_batch: int
    device: str
    precision: str
    engine: str
    reference_key: str | None
    reference_name: str | None
    score: str
    alerts: bool
    max_attempts: int
    score_processes: int = 0


class UnitWorker:
    """Holds one engine on one device and turns units into committed shards.

    Two threads keep the device busy: one unit is sampled while the one before is scored and committed.
    """

    def __init__(self, job: UnitJob, report: Callable[[int, float], object] | None = None) -> None:
        self._job = job
        self._report = report
        self._store: Store = open_store(job.out)
        if job.score_processes > 1:
            processes()  # they are ready when the engine is
        self._engine: Engine = open_engine(self._store, job)
        self._config: DigressConfig = self._engine.config
        reference = open_reference(self._store, job)
        self._sampling = threading.Lock()
        self._scorer = Scorer(Scoring(self._config, reference, job.score, job.alerts), job.score_processes)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the units of a Ray Data batch (rows of unit, first_id, count); return one outcome row each."""
        rows = [
            self.run(int(unit), int(first_id), int(count))
            for unit, first_id, count in zip(batch["unit"], batch["first_id"], batch["count"], strict=True)
        ]
        return {key: np.array([row[key] for row in rows]) for key in rows[0]}

    def run(self, unit: int, first_id: int, count: int) -> dict[str, Any]:
        """Commit or quarantine one unit; return {unit, rows, outcome, error}."""
        if is_committed(self._store, unit):
            return self._outcome(unit, count, "present")
        for attempt in range(1, self._job.max_attempts + 1):
            try:
                return self._outcome(unit, count, self._attempt(unit, first_id, count))
            except Exception as e:  # the unit boundary: whatever a unit raises must not stop the others (L6)
                if getattr(e, "retryable", False) and attempt == self._job.max_attempts:
                    raise  # storage is away: that is not this unit's fault
                log.exception("attempt %d of %d failed, unit %d", attempt, self._job.max_attempts, unit)
                error = e
        return self._set_aside(unit, self._job.max_attempts, type(error).__name__, str(error))

    def _set_aside(self, unit: int, attempts: int, error_type: str, error: str) -> dict[str, Any]:
        quarantine = Quarantine(
            unit=unit, attempts=attempts, error=error[:2000], error_type=error_type, host=socket.gethostname()
        )
        quarantine_unit(self._store, quarantine)
        return self._outcome(unit, 0, "quarantined", f"{error_type}: {error}")

    def _attempt(self, unit: int, first_id: int, count: int) -> str:
        job, started, attempt = self._job, time.monotonic(), new_attempt()
        with self._sampling:  # one unit on the device; another thread's unit may be scored meanwhile
            batches = sample_batches(
                self._engine, self._config, job.seed, first_id, count, job.steps, job.micro_batch,
                on_progress=self._progress(unit),
            )  # fmt: skip
            parts = [self._scorer.begin(graphs, first) for first, graphs in batches]
        # the released version only: a resume from another commit must give the same bytes; the record has the commit
        footer = {
            "schema_version": 1, "unit": unit, "seed": job.seed, "steps": job.steps, "fingerprint": job.fingerprint,
            "model": job.model, "engine": job.engine, "precision": job.precision, "hardware": hardware_name(self._engine.device), "code_version": VERSION,
        }  # fmt: skip
        shard, stats, rows = to_shard([part() for part in parts], footer)
        record = CommitRecord.describe(
            shard, unit=unit, attempt=attempt, rows=rows, first_id=first_id, fingerprint=job.fingerprint,
            artifact_digest=job.model["digest"], recipe=job.model["recipe"], hardware=footer["hardware"],
            code_version=code_version(), host=socket.gethostname(), seconds=time.monotonic() - started,
            stats=stats,
        )  # fmt: skip
        return commit_unit(self._store, record, shard)

    def _progress(self, unit: int) -> Callable[[float], None] | None:
        if self._report is None:
            return None
        report, last = self._report, 0.0

        def on_progress(fraction: float) -> None:
            nonlocal last
            if time.monotonic() - last >= REPORT_EVERY_S:
                last = time.monotonic()
                report(unit, fraction)

        return on_progress

    def _outcome(self, unit: int, rows: int, outcome: str, error: str = "") -> dict[str, Any]:
        if self._report is not None:
            self._report(unit, 1.0)
        return {"unit": unit, "rows": rows, "outcome": outcome, "error": error}


class BoardedUnitWorker(UnitWorker):
    """A UnitWorker in a Ray pool: reports to a ProgressBoard, and sets a unit aside that keeps killing its workers."""

    def __init__(self, job: UnitJob, board: Any) -> None:
        super().__init__(job, lambda unit, fraction: board.report.remote(unit, fraction))
        self._board = board

    def run(self, unit: int, first_id: int, count: int) -> dict[str, Any]:
        """See `UnitWorker.run`. A crash of the process is no exception: only the board remembers it."""
        deaths = self._deaths(unit)
        if deaths < MAX_DEATHS:
            return super().run(unit, first_id, count)
        error = f"{deaths} workers died at it, perhaps for want of memory"
        return self._set_aside(unit, deaths, "WorkerDied", error)

    def _deaths(self, unit: int) -> int:
        import ray

        try:
            return int(ray.get(self._board.begin.remote(unit))) - 1
        except ray.exceptions.RayError:  # the board is away; it forgets, and counts anew
            return 0


def open_engine(store: Store, job: UnitJob) -> Engine:
    """Return the engine of the model kept with the campaign; its digest is checked on load.

    Raises: ArtifactCorrupt if the stored copy is not the model that the campaign names.
    """
    with tempfile.TemporaryDirectory(prefix="bitdgdm-") as folder:
        path = Path(folder) / job.model_key
        path.write_bytes(store.read(job.model_key))
        return load_engine(path, job.device, job.precision, job.model["digest"], job.engine)


def open_reference(store: Store, job: UnitJob) -> ReferenceSet | None:
    """Return the set of known molecules kept with the campaign, None if it has none."""
    if job.reference_key is None:
        return None
    return ReferenceSet.from_bytes(job.reference_name or "", store.read(job.reference_key))
