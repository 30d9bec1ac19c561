"""Run: pytest tests/e2e/test_campaign_survives.py   (local Ray clusters, about two minutes)

Processes are killed with SIGKILL in mid-campaign; the result must be the one of an undisturbed run.
"""

import os
import signal
from pathlib import Path

import duckdb
import psutil
import pytest

from bitdgdm.infra.commit import read_commits, visible_shards
from bitdgdm.infra.storage import open_store

from .conftest import TINY, Command, until

COUNT = 160
CAMPAIGN = ["--model", "builtin:digress-qm9", "--count", str(COUNT), "--seed", "5", *TINY]


@pytest.fixture
def undisturbed(bitdgdm: Command, tmp_path: Path) -> str:
    """The digest of the same campaign run in one process, with no cluster at all."""
    done = bitdgdm.json("generate", *CAMPAIGN, "--out", str(tmp_path / "calm"), "--executor", "local")
    return str(done["digest"])


def _commits(out: Path) -> int:
    return len(list((out / "commits").glob("*.json"))) if (out / "commits").is_dir() else 0


def _descendants_named(process_id: int, name: str) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(process_id).children(recursive=True):
        try:
            if name in " ".join(child.cmdline()):
                found.append(child)
        except psutil.Error:  # it ended while we looked
            continue
    return found


def _assert_whole(out: Path) -> None:
    """A reader that trusts the manifest sees each id once, and no other Parquet file lies about."""
    store = open_store(str(out))
    shards = [store.path(key) for key in visible_shards(store)]
    ids = duckdb.sql(f"select sample_id from read_parquet({shards}) order by 1").fetchall()
    assert [row[0] for row in ids] == list(range(COUNT))
    assert sorted(str(p) for p in out.rglob("*.parquet")) == sorted(shards)


def test_a_campaign_whose_actor_is_killed_ends_with_the_undisturbed_digest(
    bitdgdm: Command, tmp_path: Path, undisturbed: str
) -> None:
    out = tmp_path / "out"
    run = bitdgdm.start("generate", *CAMPAIGN, "--out", str(out), "--workers", "1", "--json")
    until(lambda: _commits(out) >= 1 or run.poll() is not None, "the first commit")
    actors = _descendants_named(run.pid, "BoardedUnitWorker")
    assert actors, "the pool has an actor process"
    for actor in actors:
        actor.send_signal(signal.SIGKILL)
    assert _commits(out) < COUNT // 16, "the kill came in mid-campaign"
    _, stderr = run.communicate(timeout=240)
    if run.returncode != 0:
        bitdgdm("generate", "--resume", str(out), "--executor", "local")
    assert bitdgdm.json("status", str(out))["digest"] == undisturbed, stderr[-2000:]
    _assert_whole(out)


def test_a_campaign_whose_driver_is_killed_is_completed_by_resume(
    bitdgdm: Command, tmp_path: Path, undisturbed: str
) -> None:
    out = tmp_path / "out"
    run = bitdgdm.start("generate", *CAMPAIGN, "--out", str(out), "--json")
    until(lambda: _commits(out) >= 2 or run.poll() is not None, "the second commit")
    os.kill(run.pid, signal.SIGKILL)
    run.wait(timeout=60)
    assert not (out / "_SUCCESS").exists(), "the kill came in mid-campaign"
    committed = set(read_commits(open_store(str(out))))
    done = bitdgdm.json("generate", "--resume", str(out))
    assert done["digest"] == undisturbed
    assert committed <= set(read_commits(open_store(str(out))))
    _assert_whole(out)


def test_two_processes_that_run_one_campaign_commit_every_unit_exactly_once(
    bitdgdm: Command, tmp_path: Path, undisturbed: str
) -> None:
    out = tmp_path / "out"
    command = ["generate", *CAMPAIGN, "--out", str(out), "--executor", "local", "--json"]
    first, second = bitdgdm.start(*command), bitdgdm.start(*command)
    for run in (first, second):
        _, stderr = run.communicate(timeout=240)
        assert run.returncode == 0, stderr[-2000:]
    assert bitdgdm.json("status", str(out))["digest"] == undisturbed
    _assert_whole(out)


def test_a_finished_campaign_is_not_computed_again(bitdgdm: Command, tmp_path: Path) -> None:
    command = ["generate", "--model", "builtin:digress-qm9", "--count", "16", *TINY, "--out", str(tmp_path / "o"),
               "--executor", "local"]  # fmt: skip
    first = bitdgdm.json(*command)
    written = {p: p.stat().st_mtime_ns for p in (tmp_path / "o").rglob("*.parquet")}
    again = bitdgdm.json(*command)
    assert again["digest"] == first["digest"]
    assert written == {p: p.stat().st_mtime_ns for p in (tmp_path / "o").rglob("*.parquet")}
