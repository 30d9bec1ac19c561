"""Exactly one visible shard per unit, whatever dies and however many try.

The laws, kept here:
1. One winner. A unit is committed by creating `commits/<unit>.json`, which succeeds once; a loser deletes its
   shard.
2. A record names its bytes. The shard is stored first, under a name of its own attempt; the record holds its
   SHA-256, so there is no record without data.
3. Readers believe records and the manifest only, and list once. A shard that nobody names doesn't exist.
4. Finishing is repeatable: `manifest.json` is a function of the records, then comes `_SUCCESS`, and only then
   are unnamed shards deleted: with every unit committed, no attempt still at work can win.

Guarantees: a crash between any two steps, and a rerun after it, end in the same campaign digest.
Knows nothing of: what is in a shard, who computes it, when a unit is given up on.
"""

import random
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, TypeVar

import pydantic

from bitdgdm.infra.errors import CampaignDamaged, CampaignPartial, StorageUnavailable
from bitdgdm.infra.fingerprint import sha256_hex
from bitdgdm.infra.records import (
    CommitRecord,
    Manifest,
    Quarantine,
    ShardEntry,
    campaign_digest,
    new_attempt,
    shard_key,
)
from bitdgdm.infra.storage import Store

__all__ = [
    "CommitRecord",
    "Manifest",
    "Quarantine",
    "ShardEntry",
    "campaign_digest",
    "clear_quarantine",
    "commit_unit",
    "finish_campaign",
    "is_committed",
    "new_attempt",
    "quarantine_unit",
    "read_commits",
    "read_manifest",
    "read_quarantine",
    "shard_key",
    "visible_shards",
]

_MANIFEST, _SUCCESS = "manifest.json", "_SUCCESS"
_UNCLEAR_TRIES = 5
_READERS = 16

_Record = TypeVar("_Record", CommitRecord, Quarantine)
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def commit_unit(store: Store, record: CommitRecord, shard: bytes) -> Literal["committed", "duplicate"]:
    """Store `shard`, then its record (laws 1 and 2). "duplicate": another attempt has the unit; ours is gone.

    record: made by `CommitRecord.describe(shard, ...)`.
    Raises: StorageUnavailable if the outcome is unknown even after asking again (the shard then stays: the
        record may have arrived); StorageRefused; ValueError if the record is of another shard.
    """
    if (record.sha256, record.bytes) != (sha256_hex(shard), len(shard)):
        raise ValueError(f"the record of unit {record.unit} describes another shard")
    statement = record.to_bytes()  # before the shard is stored: what can't be said must not leave data
    store.write(record.path, shard)
    if _create_or_recognise(store, _record_key("commits", record.unit), statement, record.attempt):
        return "committed"
    store.delete(record.path)
    return "duplicate"


def read_commits(store: Store, known: Mapping[int, CommitRecord] | None = None) -> dict[int, CommitRecord]:
    """Return the record of every committed unit, in unit order, by one listing and parallel reads (law 3).

    known: what an earlier call returned; a record never changes, so only new ones are read.
    Raises: CampaignDamaged for anything in commits/ that is not a whole record of its unit.
    """
    known = known or {}
    fresh = _read_records(store, "commits", CommitRecord, skip=known)
    return dict(sorted({**known, **fresh}.items()))


def is_committed(store: Store, unit: int) -> bool:
    """Return whether some attempt has committed `unit`: a worker asks before it begins (law 1)."""
    return store.exists(_record_key("commits", unit))


def finish_campaign(store: Store, units: int) -> Manifest:
    """Write the manifest of units 0..units-1, mark success, delete unnamed shards (law 4). Can be repeated, raced.

    Raises: CampaignPartial if a unit is not committed (nothing is written then); CampaignDamaged if the
        records disagree among themselves, with the shards that are there, or with an earlier manifest.
    """
    records = read_commits(store)
    missing = sorted(set(range(units)) - set(records))
    if missing:
        raise CampaignPartial(store.url, missing, sorted(set(read_quarantine(store)) & set(missing)))
    stored = store.list("data/")
    _check_consistent(store, records, units, stored)
    manifest = Manifest.of(records)
    if not store.create(_MANIFEST, manifest.to_bytes()):
        _check_same(store, manifest)
    store.create(_SUCCESS, b"")
    named = {record.path for record in records.values()}
    _parallel(store.delete, (key for key in stored if key not in named))
    store.remove_partials()
    return manifest


def read_manifest(store: Store) -> Manifest | None:
    """Return the manifest of a finished campaign, None before. Raises: CampaignDamaged."""
    try:
        return Manifest.from_bytes(store.read(_MANIFEST))
    except FileNotFoundError:
        return None
    except pydantic.ValidationError as error:
        raise _damaged(store, _MANIFEST, "it is not a manifest", "Delete it and finish again") from error


def visible_shards(store: Store) -> list[str]:
    """Return the keys of the shards a reader may read, in unit order (law 3): by the manifest or the records."""
    manifest = read_manifest(store)
    if manifest is not None:
        return [shard.path for shard in manifest.shards]
    return [record.path for record in read_commits(store).values()]


def quarantine_unit(store: Store, quarantine: Quarantine) -> None:
    """Note that a unit was given up on. A commit of the unit, before or after, overrides it."""
    store.write(_record_key("quarantine", quarantine.unit), quarantine.to_bytes())


def read_quarantine(store: Store) -> dict[int, Quarantine]:
    """Raises: CampaignDamaged for anything in quarantine/ that is not a whole record of its unit."""
    return dict(sorted(_read_records(store, "quarantine", Quarantine, skip={}).items()))


def clear_quarantine(store: Store) -> None:
    """Forget all quarantine records, so that a resume tries these units again."""
    _parallel(store.delete, store.list("quarantine/"))


def _create_or_recognise(store: Store, key: str, statement: bytes, attempt: str) -> bool:
    """Create `key`; whether it is ours. A repeated put can lose against its own first try: the attempt tells."""
    for tries in range(1, _UNCLEAR_TRIES + 1):
        try:
            if store.create(key, statement):
                return True
            return CommitRecord.from_bytes(store.read(key)).attempt == attempt
        except pydantic.ValidationError as error:
            raise _damaged(store, key, "it is not a commit record", "Delete it, then resume") from error
        except (StorageUnavailable, FileNotFoundError):  # not found: listed as taken, yet not readable
            if tries == _UNCLEAR_TRIES:
                raise
            time.sleep(random.uniform(0, 0.1 * 2**tries))
    raise AssertionError("unreachable")


def _read_records(
    store: Store, folder: str, kind: type[_Record], skip: Mapping[int, object]
) -> dict[int, _Record]:
    keys = {}
    for key in store.list(f"{folder}/"):
        digits = key.removeprefix(f"{folder}/").removesuffix(".json")
        if not digits.isdecimal() or key != _record_key(folder, int(digits)):
            raise _damaged(store, key, "it is not named like a record", "Move it out of the campaign")
        if int(digits) not in skip:
            keys[int(digits)] = key
    contents = _parallel(store.read, keys.values())
    records = {}
    for (unit, key), content in zip(keys.items(), contents, strict=True):
        try:
            records[unit] = kind.from_bytes(content)
        except pydantic.ValidationError as error:
            raise _damaged(store, key, "it is not a whole record", "Delete it, then resume") from error
        if records[unit].unit != unit:
            raise _damaged(
                store, key, f"it is the record of unit {records[unit].unit}", "Delete it, then resume"
            )
    return records


def _check_consistent(
    store: Store, records: Mapping[int, CommitRecord], units: int, stored: Mapping[str, int]
) -> None:
    first = next(iter(records.values()))
    for unit, record in records.items():
        key = _record_key("commits", unit)
        if unit >= units:
            raise _damaged(store, key, f"the campaign has {units} units", "Compare with the stored spec")
        if (record.fingerprint, record.artifact_digest) != (first.fingerprint, first.artifact_digest):
            raise _damaged(
                store, key, f"it has another spec or artifact than unit {first.unit}", "Use another --out"
            )
        if stored.get(record.path) != record.bytes:
            found = "missing" if record.path not in stored else f"{stored[record.path]} bytes long"
            reason = f"its shard {record.path} is {found} instead of {record.bytes} bytes long"
            raise _damaged(store, key, reason, "Delete this record, then resume to make the shard again")


def _check_same(store: Store, manifest: Manifest) -> None:
    stored = read_manifest(store)
    if stored is None or (stored.digest, stored.shards) != (manifest.digest, manifest.shards):
        raise _damaged(
            store, _MANIFEST, "it names other shards than the records do", "Delete it and finish again"
        )


def _damaged(store: Store, key: str, reason: str, fix: str) -> CampaignDamaged:
    return CampaignDamaged(store.url, key, reason, fix)


def _record_key(folder: str, unit: int) -> str:
    return f"{folder}/{unit:06d}.json"


def _parallel(function: Callable[[_Item], _Result], items: Iterable[_Item]) -> list[_Result]:
    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(function, items))
