"""Run: pytest tests/e2e/test_object_storage.py   (a real S3 protocol server on loopback)"""

import io
import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import boto3
import pyarrow.parquet as pq
import pytest

from .conftest import TINY, Command, free_port, until

CAMPAIGN = ["--model", "builtin:digress-qm9", "--count", "48", "--seed", "5", *TINY]


def test_a_campaign_on_s3_has_the_digest_of_the_same_campaign_on_disk(
    bitdgdm: Command, bucket: str, tmp_path: Path
) -> None:
    on_disk = bitdgdm.json("generate", *CAMPAIGN, "--out", str(tmp_path / "out"), "--executor", "local")
    on_s3 = bitdgdm.json("generate", *CAMPAIGN, "--out", f"s3://{bucket}/campaign")
    assert on_s3["digest"] == on_disk["digest"]
    assert on_s3["report"] == f"s3://{bucket}/campaign/report.html"


def test_an_independent_s3_client_reads_what_the_manifest_names(bitdgdm: Command, bucket: str) -> None:
    bitdgdm("generate", *CAMPAIGN, "--out", f"s3://{bucket}/c", "--executor", "local")
    env = bitdgdm.env
    s3 = boto3.client("s3", endpoint_url=env["AWS_ENDPOINT_URL"], region_name="us-east-1", aws_access_key_id="test",
                      aws_secret_access_key="test")  # fmt: skip
    listed = json.loads(s3.get_object(Bucket=bucket, Key="c/manifest.json")["Body"].read())["shards"]
    ids: list[int] = []
    for shard in listed:
        body = s3.get_object(Bucket=bucket, Key=f"c/{shard['path']}")["Body"].read()
        ids += pq.read_table(io.BytesIO(body)).column("sample_id").to_pylist()
    assert ids == list(range(48))


@pytest.fixture
def careless_store(bitdgdm: Command, tmp_path: Path) -> Iterator[str]:
    """An S3 server that ignores If-None-Match; yields the URL of a bucket."""
    port, folder = free_port(), tmp_path / "served"
    (folder / "bucket").mkdir(parents=True)
    server = subprocess.Popen(
        [str(Path(sys.executable).parent / "rclone"), "serve", "s3", "--auth-key", "test,testtest", "--addr", f"127.0.0.1:{port}", str(folder)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    bitdgdm.env |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "testtest", "AWS_DEFAULT_REGION": "us-east-1",
    }  # fmt: skip

    def up() -> bool:
        try:
            urllib.request.urlopen(bitdgdm.env["AWS_ENDPOINT_URL"], timeout=1)
        except urllib.error.HTTPError:
            return True
        except OSError:
            return False
        return True

    until(up, "the S3 server")
    yield "s3://bucket/campaign"
    server.kill()
    server.wait()


def test_a_server_that_ignores_create_only_puts_is_refused_before_any_work(
    bitdgdm: Command, careless_store: str
) -> None:
    refused = bitdgdm("generate", *CAMPAIGN, "--out", careless_store, "--executor", "local", code=2)
    assert "create-only" in refused.stderr and refused.stderr.count("\n") == 1


def test_a_missing_bucket_and_a_silent_server_are_told_apart(bitdgdm: Command, bucket: str) -> None:
    missing = bitdgdm("generate", *CAMPAIGN, "--out", "s3://no-such-bucket-here/c", code=2)
    assert "no-such-bucket-here" in missing.stderr and missing.stderr.count("\n") == 1
    bitdgdm.env["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{free_port()}"
    unreachable = bitdgdm("generate", *CAMPAIGN, "--out", f"s3://{bucket}/c", code=75)
    assert unreachable.stderr.count("\n") == 1


def test_wrong_credentials_are_refused_in_one_line(bitdgdm: Command, careless_store: str) -> None:
    bitdgdm.env["AWS_SECRET_ACCESS_KEY"] = "not-the-secret"
    refused = bitdgdm("generate", *CAMPAIGN, "--out", careless_store, code=2)
    assert "AWS_" in refused.stderr and refused.stderr.count("\n") == 1
    assert "not-the-secret" not in refused.stderr + refused.stdout
