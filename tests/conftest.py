"""What every test gets: a private home, no cluster or registry of the user, one hypothesis profile.

Guarantees: nothing a test does reaches the user's registry, running Ray cluster or cloud credentials.
Knows nothing of: what is tested. Variables are set before any test module is imported, since torch, Ray and
MLflow read them once.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest

HOME = tempfile.mkdtemp(prefix="bitdgdm-test-home-")

for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "AWS_PROFILE", "AWS_ENDPOINT_URL"):
    os.environ.pop(name, None)
os.environ["BITDGDM_HOME"] = HOME
os.environ["RAY_AUTH_MODE"] = "disabled"  # Ray 2.60 asks for a token by default
os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

hypothesis.settings.register_profile("local", deadline=None, max_examples=50)
hypothesis.settings.register_profile("ci", deadline=None, max_examples=50, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_unconfigure() -> None:
    shutil.rmtree(HOME, ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked gpu where torch sees no CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[Any]:
    """A local Ray cluster of two workers' size for one test module; it stops with the module."""
    from bitdgdm.infra import cluster

    try:
        yield cluster.connect(cpus=2)
    finally:
        cluster.disconnect()
