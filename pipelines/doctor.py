"""`bitdgdm doctor`: will the commands work on this machine, and what to do if not.

Guarantees: changes nothing outside temporary folders; every check that isn't fine names its fix.
Knows nothing of: what the user wants to run, so a missing GPU is a remark and not a failure.
"""

import importlib.util
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import psutil

from bitdgdm.infra import registry
from bitdgdm.infra.errors import BitDGDMError
from bitdgdm.infra.storage import open_store, probe_create_only

GIB = 2**30
NEEDED = (
    "torch",
    "numpy",
    "pyarrow",
    "safetensors",
    "rdkit",
    "ray",
    "mlflow-skinny",
    "fsspec",
    "s3fs",
    "pydantic",
)


@dataclass(frozen=True)
class Check:
    """One finding. level: "ok", "note" (works, slower or less) or "problem"."""

    name: str
    level: str
    found: str
    fix: str = ""


def examine(storage: str | None = None) -> list[Check]:
    """Return every finding; `storage` is a campaign URL to try as well."""
    checks: list[Check] = []
    for part in (_python, _packages, _machine, _gpu, _model, _registry, lambda: _storage(storage)):
        checks.extend(part())
    return checks


def _python() -> Iterator[Check]:
    ok = sys.version_info >= (3, 11)
    yield Check(
        "python",
        "ok" if ok else "problem",
        platform.python_version(),
        "" if ok else "install Python 3.11 or newer",
    )


def _packages() -> Iterator[Check]:
    for name in NEEDED:
        try:
            yield Check(name, "ok", version(name))
        except PackageNotFoundError:
            yield Check(name, "problem", "missing", f"pip install {name}")


def _machine() -> Iterator[Check]:
    yield Check("cpu", "ok", f"{os.cpu_count()} cores")
    free = psutil.virtual_memory().available / GIB
    yield Check(
        "memory",
        "ok" if free > 3 else "note",
        f"{free:.1f} GiB free",
        "" if free > 3 else "a local Ray cluster wants 3 GiB",
    )
    disk = shutil.disk_usage(tempfile.gettempdir()).free / GIB
    yield Check("disk", "ok" if disk > 2 else "problem", f"{disk:.0f} GiB free in {tempfile.gettempdir()}",
                "" if disk > 2 else "set TMPDIR to a larger disk")  # fmt: skip


def _gpu() -> Iterator[Check]:
    import torch

    if not torch.cuda.is_available():
        yield Check(
            "gpu",
            "note",
            "none that torch can use",
            "the CPU path works, at about a molecule a second a core",
        )
        return
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        yield Check(
            f"gpu {i}",
            "ok",
            f"{p.name}, {p.total_memory / GIB:.0f} GiB, sm_{p.major}{p.minor}, CUDA {torch.version.cuda}",
        )
    nvcc = shutil.which("nvcc")
    yield Check(
        "nvcc",
        "ok" if nvcc else "note",
        nvcc or "not on PATH",
        "" if nvcc else "install the CUDA toolkit for our kernels",
    )
    pycuda = importlib.util.find_spec("pycuda") is not None
    yield Check(
        "pycuda",
        "ok" if pycuda else "note",
        "installed" if pycuda else "missing",
        "" if pycuda else "pip install bitdgdm[gpu]",
    )


def _model() -> Iterator[Check]:
    from bitdgdm.models.source import load_source

    yield _attempt("builtin model", lambda: load_source("builtin:digress-qm9").digest[:16])


def _registry() -> Iterator[Check]:
    yield _attempt("registry", lambda: f"{registry.location()}, {len(registry.list_models())} versions")


def _storage(url: str | None) -> Iterator[Check]:
    with tempfile.TemporaryDirectory(prefix="bitdgdm-") as folder:
        yield _attempt("local storage", partial(_create_only, folder))
    if url:
        yield _attempt("storage", partial(_create_only, url))


def _create_only(url: str) -> str:
    probe_create_only(open_store(url))
    return f"{url} keeps create-only puts"


def _attempt(name: str, look: Callable[[], str]) -> Check:
    try:
        return Check(name, "ok", look())
    except BitDGDMError as e:
        return Check(name, "problem", str(e), "see the message")
