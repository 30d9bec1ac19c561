"""A Ray cluster to work on: the one at RAY_ADDRESS, or one of this machine alone.

Guarantees: nothing on stdout; a local cluster listens on the loopback interface only and has no dashboard;
workers can import bitdgdm and use one core each; `Cluster.cpus` is what a pool may claim: one CPU stays for the
tasks that feed it.
Knows nothing of: tasks and actors.
"""

import importlib.metadata
import logging
import os
import re
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitdgdm.infra.errors import ClusterUnavailable

_ROOT = Path(__file__).resolve().parent.parent
_LOCAL_OBJECT_STORE_BYTES = 512 * 2**20  # unit descriptors and the weights of one model

# Ray reads these when it is imported, so they are set when this module is, which everything that imports Ray imports
# first; the user's settings win. Ray's name for "listen beyond loopback" is the second: without it everybody in the
# network could run code on this machine.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
if os.environ.get("RAY_ADDRESS") in (None, "", "local"):
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # no other machine can reach a loopback cluster
# else a thread that still asks for results after `disconnect` starts a cluster of its own
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
_NOT_SHIPPED = [".git", ".venv", "tests", "benchmarks", "docs", "shared", "**/__pycache__"]


@dataclass(frozen=True)
class Cluster:
    """What can be claimed: CPUs and GPUs over all nodes. local: started here, gone with this process."""

    cpus: int
    gpus: int
    local: bool
    nodes: int


def connect(address: str | None = None, cpus: int | None = None) -> Cluster:
    """Join the cluster at `address` or RAY_ADDRESS, else start one here for `cpus` workers (default: one per core).

    A second call in the same process returns the cluster it is connected to.
    Raises: ClusterUnavailable.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    local = address in (None, "", "local")
    if not local:
        _check_answers(str(address))
    import ray

    if not ray.is_initialized():
        options = _local_options(cpus or _cores()) if local else _remote_options(str(address))
        try:
            with _silent_start():
                ray.init(logging_level=logging.ERROR, log_to_driver=False, **options)
        except (ConnectionError, TimeoutError, RuntimeError, ValueError) as error:
            raise ClusterUnavailable(
                address or "this machine", " ".join(str(error).split())[:300].rstrip(".")
            ) from error
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    total = ray.cluster_resources()
    nodes = sum(bool(node["Alive"]) for node in ray.nodes())
    claimable = max(1, int(total.get("CPU", 1)) - 1)
    return Cluster(cpus=claimable, gpus=int(total.get("GPU", 0)), local=local, nodes=nodes)


def disconnect() -> None:
    """Leave the cluster; a local one stops."""
    import ray

    ray.shutdown()


@contextmanager
def _silent_start() -> Iterator[None]:
    """Keep Ray's native code from writing to the terminal: what it has to say of failures arrives as exceptions.

    Its log level is read once, while it starts, and announced on stderr.
    """
    if "RAY_BACKEND_LOG_LEVEL" in os.environ:
        yield
        return
    os.environ["RAY_BACKEND_LOG_LEVEL"] = "fatal"
    sys.stderr.flush()
    terminal, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)
        os.close(nowhere)
        del os.environ["RAY_BACKEND_LOG_LEVEL"]


def _local_options(cpus: int) -> dict[str, Any]:
    return {
        "address": "local",
        "num_cpus": cpus + 1,  # a pool of `cpus` workers leaves one, or Ray Data's read task waits for ever
        "include_dashboard": False,
        "object_store_memory": _LOCAL_OBJECT_STORE_BYTES,
        "runtime_env": {"env_vars": {"PYTHONPATH": _python_path(), "OMP_NUM_THREADS": "1"}},
    }


def _remote_options(address: str) -> dict[str, Any]:
    """On somebody's cluster our code travels along, unless the job or the image brings it."""
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        return {"address": address}  # Ray refuses two settings of one thing
    environment: dict[str, Any] = {"env_vars": {"OMP_NUM_THREADS": "1"}}
    if not _installed():
        environment |= {"working_dir": str(_ROOT), "excludes": _NOT_SHIPPED}
    return {"address": address, "runtime_env": environment}


def _check_answers(address: str) -> None:
    """Ray waits many minutes for a cluster that isn't there; a closed port shows at once."""
    parts = re.fullmatch(r"(?:ray://)?(?P<host>[^:/]+|\[[^\]]+\]):(?P<port>\d+)/?", address)
    if parts is None:
        return  # "auto" and the like: Ray looks on this machine
    try:
        socket.create_connection((parts["host"].strip("[]"), int(parts["port"])), timeout=10).close()
    except OSError as error:
        raise ClusterUnavailable(address, error.strerror or str(error)) from error


def _installed() -> bool:
    """Whether this code is in site-packages, not in a checkout."""
    try:
        return Path(str(importlib.metadata.distribution("bitdgdm").locate_file("bitdgdm"))).resolve() == _ROOT
    except importlib.metadata.PackageNotFoundError:
        return False


def _python_path() -> str:
    return os.pathsep.join(part for part in (str(_ROOT), os.environ.get("PYTHONPATH", "")) if part)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
