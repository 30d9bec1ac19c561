"""Run: .venv/bin/python -m pytest tests/test_packaging.py

What a user installs: pins that fit the declared ranges, a wheel that holds the floors and nothing else, and
the three ways in (wheel, bare checkout, `python bitdgdm.py`).
"""

import functools
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PINNED_BY_TORCH = ("nvidia-", "cuda-", "triton")  # a CUDA build of torch names exact versions of these
FLOORS = ("infra", "kernels", "quant", "models", "tasks", "pipelines")


def locked_lines() -> list[str]:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    return [line for line in lines if not line.startswith("#")]


def pins() -> dict[str, str]:
    """Return canonical name -> version of requirements.lock."""
    return {canonicalize_name(n): version for n, version in (line.split("==") for line in locked_lines())}


def declared() -> list[Requirement]:
    """Return what `make` installs: the dependencies, the extras dev and server, and the build's own needs."""
    project, build = PROJECT["project"], PROJECT["build-system"]
    extras = project["optional-dependencies"]
    needs = (*project["dependencies"], *extras["dev"], *extras["server"], *build["requires"])
    return [Requirement(text) for text in needs]


def run(*argv: str | Path, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, argv)],
        cwd=cwd, capture_output=True, text=True, timeout=240, env={**os.environ, **env},
    )  # fmt: skip


def test_the_lock_holds_pins_and_nothing_else() -> None:
    pin = re.compile(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*")
    assert [line for line in locked_lines() if not pin.fullmatch(line)] == []
    assert "://" not in (ROOT / "requirements.lock").read_text()
    assert len(locked_lines()) == len(pins())


def test_every_declared_range_has_a_pin_inside_it() -> None:
    pinned = pins()
    pairs = [(need, pinned.get(canonicalize_name(need.name))) for need in declared()]
    wrong = [f"{need}, pinned {pin}" for need, pin in pairs if pin is None or pin not in need.specifier]
    assert not wrong, "\n".join(wrong)


def test_everything_that_an_install_pulls_is_pinned() -> None:
    pinned, todo, seen, loose = pins(), declared(), set(), set()
    while todo:
        need = todo.pop()
        for extra in ("", *need.extras):
            if (key := (canonicalize_name(need.name), extra)) in seen:
                continue
            seen.add(key)
            if key[0] not in pinned and not key[0].startswith(PINNED_BY_TORCH):
                loose.add(str(need))
            try:
                pulled = metadata.distribution(need.name).requires or []
            except metadata.PackageNotFoundError:
                continue
            needs = map(Requirement, pulled)
            todo += [r for r in needs if r.marker is None or r.marker.evaluate({"extra": extra})]
    assert not loose, f"not in requirements.lock (rebuild it with make lock): {sorted(loose)}"


def test_fsspec_and_s3fs_are_pinned_to_one_version() -> None:
    assert pins()["fsspec"] == pins()["s3fs"]


@functools.cache
def release_files() -> tuple[str, ...]:
    """Return the files of the floors that git would commit, as posix paths from the root."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *FLOORS],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return tuple(line for line in listed.stdout.splitlines() if (ROOT / line).is_file())


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bare copy of the tree: a build in the working tree could pick up what an older build left there."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "LICENSE", "README.md", "bitdgdm.py", *release_files()):
        if (ROOT / name).exists():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    into = tmp_path_factory.mktemp("wheel")
    offline = ("--no-deps", "--no-build-isolation", "--no-index")
    done = run("-m", "pip", "wheel", *offline, "-w", into, checkout, cwd=into)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = into.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    into = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(into)
    return into


def test_the_wheel_holds_every_file_of_the_floors_and_nothing_else(wheel: Path) -> None:
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert sorted(names) == sorted(f"bitdgdm/{name}" for name in release_files())


def test_the_wheel_carries_the_version_the_code_names_and_the_licence(wheel: Path) -> None:
    named = re.search(r'^VERSION = "(.+)"$', (ROOT / "infra/version.py").read_text(), re.MULTILINE)
    assert named is not None
    with zipfile.ZipFile(wheel) as archive:
        (header,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        assert f"\nVersion: {Version(named[1])}\n" in archive.read(header).decode()
        assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())


WHERE = "import bitdgdm.infra.errors, bitdgdm.models, bitdgdm.infra.version as v; print(v.__file__)"


def test_the_floors_import_from_the_wheel(site: Path, tmp_path: Path) -> None:
    done = run("-c", WHERE, cwd=tmp_path, PYTHONPATH=str(site))
    assert done.stdout.startswith(str(site)), done.stdout + done.stderr


def test_every_module_imports_from_the_wheel(site: Path, tmp_path: Path) -> None:
    files = [name for name in release_files() if name.endswith(".py")]
    modules = ["bitdgdm." + name[:-3].removesuffix("/__init__").replace("/", ".") for name in files]
    code = "import importlib, sys; [print(importlib.import_module(name).__file__) for name in sys.argv[1:]]"
    done = run("-c", code, *modules, cwd=tmp_path, PYTHONPATH=str(site))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(site / "bitdgdm" / name) for name in files]


def test_the_floors_import_from_a_bare_checkout(checkout: Path, tmp_path: Path) -> None:
    done = run("-c", WHERE, cwd=tmp_path, PYTHONPATH=str(checkout))
    assert done.stdout.startswith(str(checkout)), done.stdout + done.stderr


def test_the_floors_import_from_the_installed_distribution(tmp_path: Path) -> None:
    try:
        metadata.distribution("bitdgdm")
    except metadata.PackageNotFoundError:
        pytest.skip("bitdgdm is not installed in this environment: make test installs it")
    done = run("-c", WHERE, cwd=tmp_path, PYTHONPATH="")
    assert done.returncode == 0 and done.stdout.startswith(str(ROOT)), done.stdout + done.stderr


@pytest.mark.skipif(not (ROOT / "pipelines/cli.py").exists(), reason="pipelines/cli.py is missing")
@pytest.mark.parametrize("way", ["console script", "python bitdgdm.py"])
def test_the_command_line_answers_from_the_wheel_and_from_a_checkout(
    way: str, site: Path, checkout: Path, tmp_path: Path
) -> None:
    if way == "console script":
        call = "import importlib.metadata as m; m.distribution('bitdgdm').entry_points['bitdgdm'].load()()"
        done = run("-c", call, "--help", cwd=tmp_path, PYTHONPATH=str(site))
    else:
        done = run(checkout / "bitdgdm.py", "--help", cwd=tmp_path, PYTHONPATH="")
    assert done.returncode == 0 and "generate" in done.stdout, done.stdout + done.stderr


@pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="README.md is missing")
def test_every_command_of_the_readme_exists() -> None:
    import typer

    from bitdgdm.pipelines.cli import app

    root = typer.main.get_command(app)
    wrong = []
    readme = (ROOT / "README.md").read_text()
    for line in re.findall(r"^\s*(?:\$ )?(?:\.venv/bin/)?bitdgdm (.+)$", readme, re.MULTILINE):
        command, words = root, line.split()
        while words and hasattr(command, "commands"):
            command = command.commands.get(words.pop(0))
        flags = {flag for p in getattr(command, "params", ()) for flag in (*p.opts, *p.secondary_opts)}
        if command is None or {word.split("=")[0] for word in words if word.startswith("--")} - flags:
            wrong.append(line)
    assert not wrong, wrong
