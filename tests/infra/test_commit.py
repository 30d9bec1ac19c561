"""The laws of infra/commit.py, one test each, on disk, memory and S3. Run: pytest tests/infra/test_commit.py"""

import hashlib
import json
import math
import threading

import pytest

from bitdgdm.infra.commit import (
    Quarantine,
    campaign_digest,
    clear_quarantine,
    commit_unit,
    finish_campaign,
    is_committed,
    new_attempt,
    quarantine_unit,
    read_commits,
    read_manifest,
    read_quarantine,
    shard_key,
    visible_shards,
)
from bitdgdm.infra.errors import CampaignDamaged, CampaignPartial, StorageUnavailable
from bitdgdm.infra.storage import open_store


def shard_of(unit: int) -> bytes:
    return b"shard %d " % unit * (unit + 1)


def expected_digest(units: int) -> str:
    """The definition, from scratch: SHA-256 over lines "unit:sha256 of its shard"."""
    lines = [f"{unit}:{hashlib.sha256(shard_of(unit)).hexdigest()}\n" for unit in range(units)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@pytest.fixture
def fill(describe):
    def run(store, units, **changes):
        for unit in units:
            assert (
                commit_unit(store, describe(shard_of(unit), unit, **changes), shard_of(unit)) == "committed"
            )

    return run


# -- law 1: one winner --------------------------------------------------------------------------------------


def test_a_unit_committed_by_another_attempt_is_dropped_and_reported(store, describe):
    first, second = describe(shard_of(3), 3), describe(shard_of(3), 3)
    assert commit_unit(store, first, shard_of(3)) == "committed"
    assert commit_unit(store, second, shard_of(3)) == "duplicate"
    assert read_commits(store) == {3: first}
    assert store.exists(first.path) and not store.exists(second.path)


def test_a_worker_can_ask_whether_its_unit_is_done(store, fill):
    fill(store, [3])
    store.write(shard_key(4, new_attempt()), b"a shard is no commit")
    assert is_committed(store, 3) and not is_committed(store, 4) and not is_committed(store, 33)


def test_an_attempt_that_commits_twice_is_still_the_winner(store, describe):
    record = describe(shard_of(0), 0)
    assert [commit_unit(store, record, shard_of(0)) for _ in range(2)] == ["committed", "committed"]
    assert store.read(record.path) == shard_of(0)


def test_a_put_whose_answer_was_lost_is_recognised_by_its_attempt(faulty_s3, aws, describe):
    """The server stored the record and hung up; the client's own repetition is then told that the name is taken."""
    endpoint, objects = faulty_s3("lost after")
    aws(endpoint)
    record = describe(shard_of(0), 0)
    assert commit_unit(open_store("s3://bucket/run"), record, shard_of(0)) == "committed"
    assert objects[f"/bucket/run/{record.path}"] == shard_of(0)


def test_a_put_that_never_arrived_is_repeated(faulty_s3, aws, describe):
    endpoint, objects = faulty_s3("lost before", "409", "503")
    aws(endpoint)
    assert commit_unit(open_store("s3://bucket/run"), describe(shard_of(0), 0), shard_of(0)) == "committed"
    assert json.loads(objects["/bucket/run/commits/000000.json"])["unit"] == 0


def test_an_outcome_that_stays_unknown_keeps_the_shard(faulty_s3, aws, describe, monkeypatch):
    """The record may have arrived: deleting the shard could leave a record without data."""
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    endpoint, objects = faulty_s3(*["409"] * 1000)
    aws(endpoint)
    record = describe(shard_of(0), 0)
    with pytest.raises(StorageUnavailable):
        commit_unit(open_store("s3://bucket/run"), record, shard_of(0))
    assert objects == {f"/bucket/run/{record.path}": shard_of(0)}


# -- law 2: a record names its bytes ------------------------------------------------------------------------


def test_a_record_of_another_shard_is_refused_before_anything_is_stored(store, describe):
    with pytest.raises(ValueError, match="another shard"):
        commit_unit(store, describe(b"these", 0), b"those")
    assert store.list() == {}


def test_a_record_that_json_cannot_hold_is_refused_before_anything_is_stored(store, describe):
    with pytest.raises(TypeError, match=r"stats\.qed"):
        commit_unit(store, describe(b"x", 0, stats={"qed": math.nan}), b"x")
    assert store.list() == {}


def test_a_record_carries_everything_through_storage(store, describe):
    record = describe(
        b"x", 7, stats={"valid": 9, "histogram": {"qed": [1, 2.5, None]}, "name": "Å"}, seconds=0.1
    )
    commit_unit(store, record, b"x")
    assert read_commits(store)[7] == record
    assert record.sha256 == hashlib.sha256(b"x").hexdigest() and record.bytes == 1


def test_shards_of_two_attempts_never_share_a_name():
    names = {shard_key(5, new_attempt()) for _ in range(100)}
    assert len(names) == 100 and {name.split("/part-")[0] for name in names} == {
        names.pop().split("/part-")[0]
    }
    assert len({shard_key(unit, "a" * 8).split("/")[1] for unit in range(2000)}) > 250


# -- law 3: readers believe records and the manifest only ---------------------------------------------------


def test_a_shard_without_a_record_is_invisible(store, fill):
    fill(store, [1, 0])
    store.write(shard_key(2, new_attempt()), b"orphan")
    records = read_commits(store)
    assert list(records) == [0, 1]
    assert visible_shards(store) == [records[0].path, records[1].path]


def test_what_was_read_before_is_not_read_again(store, fill, monkeypatch):
    fill(store, [0, 1])
    known, read = read_commits(store), []
    original = type(store).read
    fill(store, [2])
    monkeypatch.setattr(type(store), "read", lambda self, key: read.append(key) or original(self, key))
    assert list(read_commits(store, known)) == [0, 1, 2]
    assert read == ["commits/000002.json"]


@pytest.mark.parametrize(
    ("key", "content"),
    [
        ("commits/000001.json", lambda good: good[:50]),
        ("commits/000001.json", lambda good: b""),
        ("commits/000001.json", lambda good: good.replace(b'"unit":0', b'"unit":2')),
        ("commits/000001.json", lambda good: good.replace(b'"unit":0', b'"unit":1,"extra":1')),
        ("commits/000001.json", lambda good: good.replace(b'"sha256":"', b'"sha256":"zz')),
        ("commits/1.json", lambda good: good),
        ("commits/notes.txt", lambda good: b"hello"),
    ],
    ids=[
        "truncated",
        "empty",
        "of another unit",
        "unknown field",
        "not a hash",
        "wrong name",
        "not a record",
    ],
)
def test_a_broken_record_is_named_and_nothing_is_ignored(tmp_path, fill, one_line, key, content):
    store = open_store(tmp_path)
    fill(store, [0])
    store.write(key, content(store.read("commits/000000.json")))
    with pytest.raises(CampaignDamaged) as caught:
        read_commits(store)
    assert caught.value.key == key and key in one_line(caught.value)


# -- law 4: finishing is repeatable -------------------------------------------------------------------------


def test_a_finished_campaign_has_a_manifest_a_mark_and_no_orphans(store, fill):
    fill(store, range(4))
    store.write(shard_key(1, new_attempt()), b"orphan")
    manifest = finish_campaign(store, 4)
    records = read_commits(store)
    assert manifest.digest == expected_digest(4) == campaign_digest(records.values())
    assert (manifest.units, manifest.bytes) == (4, sum(len(shard_of(unit)) for unit in range(4)))
    assert [store.read(key) for key in visible_shards(store)] == [shard_of(unit) for unit in range(4)]
    assert set(store.list("data/")) == {record.path for record in records.values()}
    assert store.read("_SUCCESS") == b""
    assert finish_campaign(store, 4) == manifest == read_manifest(store)


def test_the_digest_is_blind_to_attempt_host_and_time_and_sees_every_byte(describe):
    records = [describe(shard_of(unit), unit) for unit in range(3)]
    others = [
        describe(shard_of(unit), unit, host="there", seconds=9.0, code_version="2") for unit in (2, 0, 1)
    ]
    assert campaign_digest(records) == campaign_digest(others) == expected_digest(3)
    changed = [*records[:2], describe(shard_of(2) + b"!", 2)]
    assert campaign_digest(changed) != expected_digest(3)
    with pytest.raises(ValueError, match="twice"):
        campaign_digest([*records, records[0]])


def test_a_campaign_with_missing_units_is_not_finished(store, fill, one_line):
    fill(store, [0, 3])
    orphan = shard_key(1, new_attempt())
    store.write(orphan, b"its record may be under way")
    quarantine_unit(store, Quarantine(unit=2, attempts=3, error="boom", error_type="ValueError", host="here"))
    with pytest.raises(CampaignPartial) as caught:
        finish_campaign(store, 4)
    assert (caught.value.missing, caught.value.quarantined, caught.value.exit_code) == ((1, 2), (2,), 3)
    one_line(caught.value)
    assert read_manifest(store) is None and not store.exists("_SUCCESS") and store.exists(orphan)


def test_quarantine_is_read_back_cleared_and_overridden_by_a_commit(store, fill):
    note = Quarantine(unit=0, attempts=3, error="boom\nline", error_type="ValueError", host="here")
    quarantine_unit(store, note)
    quarantine_unit(store, note)
    assert read_quarantine(store) == {0: note}
    fill(store, [0])
    assert finish_campaign(store, 1).digest == expected_digest(1)
    clear_quarantine(store)
    assert read_quarantine(store) == {}


def test_finishers_at_the_same_time_all_succeed(store, fill):
    fill(store, range(3))
    gate, manifests = threading.Barrier(4), []

    def finish() -> None:
        gate.wait()
        manifests.append(finish_campaign(store, 3))

    threads = [threading.Thread(target=finish) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(manifests) == 4 and all(manifest == manifests[0] for manifest in manifests)


def test_a_late_attempt_after_the_end_loses_and_cleans_up(store, fill, describe):
    fill(store, [0])
    manifest = finish_campaign(store, 1)
    assert commit_unit(store, describe(shard_of(0), 0), shard_of(0)) == "duplicate"
    assert list(store.list("data/")) == [manifest.shards[0].path]


# -- what doesn't fit together is refused -------------------------------------------------------------------


def damage_lost_shard(store, describe):
    store.delete(read_commits(store)[1].path)


def damage_short_shard(store, describe):
    store.write(read_commits(store)[1].path, b"short")


def damage_other_spec(store, describe):
    commit_unit(store, describe(b"x", 2, fingerprint="0" * 64), b"x")


def damage_other_artifact(store, describe):
    commit_unit(store, describe(b"x", 2, artifact_digest="0" * 64), b"x")


def damage_extra_unit(store, describe):
    commit_unit(store, describe(b"x", 3), b"x")


@pytest.mark.parametrize(
    "damage",
    [damage_lost_shard, damage_short_shard, damage_other_spec, damage_other_artifact, damage_extra_unit],
)
def test_records_that_do_not_fit_are_refused_and_nothing_is_deleted(
    tmp_path, fill, describe, one_line, damage
):
    store = open_store(tmp_path)
    fill(store, [0, 1])
    damage(store, describe)
    if 2 not in read_commits(store):
        fill(store, [2])
    before = store.list()
    with pytest.raises(CampaignDamaged) as caught:
        finish_campaign(store, 3)
    assert caught.value.key in one_line(caught.value) and store.list() == before


def test_a_manifest_of_other_shards_is_refused(tmp_path, fill, one_line):
    store = open_store(tmp_path)
    fill(store, [0, 1])
    manifest = finish_campaign(store, 2)
    store.delete("commits/000001.json")
    store.delete(manifest.shards[1].path)
    fill(store, [1])
    with pytest.raises(CampaignDamaged) as caught:
        finish_campaign(store, 2)
    assert "manifest.json" in one_line(caught.value)


def test_a_broken_manifest_is_refused(tmp_path, fill, one_line):
    store = open_store(tmp_path)
    fill(store, [0])
    store.write("manifest.json", b"{")
    for act in (lambda: finish_campaign(store, 1), lambda: visible_shards(store)):
        with pytest.raises(CampaignDamaged) as caught:
            act()
        one_line(caught.value)
