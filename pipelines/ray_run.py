"""A Ray cluster for the length of one job.

Guarantees: a cluster that was there before the job stays; one that the job started goes with it.
Knows nothing of: the job.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from bitdgdm.infra.cluster import Cluster, connect, disconnect


@contextmanager
def cluster() -> Iterator[Cluster]:
    """Yield the connected cluster."""
    import ray

    ours = not ray.is_initialized()
    connected = connect()
    try:
        yield connected
    finally:
        if ours:
            disconnect()
