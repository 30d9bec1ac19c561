"""Run: pytest tests/infra/test_provenance.py"""

import getpass
import platform
import subprocess
import sys
from datetime import UTC, datetime

import pytest

from bitdgdm.infra.fingerprint import canonical_json
from bitdgdm.infra.provenance import provenance


@pytest.fixture
def repository(tmp_path, monkeypatch):
    def git(*command: str) -> str:
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        run = subprocess.run(
            ["git", *identity, *command], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        return run.stdout.strip()

    git("init", "-q")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-q", "-m", "first")
    git("remote", "add", "origin", "https://someone:ghp_secret@example.org/team/project.git")
    monkeypatch.chdir(tmp_path)
    return git


def test_the_working_folder_is_named_by_commit_and_remote_without_its_password(repository, tmp_path):
    found = provenance()["git"]
    assert found == {
        "remote": "https://***@example.org/team/project.git",
        "commit": repository("rev-parse", "HEAD"),
        "dirty": False,
    }
    (tmp_path / "file").write_text("two")
    assert provenance()["git"]["dirty"] is True


def test_a_folder_without_git_and_a_machine_without_it_are_fine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert provenance()["git"] is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance()["git"] is None


def test_a_user_without_a_name_is_a_number(monkeypatch):
    def nameless() -> str:
        raise KeyError("getpwuid(): uid not found: 4711")

    monkeypatch.setattr(getpass, "getuser", nameless)
    assert provenance()["user"].startswith("uid ")


def test_it_is_plain_json_with_the_time_in_utc():
    before = datetime.now(UTC).replace(microsecond=0)
    found = provenance()
    canonical_json(found)
    assert before <= datetime.fromisoformat(found["time"]) <= datetime.now(UTC)
    assert found["python"] == platform.python_version() and "pyarrow" in found["packages"]


def test_secrets_on_the_command_line_are_masked(monkeypatch):
    given = [
        "bitdgdm",
        "--token",
        "s1",
        "--api-key=s2",
        "--out",
        "s3://bucket/x",
        "http://me:s3cret@host/x",
        "--seed",
        "7",
        "AWS_SECRET_ACCESS_KEY=s4",
    ]
    monkeypatch.setattr(sys, "argv", given)
    shown = provenance()["argv"]
    assert shown == [
        "bitdgdm",
        "--token",
        "***",
        "--api-key=***",
        "--out",
        "s3://bucket/x",
        "http://***@host/x",
        "--seed",
        "7",
        "AWS_SECRET_ACCESS_KEY=***",
    ]


def test_the_environment_is_not_recorded(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "do-not-tell")
    assert "do-not-tell" not in canonical_json(provenance())


def test_no_heavy_package_is_imported(python):
    code = (
        "import sys; from bitdgdm.infra import provenance, storage, commit, registry, cluster, log;"
        "provenance.provenance();"
        "print(sorted({'torch', 'ray', 'mlflow', 'rdkit', 's3fs', 'botocore', 'pandas'} & set(sys.modules)))"
    )
    assert python(code).communicate(timeout=60)[0] == "[]\n"
