"""Run: pytest tests/tasks/test_ray_is_private.py

Ray reads whether to listen on the network when it is imported: whichever module is imported first must have said no.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import {module}
import ray
from ray._private import auto_init_hook, services

print(services.get_node_ip_address(), auto_init_hook.enable_auto_connect)
"""
FIRST = [
    "tasks.decompose_layer",
    "tasks.progress_board",
    "tasks.sample_unit",
    "pipelines.quantize",
    "pipelines.ray_run",
]


@pytest.mark.parametrize("module", FIRST)
def test_whatever_is_imported_first_a_local_cluster_stays_on_loopback_and_never_starts_by_itself(
    module: str,
) -> None:
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"PYTHONPATH": str(ROOT)}
    program = [sys.executable, "-c", PROGRAM.format(module=f"bitdgdm.{module}")]
    told = subprocess.run(program, env=env, capture_output=True, text=True, timeout=120, check=True).stdout
    assert told.split() == ["127.0.0.1", "False"]
