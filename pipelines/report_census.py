"""What a report needs of the shards themselves: exact counts of distinct molecules, alerts by name, a fair sample.

Guarantees: reads the shards that commit records name and no other file, a few columns of each; the result is the
same for any order of records and any number of threads.
Knows nothing of: how a report looks. What commit records already add up is not counted again here.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bitdgdm.infra.commit import CommitRecord
from bitdgdm.infra.errors import CampaignDamaged
from bitdgdm.infra.storage import Store

COLUMNS = ["sample_id", "smiles", "is_valid", "is_novel", "alerts", "score"]
_READERS = 8
_FIX = "Delete this record, then resume to make the shard again"


@dataclass(frozen=True)
class Example:
    """One molecule to show."""

    sample_id: int
    smiles: str
    score: float


@dataclass(frozen=True)
class Census:
    """Counts over the valid molecules of all shards.

    distinct: different canonical SMILES. distinct_novel: those that the reference set doesn't hold.
    alerts: (name, molecules that have it), most frequent first. sample: valid molecules, drawn blindly.
    """

    distinct: int = 0
    distinct_novel: int = 0
    alerts: tuple[tuple[str, int], ...] = ()
    sample: tuple[Example, ...] = ()


def take_census(store: Store, records: Mapping[int, CommitRecord], sample: int) -> Census:
    """Return the census of the shards that `records` name; memory is 8 bytes a distinct molecule of a shard.

    Raises: CampaignDamaged if a shard is missing or not the one that its record describes.
    """
    ordered = [records[unit] for unit in sorted(records)]
    with ThreadPoolExecutor(_READERS) as pool:
        parts = list(pool.map(lambda record: _shard(store, record, sample), ordered))
    alerts = sum((part.alerts for part in parts), Counter[str]())
    return Census(
        distinct=len(_distinct(part.known for part in parts)),
        distinct_novel=len(_distinct(part.novel for part in parts)),
        alerts=tuple(sorted(alerts.items(), key=lambda item: (-item[1], item[0]))),
        sample=_draw((example for part in parts for example in part.sample), sample),
    )


@dataclass(frozen=True)
class _Part:
    known: np.ndarray  # uint64, distinct
    novel: np.ndarray
    alerts: Counter[str]
    sample: tuple[Example, ...]


def _shard(store: Store, record: CommitRecord, sample: int) -> _Part:
    table = _read(store, record)
    table = table.filter(table["is_valid"])
    hashes = _hash(table["smiles"])
    novel = table["is_novel"].fill_null(False).to_numpy()
    named = pc.value_counts(pc.list_flatten(table["alerts"])).to_pylist()
    ids = table["sample_id"].to_numpy()
    drawn = table.take(
        np.argsort(_shuffled(ids), kind="stable")[: 4 * sample]
    )  # more, as equal ones are dropped
    examples = (Example(row["sample_id"], row["smiles"], row["score"]) for row in drawn.to_pylist())
    return _Part(
        np.unique(hashes), np.unique(hashes[novel]), Counter({row["values"]: row["counts"] for row in named}),
        _draw(examples, sample),
    )  # fmt: skip


def _read(store: Store, record: CommitRecord) -> pa.Table:
    try:
        with store.open_input(record.path) as file, pq.ParquetFile(file) as shard:
            if shard.metadata.num_rows != record.rows:
                reason = f"it has {shard.metadata.num_rows} rows, its record says {record.rows}"
                raise CampaignDamaged(store.url, record.path, reason, _FIX)
            return shard.read(columns=COLUMNS)
    except FileNotFoundError as error:
        reason = f"commits/{record.unit:06d}.json names it, but it is missing"
        raise CampaignDamaged(store.url, record.path, reason, _FIX) from error
    except (pa.ArrowInvalid, KeyError) as error:
        raise CampaignDamaged(store.url, record.path, str(error).splitlines()[0], _FIX) from error


def _hash(smiles: pa.ChunkedArray) -> np.ndarray:
    """Return a 64-bit hash of each string: five million meet by accident with probability 1e-6."""
    return pd.util.hash_array(smiles.to_numpy(zero_copy_only=False).astype(object), categorize=False)


def _distinct(parts: Iterable[np.ndarray]) -> np.ndarray:
    return np.unique(np.concatenate([np.empty(0, np.uint64), *parts]))


def _shuffled(ids: np.ndarray) -> np.ndarray:
    """Return the place of each id in a fixed random order. Source: Steele et al., SplitMix64, 2014."""
    with np.errstate(over="ignore"):
        z = ids.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def _draw(examples: Iterable[Example], most: int) -> tuple[Example, ...]:
    """Return the first `most` examples in the fixed random order, each molecule once."""
    pool = list(examples)
    order = np.argsort(_shuffled(np.array([e.sample_id for e in pool], np.int64)), kind="stable")
    chosen: dict[str, Any] = {}
    for i in order:
        if len(chosen) == most:
            break
        chosen.setdefault(pool[i].smiles, pool[i])
    return tuple(chosen.values())
