"""Run: pytest tests/tasks/test_sample_unit.py"""

from pathlib import Path
from typing import Any

import pytest

from bitdgdm.infra.commit import read_commits, read_quarantine
from bitdgdm.infra.errors import StorageUnavailable
from bitdgdm.infra.storage import Store
from bitdgdm.pipelines import generate
from bitdgdm.pipelines.campaign import Campaign
from bitdgdm.pipelines.generate import run_campaign, unit_job
from bitdgdm.pipelines.spec import make_spec
from bitdgdm.pipelines.status import read_status
from bitdgdm.pipelines.submit import open_campaign, resume_campaign
from bitdgdm.tasks import sample_unit
from bitdgdm.tasks.progress_board import ProgressBoard
from bitdgdm.tasks.sample_unit import MAX_DEATHS, BoardedUnitWorker, UnitWorker

SPEC = {"model": "builtin:digress-qm9", "count": 12, "steps": 2, "unit_size": 4, "micro_batch": 4, "executor": "local",
        "max_attempts": 2, "alerts": False}  # fmt: skip


@pytest.fixture
def campaign(tmp_path: Path) -> tuple[Campaign, Store]:
    return open_campaign(make_spec(SPEC | {"out": str(tmp_path / "out")}))


def _fail(monkeypatch: pytest.MonkeyPatch, times: int, error: Exception) -> list[int]:
    """Make unit 1 raise `error` in its first `times` attempts; returns the list of its attempts."""
    attempt, calls = UnitWorker._attempt, []

    def failing(self: UnitWorker, unit: int, *args: Any) -> str:
        if unit == 1:
            calls.append(unit)
            if len(calls) <= times:
                raise error
        return attempt(self, unit, *args)

    monkeypatch.setattr(UnitWorker, "_attempt", failing)
    return calls


def test_a_unit_that_keeps_failing_is_set_aside_and_the_others_are_committed(
    campaign: tuple[Campaign, Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = _fail(monkeypatch, 99, ValueError("bad luck"))
    outcome = run_campaign(*campaign, quiet=True)
    assert len(calls) == 2
    assert set(read_commits(campaign[1])) == {0, 2}
    assert not outcome.finished and outcome.quarantined == 1 and outcome.digest is None
    assert "bad luck" in read_quarantine(campaign[1])[1].error
    assert read_status(campaign[1].url).state == "partial"


def test_a_worker_with_two_threads_samples_one_unit_at_a_time_and_gives_the_same_campaign(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = run_campaign(*open_campaign(make_spec(SPEC | {"out": str(tmp_path / "alone")})), quiet=True)
    busy, most = [], []
    batches = sample_unit.sample_batches

    def watched(*args: Any, **kwargs: Any) -> Any:
        busy.append(1)
        most.append(len(busy))
        yield from batches(*args, **kwargs)
        busy.pop()

    monkeypatch.setattr(sample_unit, "sample_batches", watched)
    monkeypatch.setattr(generate, "local_processes", lambda *_: 2)
    together = run_campaign(*open_campaign(make_spec(SPEC | {"out": str(tmp_path / "two")})), quiet=True)
    assert together.digest == alone.digest and together.digest
    assert most == [1, 1, 1]


def test_a_resume_tries_a_unit_again_that_was_set_aside(
    campaign: tuple[Campaign, Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        _fail(broken, 99, ValueError("bad luck"))
        run_campaign(*campaign, quiet=True)
    outcome = run_campaign(*resume_campaign(campaign[1].url, {}), quiet=True)
    assert outcome.finished and outcome.quarantined == 0
    assert read_status(campaign[1].url).state == "complete"


def test_a_unit_that_fails_once_leaves_no_trace(
    campaign: tuple[Campaign, Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    _fail(monkeypatch, 1, ValueError("bad luck"))
    assert run_campaign(*campaign, quiet=True).finished
    assert read_quarantine(campaign[1]) == {}


def test_storage_that_goes_away_is_not_the_units_fault(
    campaign: tuple[Campaign, Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    _fail(monkeypatch, 99, StorageUnavailable("s3://x", "connection refused"))
    with pytest.raises(StorageUnavailable):
        run_campaign(*campaign, quiet=True)
    assert read_quarantine(campaign[1]) == {}


def test_a_unit_that_is_committed_is_not_computed_again(
    campaign: tuple[Campaign, Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_campaign(*campaign, quiet=True)
    calls = _fail(monkeypatch, 0, ValueError())
    run_campaign(*campaign, quiet=True)
    assert calls == []


def test_every_shard_names_where_it_came_from(campaign: tuple[Campaign, Store]) -> None:
    import json

    import pyarrow.parquet as pq

    run_campaign(*campaign, quiet=True)
    for record in read_commits(campaign[1]).values():
        footer = json.loads(pq.read_schema(campaign[1].path(record.path)).metadata[b"bitdgdm"])
        assert footer["fingerprint"] == campaign[0].fingerprint
        assert footer["model"]["digest"] == campaign[0].model["digest"]
        assert {"seed", "steps", "unit", "hardware", "code_version"} <= set(footer)


def test_another_commit_of_the_code_is_in_the_records_and_not_in_the_shards(
    campaign: tuple[Campaign, Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = open_campaign(make_spec(SPEC | {"out": str(tmp_path / "there")}))
    here = run_campaign(*campaign, quiet=True)
    monkeypatch.setattr("bitdgdm.tasks.sample_unit.code_version", lambda: "0.1.0+gother")
    assert run_campaign(*there, quiet=True).digest == here.digest
    assert {r.code_version for r in read_commits(there[1]).values()} == {"0.1.0+gother"}


class _Board:
    """Stands for the ProgressBoard actor; `begin` and `report` answer at once."""

    class _Method:
        def __init__(self, function: Any) -> None:
            self.remote = function

    def __init__(self, board: Any) -> None:
        self.begin, self.report = self._Method(board.begin), self._Method(board.report)


def test_a_unit_that_keeps_killing_its_workers_is_set_aside_without_another_try(
    campaign: tuple[Campaign, Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = ProgressBoard.__ray_metadata__.modified_class()
    monkeypatch.setattr("ray.get", lambda value: value)
    worker = BoardedUnitWorker(unit_job(campaign[0]), _Board(plain))
    calls = _fail(monkeypatch, 0, ValueError())
    for _ in range(MAX_DEATHS):
        plain.begin(1)  # and the process is gone
    assert worker.run(1, 4, 4)["outcome"] == "quarantined"
    assert calls == [] and read_quarantine(campaign[1])[1].error_type == "WorkerDied"
    assert worker.run(1, 4, 4)["outcome"] == "committed", "what ended, also by being set aside, starts anew"
