"""What every end-to-end test needs: the command line as a user runs it, and real servers."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--steps", "4", "--unit-size", "16", "--micro-batch", "16", "--no-alerts"]


class Command:
    """Runs `bitdgdm ...` in its own process."""

    def __init__(self, env: dict[str, str]) -> None:
        self.env = env

    def start(self, *args: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "bitdgdm.pipelines.cli", *args], env=self.env, cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip

    def __call__(self, *args: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        process = self.start(*args)
        stdout, stderr = process.communicate(timeout=240)
        assert process.returncode == code, (
            f"exit {process.returncode}, wanted {code}\n{stdout}\n{stderr[-3000:]}"
        )
        return subprocess.CompletedProcess(args, code, stdout, stderr)

    def json(self, *args: str, code: int = 0) -> Any:
        return json.loads(self(*args, "--json", code=code).stdout)


@pytest.fixture
def bitdgdm(tmp_path: Path) -> Command:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "MLFLOW_"))}
    return Command(env | {
        "PYTHONPATH": str(ROOT), "BITDGDM_HOME": str(tmp_path / "home"), "RAY_AUTH_MODE": "disabled",
        "AWS_EC2_METADATA_DISABLED": "true",
    })  # fmt: skip


def until(condition: Callable[[], bool], what: str, within_s: float = 120) -> None:
    """Wait for `condition`, by asking for it."""
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"waited {within_s:.0f} s in vain for {what}")
        time.sleep(0.02)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    """A real S3 protocol server; yields its endpoint."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_server: str, bitdgdm: Command) -> str:
    """An empty bucket that the command line can reach; yields its name."""
    import boto3

    bitdgdm.env |= {
        "AWS_ENDPOINT_URL": s3_server, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }  # fmt: skip
    name = f"bucket-{time.monotonic_ns()}"
    boto3.client("s3", endpoint_url=s3_server, aws_access_key_id="test", aws_secret_access_key="test",
                 region_name="us-east-1").create_bucket(Bucket=name)  # fmt: skip
    return name
