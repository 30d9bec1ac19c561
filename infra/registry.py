"""Named, versioned, aliased files: the MLflow model registry.

Guarantees: versions are numbers, aliases are true, timestamps ISO in UTC; silent on stdout and stderr; a dead
server is RegistryUnavailable within seconds; a download is whole files or none.
Knows nothing of: what the files are. MLflow is imported here only, and only when used.
"""

import contextlib
import functools
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

from bitdgdm.infra.errors import BitDGDMError, ModelNotFound, RegistryRefused, RegistryUnavailable
from bitdgdm.infra.registry_address import artifacts_beside, check_usable, location, tracking_uri

__all__ = ["ModelVersion", "download", "list_models", "location", "register", "resolve", "set_alias"]

_EXPERIMENT, _FOLDER = "bitdgdm", "model"
_MARK = ("created_by", "bitdgdm")  # a shared server holds other people's models too
_URI = re.compile(r"(?:models:/)?(?P<name>[^/@:]+)(?:/(?P<version>\d+|latest)|@(?P<alias>[\w-]+))?/?")
_ALIAS = re.compile(r"(?!latest$|v\d+$)[\w-]+")
_QUIET = {
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # MLflow's seven take four minutes
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
}


@dataclass(frozen=True)
class ModelVersion:
    """One immutable version of a model. created: ISO 8601, UTC. source_uri: where its files lie."""

    name: str
    version: int
    aliases: tuple[str, ...] = ()
    tags: dict[str, str] = field(default_factory=dict)
    created: str = ""
    source_uri: str = ""

    @property
    def uri(self) -> str:
        return f"models:/{self.name}/{self.version}"


def register(
    name: str, files: Mapping[str, Path], tags: Mapping[str, str], aliases: Sequence[str] = ()
) -> ModelVersion:
    """Store `files` ({name in the version: path}) as the next version of `name`, then move `aliases` to it.

    Raises: RegistryUnavailable, RegistryRefused, FileNotFoundError.
    """
    _check_given(files, aliases)
    client = _client()
    with _typed():
        _ensure_model(client, name)
        run = client.create_run(_experiment(client), run_name=name)
        source = f"{run.info.artifact_uri.rstrip('/')}/{_FOLDER}"
        status = "FAILED"
        try:
            with _gathered(files) as folder:
                client.log_artifacts(run.info.run_id, str(folder), _FOLDER)
            made = client.create_model_version(
                name, source, run.info.run_id, tags={key: str(value) for key, value in tags.items()}
            )
            status = "FINISHED"
        finally:
            client.set_terminated(run.info.run_id, status)
        for alias in aliases:
            client.set_registered_model_alias(name, alias, str(made.version))
    return resolve(f"models:/{name}/{made.version}")


def resolve(uri: str) -> ModelVersion:
    """Return the version at models:/name/3, models:/name@alias or models:/name (the newest); "models:/" may lack.

    Raises: ModelNotFound, RegistryUnavailable, RegistryRefused.
    """
    parts = _URI.fullmatch(uri)
    if parts is None:
        raise ModelNotFound(uri, "this is not like models:/name/3 or models:/name@champion")
    name, version, alias = parts["name"], parts["version"], parts["alias"]
    client = _client()
    with _typed(uri):
        model = client.get_registered_model(name)
        if alias and alias not in model.aliases:
            raise ModelNotFound(uri, f"no version of it is called {alias}")
        if alias:
            found = client.get_model_version_by_alias(name, alias)
        elif version and version != "latest":
            found = client.get_model_version(name, version)
        else:
            versions = _versions(client, name)
            if not versions:
                raise ModelNotFound(uri, "it has no version")
            found = versions[0]
    return _value(found, model.aliases)


def download(version: ModelVersion, into: Path) -> Path:
    """Fetch the files of `version` into the folder `into` and return it; each file appears whole.

    Raises: ModelNotFound if the files are gone, RegistryUnavailable, RegistryRefused.
    """
    import_quietly()
    from mlflow.artifacts import download_artifacts

    into = Path(into)
    into.mkdir(parents=True, exist_ok=True)
    client = _client()
    with _typed(version.uri), tempfile.TemporaryDirectory(prefix=".partial-", dir=into) as folder:
        source = client.get_model_version_download_uri(version.name, str(version.version))
        fetched = Path(download_artifacts(artifact_uri=source, dst_path=folder, tracking_uri=tracking_uri()))
        paths = [path for path in fetched.rglob("*") if path.is_file()]
        if not paths:
            raise ModelNotFound(version.uri, f"its files are gone from {source}")
        for path in paths:
            target = into / path.relative_to(fetched)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
    return into


def list_models() -> list[ModelVersion]:
    """Return every version of every model registered by this project: by name, newest first."""
    client = _client()
    found: list[ModelVersion] = []
    with _typed():
        condition = f"tags.{_MARK[0]} = '{_MARK[1]}'"
        names = sorted(model.name for model in _pages(client.search_registered_models, condition))
        for name in names:
            aliases = client.get_registered_model(name).aliases
            found.extend(_value(version, aliases) for version in _versions(client, name))
    return found


def set_alias(name: str, version: int, alias: str) -> None:
    """Point `alias` of `name` to `version`, away from wherever it pointed. Raises: ModelNotFound."""
    client = _client()
    with _typed(f"models:/{name}/{version}"):
        client.get_model_version(name, str(version))  # SQL stores would accept one that isn't there
        client.set_registered_model_alias(name, alias, str(version))


def import_quietly() -> Any:
    """Import MLflow with its chatter, progress bars and telemetry off, and its retries bounded; the user's win."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    import mlflow

    return mlflow


def _client() -> Any:
    return _connected(tracking_uri())


@functools.lru_cache(maxsize=4)
def _connected(uri: str) -> Any:
    check_usable(uri)
    mlflow = import_quietly()
    with _typed():
        return mlflow.MlflowClient(
            tracking_uri=uri, registry_uri=os.environ.get("MLFLOW_REGISTRY_URI") or uri
        )


def _check_given(files: Mapping[str, Path], aliases: Sequence[str]) -> None:
    """A version can't be taken back, so what can be wrong is found before there is one."""
    for name, path in files.items():
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ValueError(f"file name {name!r} leaves the version")
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path} is not a file")
    for alias in aliases:
        if not _ALIAS.fullmatch(alias):
            raise RegistryRefused(
                location(), f"{alias!r} can't be an alias", "Use letters, digits, - and _, not v<number>"
            )


def _ensure_model(client: Any, name: str) -> None:
    key, value = _MARK
    with _existing_is_fine():
        client.create_registered_model(name, tags={key: value})
        return
    client.set_registered_model_tag(name, key, value)


def _experiment(client: Any) -> str:
    found = client.get_experiment_by_name(_EXPERIMENT)
    if found is None:
        with _existing_is_fine():
            return client.create_experiment(_EXPERIMENT, artifacts_beside(tracking_uri()))
        found = client.get_experiment_by_name(_EXPERIMENT)
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return found.experiment_id


def _versions(client: Any, name: str) -> list[Any]:
    found = _pages(client.search_model_versions, f"name = '{name}'")
    return sorted(found, key=lambda version: int(version.version), reverse=True)


def _pages(search: Any, condition: str) -> list[Any]:
    found, token = [], None
    while True:
        page = search(condition, page_token=token)
        found.extend(page)
        token = page.token
        if not token:
            return found


def _value(found: Any, aliases: Mapping[str, Any]) -> ModelVersion:
    """aliases: of the model, {alias: version}; what a version says of its own is empty on SQL stores."""
    version = int(found.version)  # int on SQLite, text over HTTP
    return ModelVersion(
        name=found.name,
        version=version,
        aliases=tuple(sorted(alias for alias, target in aliases.items() if int(target) == version)),
        tags=dict(sorted(found.tags.items())),
        created=datetime.fromtimestamp(found.creation_timestamp / 1000, UTC).isoformat(timespec="seconds"),
        source_uri=found.source or "",
    )


@contextlib.contextmanager
def _gathered(files: Mapping[str, Path]) -> Iterator[Path]:
    """One folder that holds `files` under their names, without copying them."""
    with tempfile.TemporaryDirectory() as folder:
        for name, path in files.items():
            target = Path(folder, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(Path(path).resolve())
        yield Path(folder)


@contextlib.contextmanager
def _existing_is_fine() -> Iterator[None]:
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


@contextlib.contextmanager
def _typed(uri: str = "") -> Iterator[None]:
    """Turn MLflow's one exception with many codes into the project's errors; `uri` is the model asked for."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except BitDGDMError:
        raise
    except MlflowException as error:
        raise _translated(uri, error) from error
    except SQLAlchemyError as error:
        raise RegistryUnavailable(location(), _one_line(error)) from error


def _translated(uri: str, error: Any) -> BitDGDMError:
    code, reason, where = error.error_code, _one_line(error), location()
    if code == "RESOURCE_DOES_NOT_EXIST" and uri:
        return ModelNotFound(uri, f"{where} doesn't have it")
    if code in ("PERMISSION_DENIED", "UNAUTHENTICATED"):
        return RegistryRefused(
            where, reason, "Check MLFLOW_TRACKING_USERNAME and _PASSWORD, or MLFLOW_TRACKING_TOKEN"
        )
    if code == "INVALID_PARAMETER_VALUE":
        return RegistryRefused(where, reason, "Correct the name and repeat")
    if "database schema" in reason:
        return RegistryRefused(where, reason, f"Make a backup, then: mlflow db upgrade {where}")
    return RegistryUnavailable(where, reason)


def _one_line(error: object) -> str:
    return " ".join(str(error).split())[:300].rstrip(".")
