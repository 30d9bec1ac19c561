"""Run: pytest tests/e2e/test_cluster.py   (a Ray head of its own, about a minute)"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import TINY, Command, free_port, until

CAMPAIGN = ["--model", "builtin:digress-qm9", "--count", "48", "--seed", "5", *TINY]


@pytest.fixture
def head(bitdgdm: Command, tmp_path: Path) -> Iterator[str]:
    """A running cluster that says it has a GPU; yields its address."""
    port = free_port()
    ray = Path(sys.executable).parent / "ray"
    process = subprocess.Popen(
        [str(ray), "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={port}", "--num-cpus=3",
         "--num-gpus=1", "--include-dashboard=false", "--disable-usage-stats", f"--temp-dir=/tmp/r{port}"],
        env=bitdgdm.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    until(lambda: "Ray runtime started" in process.stdout.readline(), "the head node")  # type: ignore[union-attr]
    yield f"127.0.0.1:{port}"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_a_campaign_on_an_existing_cluster_asks_its_workers_what_they_have(
    bitdgdm: Command, head: str, tmp_path: Path
) -> None:
    here = bitdgdm.json("generate", *CAMPAIGN, "--out", str(tmp_path / "here"), "--executor", "local")
    bitdgdm.env["RAY_ADDRESS"] = head
    there = bitdgdm.json("generate", *CAMPAIGN, "--out", str(tmp_path / "there"))
    assert there["digest"] == here["digest"]
    refused = bitdgdm("generate", *CAMPAIGN, "--device", "cuda", "--out", str(tmp_path / "gpu"), code=2)
    assert "CUDA" in refused.stderr and not (tmp_path / "gpu" / "campaign.json").exists()
