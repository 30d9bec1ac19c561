"""`bitdgdm generate`: run a campaign to its end.

Guarantees: what is committed stays committed whatever happens to this process; running the same command again, or
`--resume`, continues; the result is the same for any number of workers (law L1); every unit ends committed or
quarantined, and the campaign is finished only when all are committed.
Knows nothing of: networks and chemistry; a worker of tasks/sample_unit.py does the work.
"""

import logging
import os
import queue
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from bitdgdm.infra.cluster import Cluster
from bitdgdm.infra.commit import (
    Manifest,
    campaign_digest,
    clear_quarantine,
    finish_campaign,
    read_commits,
    read_quarantine,
)
from bitdgdm.infra.errors import CampaignStuck, WorkersFailed
from bitdgdm.infra.storage import Store
from bitdgdm.infra.version import code_version
from bitdgdm.pipelines.campaign import Campaign, model_key, reference_key
from bitdgdm.pipelines.plan import Unit, plan_units
from bitdgdm.pipelines.progress import ProgressBar
from bitdgdm.pipelines.ray_run import cluster
from bitdgdm.tasks.sample_unit import BoardedUnitWorker, UnitJob, UnitWorker

log = logging.getLogger("bitdgdm.generate")
STUCK_AFTER_S = 600.0
MAX_RESTARTS = 20  # Ray Data's own default is for ever, also for a unit that always kills its worker
POLL_S = 0.5
MOST_SCORERS = 16  # processes that score beside a GPU
WORTH_A_POOL = 5000  # molecules; each process takes some seconds to start
Progress = Callable[[float], None]


@dataclass(frozen=True)
class Outcome:
    """How a run of a campaign ended."""

    campaign: str
    out: str
    units: int
    committed: int
    quarantined: int
    molecules: int
    digest: str | None
    seconds: float

    @property
    def finished(self) -> bool:
        return self.committed == self.units


def run_campaign(campaign: Campaign, store: Store, *, quiet: bool = False) -> Outcome:
    """Commit every missing unit of `campaign`; write the manifest when none is missing.

    Raises: CampaignStuck, WorkersFailed; units that failed are reported in the outcome, not raised.
    """
    started = time.monotonic()
    if campaign.code_version != code_version():
        log.warning(
            "started by code %s, continued by %s: same data if both compute alike",
            campaign.code_version,
            code_version(),
        )
    clear_quarantine(store)
    done = read_commits(store)
    missing = [u for u in _plan(campaign) if u.unit not in done]
    before = sum(record.rows for record in done.values())
    log.info("%s: %d of %d units to do", campaign.campaign, len(missing), campaign.units)
    if missing:
        with ProgressBar(campaign.campaign, campaign.spec.count, "molecules", before, quiet) as bar:
            run = _run_local if campaign.spec.executor == "local" else _run_ray
            run(campaign, store, missing, lambda now: bar.update(before + now))
            records = read_commits(store)
            bar.update(sum(record.rows for record in records.values()))
    return _close(campaign, store, time.monotonic() - started)


def _plan(campaign: Campaign) -> Iterator[Unit]:
    spec = campaign.spec
    assert spec.unit_size is not None
    return plan_units(spec.first_id, spec.count, spec.unit_size)


def _close(campaign: Campaign, store: Store, seconds: float) -> Outcome:
    records = read_commits(store)
    manifest: Manifest | None = None
    if len(records) == campaign.units:
        manifest = finish_campaign(store, campaign.units)
    return Outcome(
        campaign=campaign.campaign, out=store.url, units=campaign.units, committed=len(records),
        quarantined=len(read_quarantine(store)), molecules=sum(r.rows for r in records.values()),
        digest=campaign_digest(records.values()) if manifest else None, seconds=seconds,
    )  # fmt: skip


def unit_job(campaign: Campaign, score_processes: int = 0) -> UnitJob:
    """Return what a worker needs to know of `campaign`."""
    spec = campaign.spec
    assert spec.steps and spec.micro_batch
    known = campaign.identity["novelty_digest"]
    return UnitJob(
        out=spec.out, model_key=model_key(campaign.model["digest"]), fingerprint=campaign.fingerprint,
        model=campaign.model, seed=spec.seed, steps=spec.steps, micro_batch=spec.micro_batch, device=spec.device,
        precision=spec.precision, engine=spec.engine, reference_key=reference_key(known) if known else None,
        reference_name=spec.novelty, score=spec.score, alerts=spec.alerts,
        max_attempts=spec.max_attempts, score_processes=score_processes,
    )  # fmt: skip


def _run_local(campaign: Campaign, store: Store, missing: Sequence[Unit], progress: Progress) -> None:
    sizes, done = {u.unit: u.count for u in missing}, dict.fromkeys((u.unit for u in missing), 0.0)
    lock = threading.Lock()

    def report(unit: int, fraction: float) -> None:
        with lock:
            done[unit] = fraction * sizes[unit]
            progress(sum(done.values()))

    processes = local_processes(campaign, sum(sizes.values()), os.cpu_count() or 1)
    worker = UnitWorker(unit_job(campaign, processes), report)
    if not processes:
        for u in missing:
            worker.run(u.unit, u.first_id, u.count)
        return
    threads = ThreadPoolExecutor(2)  # one unit is sampled while the one before is scored
    try:
        for _ in threads.map(lambda u: worker.run(u.unit, u.first_id, u.count), missing):
            pass
    finally:
        threads.shutdown(cancel_futures=True)  # after an error or an interrupt the units under way still end


def local_processes(campaign: Campaign, molecules: int, cores: int) -> int:
    """Return how many processes score beside a GPU: all cores but one; none for so few that a start takes longer."""
    few = molecules < WORTH_A_POOL or cores < 3
    return 0 if campaign.spec.device != "cuda" or few else min(MOST_SCORERS, cores - 1)


def pool_shape(campaign: Campaign, on: Cluster, units: int) -> dict[str, Any]:
    """Return the actor pool's size and what one actor claims.

    `on.cpus` leaves one for the read task: a pool that holds them all never gets its input (ray#44687).
    """
    spec = campaign.spec
    if spec.device == "cuda":
        most = max(1, int(on.gpus / spec.gpus_per_worker))
        # two threads: one unit is sampled while the one before is scored
        claim: dict[str, Any] = {"num_gpus": spec.gpus_per_worker, "num_cpus": 0.5, "max_concurrency": 2}
    else:
        most = on.cpus
        claim = {"num_cpus": 1}
    return {"size": min(spec.workers or most, most, units), **claim}


def _run_ray(campaign: Campaign, store: Store, missing: Sequence[Unit], progress: Progress) -> None:
    import ray

    from bitdgdm.tasks.progress_board import ProgressBoard

    _quiet_ray_data()
    with cluster() as attached:
        board = ProgressBoard.remote()  # type: ignore[attr-defined]
        shape = pool_shape(campaign, attached, len(missing))
        size = shape.pop("size")
        # beside a GPU the other cores score molecules; on CPUs each core has its own actor
        processes = min(MOST_SCORERS, attached.cpus // size - 1) if campaign.spec.device == "cuda" else 0
        claims = (f"{v} {k[4:]}" for k, v in shape.items() if k.startswith("num_"))
        log.info("%d workers, %s each", size, ", ".join(claims))
        rows = [{"unit": u.unit, "first_id": u.first_id, "count": u.count} for u in missing]
        results = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            BoardedUnitWorker, fn_constructor_kwargs={"job": unit_job(campaign, processes), "board": board},
            batch_size=1, compute=ray.data.ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=2),
            max_restarts=MAX_RESTARTS, max_task_retries=MAX_RESTARTS, **shape,
        )  # fmt: skip
        sizes = {u.unit: u.count for u in missing}
        _watch(campaign, results, board, sizes, progress)


def _quiet_ray_data() -> None:
    """Ray Data's own bars and reports are replaced by ours."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = context.log_internal_stack_trace = False
    context.max_consecutive_actor_init_deaths = (
        3  # a node that dies while an actor starts there is no reason to stop
    )
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # a failure is raised, and told by us
    # Ray 2.60 announces other names for max_restarts and max_task_retries, but has none yet
    warnings.filterwarnings("ignore", message=".*ray_remote_args.*")


def _watch(campaign: Campaign, results: Any, board: Any, sizes: dict[int, int], progress: Progress) -> None:
    """Consume outcomes as they come; show progress; give up when nothing moves for STUCK_AFTER_S."""
    arrived: queue.Queue[Any] = queue.Queue()
    end = object()

    def consume() -> None:
        try:
            for row in results.iter_rows():
                arrived.put(row)
            arrived.put(end)
        except Exception as e:  # noqa: BLE001  the end of this thread: what isn't handed over would look like a stuck campaign
            arrived.put(e)

    threading.Thread(target=consume, daemon=True, name="outcomes").start()
    finished, ended, heard, moved = 0, 0, -1, time.monotonic()
    while True:
        try:
            item = arrived.get(timeout=POLL_S)
        except queue.Empty:
            item = None
        if item is end:
            return
        if isinstance(item, Exception):
            raise WorkersFailed(campaign.spec.out, len(sizes) - ended, _reason(item)) from item
        if item is not None:
            moved, ended = time.monotonic(), ended + 1
            finished += sizes[int(item["unit"])] if item["outcome"] != "quarantined" else 0
            if item["outcome"] == "quarantined":
                log.error("unit %d is set aside: %s", item["unit"], item["error"])
        reports, fractions = _snapshot(board, heard)
        if reports != heard:
            heard, moved = reports, time.monotonic()
        progress(finished + sum(sizes[u] * f for u, f in fractions.items() if u in sizes))
        if time.monotonic() - moved > STUCK_AFTER_S:
            raise CampaignStuck(campaign.spec.out, len(sizes) - ended, time.monotonic() - moved)


def _snapshot(board: Any, heard: int) -> tuple[int, dict[int, float]]:
    import ray

    try:
        reports, fractions = ray.get(board.snapshot.remote(), timeout=5)
        return reports, fractions
    except (ray.exceptions.GetTimeoutError, ray.exceptions.RayActorError):
        return heard, {}  # only a display; the watchdog notices if it stays silent


def _reason(error: Exception) -> str:
    cause = getattr(error, "cause", None) or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(cause).__name__
