"""A whole campaign in one process, for tests to kill and to race; not a test itself.

Run: python campaign_process.py URL UNITS [KILL_AT]   (waits for a line on stdin, prints what became of each unit)
KILL_AT: the process kills itself with SIGKILL just before its KILL_AT-th change of the store, counted from 0.
"""

import json
import os
import signal
import sys

from bitdgdm.infra import commit
from bitdgdm.infra.storage import Store, open_store


class Mortal(Store):
    """A store that ends the process before a given change."""

    left: int = -1

    def write(self, key: str, data: bytes) -> None:
        self.count()
        super().write(key, data)

    def create(self, key: str, data: bytes) -> bool:
        self.count()
        return super().create(key, data)

    def delete(self, key: str) -> None:
        self.count()
        super().delete(key)

    def count(self) -> None:
        if Mortal.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        Mortal.left -= 1


def shard_of(unit: int) -> bytes:
    return b"shard %d " % unit * (unit + 1)


def run_campaign(store: Store, units: int, skip_done: bool) -> dict[int, str]:
    """Commit every unit, then finish. skip_done: leave out what is committed already, as a resume does."""
    done = commit.read_commits(store) if skip_done else {}
    outcomes = {}
    for unit in sorted(set(range(units)) - set(done)):
        record = commit.CommitRecord.describe(
            shard_of(unit),
            unit=unit,
            attempt=commit.new_attempt(),
            rows=1,
            first_id=unit,
            fingerprint="f",
            artifact_digest="a",
            recipe="r",
            hardware="cpu",
            code_version="0",
            host=str(os.getpid()),
            seconds=0.0,
        )
        outcomes[unit] = commit.commit_unit(store, record, shard_of(unit))
    commit.finish_campaign(store, units)
    return outcomes


def main() -> None:
    url, units, kill_at = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else -1
    store = Mortal(open_store(url).url)
    print("ready", flush=True)
    sys.stdin.readline()
    Mortal.left = kill_at
    print(json.dumps(run_campaign(store, units, skip_done=kill_at >= 0)))


if __name__ == "__main__":
    main()
