"""Where the registry is, and whether it can be used, before MLflow is asked.

Guarantees: MLFLOW_TRACKING_URI wins, else it is a SQLite file in $BITDGDM_HOME (default ~/.bitdgdm); what can't be
used is told within seconds (MLflow tries a broken file ten times and a dead server for minutes).
Knows nothing of: models. Doesn't import MLflow.
"""

import os
import re
from pathlib import Path

from bitdgdm.infra.errors import RegistryRefused, RegistryUnavailable

_SQLITE = "sqlite:///"
_KNOWN_FAULTS = re.compile(r"Connection refused|timed out|Name or service not known|No route to host")


def home() -> Path:
    """Return the folder for what is kept between commands."""
    return Path(os.environ.get("BITDGDM_HOME") or "~/.bitdgdm").expanduser().absolute()


def tracking_uri() -> str:
    return os.environ.get("MLFLOW_TRACKING_URI") or f"{_SQLITE}{home() / 'registry.db'}"


def location() -> str:
    """Return where the registry is, for people; passwords masked."""
    return re.sub(r"://[^/@\s]+@", "://***@", tracking_uri())


def artifacts_beside(uri: str) -> str | None:
    """Return where files of a SQLite registry go: beside it, not in the folder one happens to be in."""
    if not uri.startswith(_SQLITE):
        return None
    return (Path(uri.removeprefix(_SQLITE)).absolute().parent / "artifacts").as_uri()


def check_usable(uri: str) -> None:
    """Raises: RegistryRefused, RegistryUnavailable."""
    if uri.startswith(_SQLITE):
        _check_file(uri)
    elif uri.startswith(("http://", "https://")):
        _check_answers(uri)
    elif uri.startswith("file:") or ("://" not in uri and not uri.startswith("databricks")):
        reason = "MLflow no longer keeps models in plain folders"
        raise RegistryRefused(uri, reason, "Set MLFLOW_TRACKING_URI to sqlite:///FILE or http://HOST")


def _check_file(uri: str) -> None:
    path = Path(uri.removeprefix(_SQLITE))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            file.seek(0)
            head = file.read(16)
    except OSError as error:
        fix = "Set BITDGDM_HOME to a folder you may write to"
        raise RegistryRefused(uri, error.strerror or str(error), fix) from error
    if head and head != b"SQLite format 3\0":
        raise RegistryRefused(uri, "the file is not a SQLite database", "Move it away, or set BITDGDM_HOME")


def _check_answers(uri: str) -> None:
    import requests

    try:
        status = requests.get(f"{uri.rstrip('/')}/health", timeout=(5, 20)).status_code
    except requests.exceptions.SSLError:
        return  # MLflow has its own TLS settings
    except requests.exceptions.RequestException as error:
        known = _KNOWN_FAULTS.search(str(error))
        raise RegistryUnavailable(location(), known[0] if known else type(error).__name__) from error
    if status == 404:
        raise RegistryRefused(location(), "no MLflow server is there", "Check MLFLOW_TRACKING_URI")
