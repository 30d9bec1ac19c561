"""`bitdgdm doctor`: will the commands work on this machine, and what to do if not.

Guarantees: changes nothing outside temporary folders; every check that isn't fine names its fix.
Knows nothing of: what the user wants to run, so a missing GPU is a remark and not a failure.
"""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import psutil

from bitdgdm.infra import registry
from bitdgdm.infra.errors import BitDGDMError, KernelsUnavailable
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
    yield from _kernels()


def _kernels() -> Iterator[Check]:
    """What our CUDA kernels need; without them a GPU works too, many times slower."""
    from bitdgdm.kernels import toolchain
    from bitdgdm.kernels.build import cache_folder

    yield Check("driver", "ok", _driver())
    parts = (
        ("nvcc", toolchain.compiler_missing, toolchain.compiler),
        ("pycuda", toolchain.pycuda_missing, lambda: version("pycuda")),
        ("kernel cache", toolchain.cache_unwritable, lambda: str(cache_folder())),
    )
    for name, look, found in parts:
        reason = look()
        what, _, fix = reason.partition("; ")
        yield Check(name, "note" if reason else "ok", what if reason else found(), fix)
    if not toolchain.missing():
        yield _attempt("kernels", _run_kernels)


def _driver() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "there is one; nvidia-smi, which tells its version, is not on the PATH"
    ask = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(ask, capture_output=True, text=True)
    return ", ".join(sorted(set(done.stdout.split()))) or done.stderr.strip()


def _run_kernels() -> str:
    """Compile every kernel, draw a few molecules, compare with each other and with PyTorch."""
    import torch

    from bitdgdm.models.engine import load_engine
    from bitdgdm.models.sampler import sample_ids

    began = time.monotonic()
    ours = load_engine("builtin:digress-qm9", "cuda", engine="kernels")
    together, alone = (sample_ids(ours, ours.config, 1, i, n, 4, n) for i, n in ((0, 64), (9, 1)))
    if not (torch.equal(together.X[9:10], alone.X) and torch.equal(together.E[9:10], alone.E)):
        raise KernelsUnavailable("a molecule came out differently alone and with others")
    theirs = load_engine("builtin:digress-qm9", "cuda", engine="torch")
    agree = sample_ids(theirs, theirs.config, 1, 0, 64, 4, 64).X == together.X
    if agree.float().mean() < 0.95:  # bf16 moves a draw now and then
        raise KernelsUnavailable(f"they agree with PyTorch on {agree.float().mean():.0%} of the atoms only")
    return f"compiled and tried in {time.monotonic() - began:.0f} s, as PyTorch draws"


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
