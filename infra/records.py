"""What the commit protocol writes down: one record a unit, one manifest a campaign.

Guarantees: every field is checked when read; unknown fields are refused; equal records are equal bytes.
Knows nothing of: how and in which order they are stored (infra/commit.py).
"""

import builtins
import hashlib
import uuid
from collections.abc import Iterable, Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field

from bitdgdm.infra.fingerprint import canonical_json, sha256_hex

_Hash = Field(pattern=r"^[0-9a-f]{64}$")


class _Stored(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    def to_bytes(self) -> builtins.bytes:
        """Raises: TypeError for what JSON can't hold, such as NaN in `stats`."""
        return canonical_json(self.model_dump()).encode()

    @classmethod
    def from_bytes(cls, data: builtins.bytes) -> Self:
        """Raises: pydantic.ValidationError."""
        return cls.model_validate_json(data)


class CommitRecord(_Stored):
    """The one statement that a unit is done: which bytes it is, and everything that reports add up."""

    unit: int = Field(ge=0)
    attempt: str = Field(min_length=8)
    path: str
    sha256: str = _Hash
    bytes: int = Field(ge=0)
    rows: int = Field(ge=0)
    first_id: int = Field(ge=0)
    fingerprint: str
    artifact_digest: str
    recipe: str
    hardware: str
    code_version: str
    host: str
    seconds: float
    stats: dict[str, Any] = Field(default_factory=dict)

    @classmethod
    def describe(cls, shard: builtins.bytes, *, unit: int, attempt: str, **fields: Any) -> Self:
        """Return the record of `shard`: path, sha256 and bytes come from it, the rest is given."""
        path = shard_key(unit, attempt)
        return cls(
            unit=unit, attempt=attempt, path=path, sha256=sha256_hex(shard), bytes=len(shard), **fields
        )


class Quarantine(_Stored):
    """A unit given up on after `attempts` application errors; the last one is told."""

    unit: int = Field(ge=0)
    attempts: int
    error: str
    error_type: str
    host: str


class ShardEntry(_Stored):
    unit: int
    path: str
    sha256: str = _Hash
    bytes: int
    rows: int
    first_id: int


class Manifest(_Stored):
    """The finished campaign, a pure function of its commit records."""

    format_version: int = 1
    units: int
    rows: int
    bytes: int
    digest: str = _Hash
    fingerprint: str
    artifact_digest: str
    recipe: str
    hardware: tuple[str, ...]
    code_versions: tuple[str, ...]
    shards: tuple[ShardEntry, ...]

    @classmethod
    def of(cls, records: Mapping[int, CommitRecord]) -> Self:
        """records: the record of each unit 0..len-1, all of one fingerprint and artifact."""
        ordered = [records[unit] for unit in sorted(records)]
        kept = set(ShardEntry.model_fields)
        entries = tuple(ShardEntry(**record.model_dump(include=kept)) for record in ordered)
        return cls(
            units=len(ordered),
            rows=sum(record.rows for record in ordered),
            bytes=sum(record.bytes for record in ordered),
            digest=campaign_digest(ordered),
            fingerprint=ordered[0].fingerprint,
            artifact_digest=ordered[0].artifact_digest,
            recipe=ordered[0].recipe,
            hardware=tuple(sorted({record.hardware for record in ordered})),
            code_versions=tuple(sorted({record.code_version for record in ordered})),
            shards=entries,
        )


def campaign_digest(records: Iterable[CommitRecord | ShardEntry]) -> str:
    """Return the SHA-256 over (unit, SHA-256 of its shard) in unit order: blind to attempt, path, host, time.

    Raises: ValueError if a unit comes twice.
    """
    digest, ordered = hashlib.sha256(), sorted(records, key=lambda record: record.unit)
    for before, record in zip([None, *ordered], ordered, strict=False):
        if before is not None and before.unit == record.unit:
            raise ValueError(f"unit {record.unit} comes twice")
        digest.update(f"{record.unit}:{record.sha256}\n".encode())
    return digest.hexdigest()


def new_attempt() -> str:
    """Return an id that no other attempt has."""
    return uuid.uuid4().hex


def shard_key(unit: int, attempt: str) -> str:
    """Return the key of an attempt's shard; over 256 prefixes, because S3 limits requests per prefix."""
    return f"data/{sha256_hex(str(unit).encode())[:2]}/part-{unit:06d}-{attempt[:8]}.parquet"
