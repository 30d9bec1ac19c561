"""Who started what, where, from which code: captured once, at submit.

Guarantees: plain JSON values; no secrets (user:password@ in URLs and values of token-like options are
masked); never fails for a missing git, user name or package.
Knows nothing of: campaigns. Imports none of the packages whose versions it names.
"""

import getpass
import importlib.metadata
import os
import platform
import re
import socket
import subprocess
import sys
from datetime import UTC, datetime
from typing import Any

from bitdgdm.infra.version import code_version

_PACKAGES = ("torch", "ray", "pyarrow", "rdkit", "numpy", "safetensors", "mlflow-skinny", "s3fs")
_SECRET_OPTION = re.compile(
    r"(?i)^(-{0,2}[\w-]*(?:token|secret|passw|credential|api.?key|access.?key)[\w-]*)(=.*)?$"
)


def provenance() -> dict[str, Any]:
    """Return user, host, argv, time (UTC, ISO), git state of the working folder, code, package versions."""
    return {
        "user": _user(),
        "host": socket.gethostname(),
        "argv": _masked(sys.argv),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "git": _git(),
        "code_version": code_version(),
        "python": platform.python_version(),
        "packages": _versions(),
    }


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run under a number that has no name
        return f"uid {os.getuid()}"


def _git() -> dict[str, Any] | None:
    commit = _ask_git("rev-parse", "HEAD")
    if not commit:
        return None
    remote = _ask_git("remote", "get-url", "origin")
    changed = _ask_git("status", "--porcelain", "--untracked-files=no")
    return {"remote": _mask_url(remote) if remote else None, "commit": commit, "dirty": bool(changed)}


def _ask_git(*command: str) -> str | None:
    try:
        answer = subprocess.run(["git", *command], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _masked(argv: list[str]) -> list[str]:
    shown, hide_next = [], False
    for argument in argv:
        secret = _SECRET_OPTION.match(argument)
        if hide_next:
            shown.append("***")
        elif secret and secret.group(2):
            shown.append(f"{secret.group(1)}=***")
        else:
            shown.append(_mask_url(argument))
        hide_next = bool(secret and not secret.group(2) and argument.startswith("-"))
    return shown


def _mask_url(text: str) -> str:
    return re.sub(r"://[^/@\s]+@", "://***@", text)
