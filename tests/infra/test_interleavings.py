"""Attempts interleaved at every storage call, with losses. Run: pytest tests/infra/test_interleavings.py"""

import hashlib
import threading
import uuid
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bitdgdm.infra import commit
from bitdgdm.infra.errors import StorageUnavailable
from bitdgdm.infra.storage import Store, open_store

UNITS = 2
UNIT_OF_ATTEMPT = (0, 0, 0, 1, 1)


class Died(BaseException):
    """The process of an attempt is gone: nothing of it runs any more."""


@dataclass
class Attempt:
    """One `commit_unit` in a thread that makes one storage call each time it is told to."""

    store: "StepStore"
    record: commit.CommitRecord
    shard: bytes
    orders: list[str] = field(default_factory=list)
    turn: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    waits: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    outcome: str = ""

    def start(self) -> None:
        self.store.attempt = self
        threading.Thread(target=self.run, daemon=True).start()
        self.waits.acquire()

    def run(self) -> None:
        try:
            self.outcome = commit.commit_unit(self.store, self.record, self.shard)
        except StorageUnavailable:
            self.outcome = "unknown"
        except Died:
            self.outcome = "died"
        self.waits.release()

    def step(self, order: str) -> None:
        """Let it make its next call. order: "go", "lose answer", "lose request" or "die"."""
        if not self.outcome:
            self.orders.append(order)
            self.turn.release()
            self.waits.acquire()


class StepStore(Store):
    """A store whose calls wait for their turn and may lose the request or the answer."""

    attempt: Attempt

    def write(self, key, data):
        return self.ordered(lambda: Store.write(self, key, data))

    def create(self, key, data):
        return self.ordered(lambda: Store.create(self, key, data))

    def read(self, key):
        return self.ordered(lambda: Store.read(self, key))

    def delete(self, key):
        return self.ordered(lambda: Store.delete(self, key))

    def ordered(self, call):
        self.attempt.waits.release()
        self.attempt.turn.acquire()
        order = self.attempt.orders.pop()
        if order == "die":
            raise Died
        if order == "lose request":
            raise StorageUnavailable(self.url, "the request was lost")
        result = call()
        if order == "lose answer":
            raise StorageUnavailable(self.url, "the answer was lost")
        return result


def shard_of(unit: int) -> bytes:
    return b"shard of unit %d" % unit


def expected_digest() -> str:
    lines = [f"{unit}:{hashlib.sha256(shard_of(unit)).hexdigest()}\n" for unit in range(UNITS)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


orders = st.sampled_from(["go"] * 8 + ["lose answer", "lose request", "die", "finish"])
schedules = st.lists(st.tuples(st.integers(0, len(UNIT_OF_ATTEMPT) - 1), orders), max_size=40)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schedule=schedules)
def test_any_interleaving_commits_each_unit_once(schedule, describe, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    plain = open_store(f"memory://{uuid.uuid4().hex}")
    attempts = []
    for unit in UNIT_OF_ATTEMPT:
        attempts.append(Attempt(StepStore(plain.url), describe(shard_of(unit), unit), shard_of(unit)))
        attempts[-1].start()

    seen: dict[int, commit.CommitRecord] = {}
    for number, order in schedule:
        if order == "finish":
            finish_if_complete(plain)
        else:
            attempts[number].step(order)
        records = commit.read_commits(plain)
        assert {unit: records[unit] for unit in seen} == seen, "a committed unit changed"
        seen = records
        assert [plain.read(key) for key in commit.visible_shards(plain)] == [
            shard_of(unit) for unit in records
        ]

    for attempt in attempts:  # the living come to their end
        while not attempt.outcome:
            attempt.step("go")
    for unit in sorted(
        set(range(UNITS)) - set(commit.read_commits(plain))
    ):  # and a rerun does what is missing
        commit.commit_unit(plain, describe(shard_of(unit), unit), shard_of(unit))
    assert commit.finish_campaign(plain, UNITS).digest == expected_digest()
    records = commit.read_commits(plain)
    assert set(plain.list("data/")) == {record.path for record in records.values()}
    for attempt in attempts:
        won = records[attempt.record.unit].attempt == attempt.record.attempt
        assert attempt.outcome in (
            {"committed", "unknown", "died"} if won else {"duplicate", "unknown", "died"}
        )


def finish_if_complete(store: Store) -> None:
    if len(commit.read_commits(store)) == UNITS:
        assert commit.finish_campaign(store, UNITS).digest == expected_digest()


@pytest.mark.parametrize("order", ["lose answer", "lose request"])
def test_one_lost_message_at_any_call_changes_nothing(describe, monkeypatch, order):
    """Two attempts of a unit, one message lost at each possible place: still one winner and no double report."""
    monkeypatch.setattr("time.sleep", lambda _: None)
    for lost_at in range(4):
        plain = open_store(f"memory://{uuid.uuid4().hex}")
        attempt = Attempt(StepStore(plain.url), describe(shard_of(0), 0), shard_of(0))
        attempt.start()
        for call in range(12):
            attempt.step(order if call == lost_at else "go")
        assert commit.commit_unit(plain, describe(shard_of(0), 0), shard_of(0)) == (
            "duplicate" if attempt.outcome == "committed" else "committed"
        )
        assert len(commit.read_commits(plain)) == 1
