"""On a SQLite file and over HTTP, the same promises. Run: pytest tests/infra/test_registry.py"""

import os
import shutil
import sys
import threading
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from bitdgdm.infra import registry
from bitdgdm.infra.errors import ModelNotFound, RegistryRefused, RegistryUnavailable

ENVIRONMENT = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "BITDGDM_HOME")


@pytest.fixture(scope="session")
def fresh_home(tmp_path_factory) -> Path:
    """A registry without a model; making one takes seconds, copying it none."""
    home = tmp_path_factory.mktemp("home")
    saved = {name: os.environ.pop(name, None) for name in ENVIRONMENT}
    os.environ["BITDGDM_HOME"] = str(home)
    assert registry.list_models() == []
    for name, value in saved.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    return home


@pytest.fixture(scope="session")
def mlflow_server(fresh_home, tmp_path_factory, session_server) -> str:
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(fresh_home / "registry.db", folder / "server.db")
    return session_server(
        lambda port: [
            str(Path(sys.executable).with_name("mlflow")),
            "server",
            "--port",
            str(port),
            "--workers",
            "1",
            "--backend-store-uri",
            f"sqlite:///{folder}/server.db",
            "--artifacts-destination",
            str(folder / "files"),
            "--serve-artifacts",
        ],
        "/health",
    )


@pytest.fixture(params=["sqlite", "http"])
def place(request, fresh_home, tmp_path, monkeypatch) -> str:
    """The registry in use; returns what `location` has to say."""
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    if request.param == "sqlite":
        shutil.copy(fresh_home / "registry.db", tmp_path / "registry.db")
        monkeypatch.setenv("BITDGDM_HOME", str(tmp_path))
        return f"sqlite:///{tmp_path}/registry.db"
    server = request.getfixturevalue("mlflow_server")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    return server


@pytest.fixture
def files(tmp_path) -> dict[str, Path]:
    model, card = tmp_path / "anything.bin", tmp_path / "card"
    model.write_bytes(bytes(range(256)) * 1000)
    card.write_text("# card")
    return {"model.safetensors": model, "docs/card.md": card}


@pytest.fixture
def name() -> str:
    return f"digress-{uuid.uuid4().hex[:8]}"


def test_a_registered_version_is_found_by_every_kind_of_uri(place, name, files):
    first = registry.register(name, files, {"recipe": "rtn-w8a8", "bits": "8"}, ["champion", "v-next"])
    second = registry.register(name, files, {"recipe": "rtn-w4a4"})
    assert (first.version, second.version) == (1, 2)
    assert first.tags == {"recipe": "rtn-w8a8", "bits": "8"} and first.aliases == ("champion", "v-next")
    assert first.uri == f"models:/{name}/1" and first.created.endswith("+00:00") and first.source_uri
    for uri in (f"models:/{name}/1", f"{name}/1", f"models:/{name}@champion", f"{name}@v-next"):
        assert registry.resolve(uri) == first
    for uri in (f"models:/{name}", name, f"models:/{name}/2", f"{name}/latest"):
        assert registry.resolve(uri) == second
    assert registry.location() == place


def test_a_download_holds_the_files_under_their_names(place, name, files, tmp_path):
    version = registry.register(name, files, {})
    folder = registry.download(version, tmp_path / "into")
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert found == {key: path.read_bytes() for key, path in files.items()}


def test_an_alias_moves_and_lists_show_where_it_is(place, name, files):
    for _ in range(3):
        registry.register(name, {"a": files["docs/card.md"]}, {}, ["champion"])
    registry.set_alias(name, 2, "champion")
    registry.set_alias(name, 2, "challenger")
    mine = [version for version in registry.list_models() if version.name == name]
    assert [(version.version, version.aliases) for version in mine] == [
        (3, ()),
        (2, ("challenger", "champion")),
        (1, ()),
    ]
    assert registry.resolve(f"{name}@champion").version == 2


def test_models_of_others_are_not_listed_but_can_be_used(place, name, files):
    registry.import_quietly().MlflowClient(place).create_registered_model(f"theirs-{name}")
    assert f"theirs-{name}" not in {version.name for version in registry.list_models()}
    registry.register(f"theirs-{name}", {"a": files["docs/card.md"]}, {})
    assert f"theirs-{name}" in {version.name for version in registry.list_models()}


def test_what_is_not_there_is_told_with_the_uri(place, name, files, one_line):
    registry.register(name, {"a": files["docs/card.md"]}, {})
    missing = [f"models:/{name}x/1", f"{name}@champion", f"{name}/7", f"{name}x@champion", f"{name}x"]
    for uri in [*missing, "models:/a/b/c", "models:/", "", f"{name}@champion/1", f"{name}/-1"]:
        with pytest.raises(ModelNotFound) as caught:
            registry.resolve(uri)
        assert uri in one_line(caught.value) and caught.value.exit_code == 2
    with pytest.raises(ModelNotFound):
        registry.set_alias(name, 7, "champion")
    assert registry.resolve(name).aliases == ()


def test_what_cannot_be_registered_leaves_no_version(place, name, files, one_line, tmp_path):
    card = {"a": files["docs/card.md"]}
    for bad_name, bad_aliases in (
        (f"{name}/x", []),
        (f"{name}:x", []),
        (name, ["not this"]),
        (name, ["latest"]),
    ):
        with pytest.raises(RegistryRefused) as caught:
            registry.register(bad_name, card, {}, bad_aliases)
        one_line(caught.value)
    with pytest.raises(FileNotFoundError):
        registry.register(name, {"a": tmp_path / "none"}, {})
    with pytest.raises(ValueError, match="leaves the version"):
        registry.register(name, {"../a": files["docs/card.md"]}, {})
    assert name not in {version.name for version in registry.list_models()}


@pytest.mark.parametrize("place", ["sqlite"], indirect=True)  # over HTTP the files are the server's
def test_files_that_are_gone_are_told(place, name, files, tmp_path, one_line):
    version = registry.register(name, {"a": files["docs/card.md"]}, {})
    shutil.rmtree(version.source_uri.removeprefix("file://"))
    with pytest.raises(ModelNotFound) as caught:
        registry.download(version, tmp_path / "into")
    one_line(caught.value)
    assert list((tmp_path / "into").iterdir()) == []


def test_registrations_at_the_same_time_each_get_a_version(place, name, files):
    made, gate = [], threading.Barrier(4)

    def work() -> None:
        gate.wait()
        made.append(registry.register(name, {"a": files["docs/card.md"]}, {}, ["champion"]).version)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == [1, 2, 3, 4]


def test_nothing_is_printed(tmp_path, python, files):
    """The first use of a fresh home, in a process of its own: tables are made, a model comes and goes."""
    code = (
        "import sys; from pathlib import Path; from bitdgdm.infra import registry as r;"
        "v = r.register('m', {'a': Path(sys.argv[1])}, {}, ['champion']);"
        "r.download(r.resolve('m@champion'), Path(sys.argv[2])); r.list_models()"
    )
    home = tmp_path / "new" / "home"
    process = python(
        code, str(files["docs/card.md"]), str(tmp_path / "into"), env={"BITDGDM_HOME": str(home)}
    )
    assert process.communicate(timeout=120) == ("", "")
    assert process.returncode == 0 and (tmp_path / "into/a").read_text() == "# card"
    assert {path.name for path in home.iterdir()} == {"registry.db", "artifacts"}


# -- registries that can't be used --------------------------------------------------------------------------


def test_a_dead_server_is_unavailable(monkeypatch, unused_port, one_line):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:secret@127.0.0.1:{unused_port}")
    with pytest.raises(RegistryUnavailable) as caught:
        registry.resolve("models:/m/1")
    assert "refused" in one_line(caught.value) and caught.value.exit_code == 75
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "kind"),
    [(401, RegistryRefused), (403, RegistryRefused), (404, RegistryRefused), (500, RegistryUnavailable)],
)
def test_a_server_that_says_no_is_told_apart_from_one_in_trouble(monkeypatch, one_line, status, kind):
    class Refuses(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_error(status)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Refuses)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_port}")
    with pytest.raises(kind) as caught:
        registry.resolve("models:/m/1")
    one_line(caught.value)
    server.shutdown()
    server.server_close()


def test_a_server_that_dies_between_two_calls_is_unavailable(monkeypatch, one_line):
    class Healthy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Healthy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_port}")
    registry._client()
    server.shutdown()
    server.server_close()
    for act in (lambda: registry.resolve("models:/m/1"), registry.list_models):
        with pytest.raises(RegistryUnavailable) as caught:
            act()
        one_line(caught.value)


@pytest.mark.parametrize(
    "content", [b"this is a text, not a database", None], ids=["no database", "a folder"]
)
def test_a_file_that_is_no_registry_is_refused_and_kept(tmp_path, monkeypatch, one_line, content):
    file = tmp_path / "registry.db"
    file.mkdir() if content is None else file.write_bytes(content)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("BITDGDM_HOME", str(tmp_path))
    with pytest.raises(RegistryRefused) as caught:
        registry.list_models()
    assert str(file) in one_line(caught.value)
    assert file.is_dir() if content is None else file.read_bytes() == content


def test_a_plain_folder_is_refused_as_a_registry(tmp_path, monkeypatch, one_line):
    for uri in (str(tmp_path / "mlruns"), (tmp_path / "mlruns").as_uri()):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        with pytest.raises(RegistryRefused) as caught:
            registry.list_models()
        assert "sqlite:///" in one_line(caught.value)
    assert not (tmp_path / "mlruns").exists()
