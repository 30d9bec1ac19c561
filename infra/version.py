"""The version of this code, as lineage names it.

Guarantees: `VERSION` is the released version; `code_version()` adds the git commit when run from a checkout.
Knows nothing of: who asks. The commit never enters shard bytes that a resume must reproduce.
"""

import functools
import subprocess
from pathlib import Path

VERSION = "0.1.0"


@functools.cache
def code_version() -> str:
    """Return "0.1.0+g<commit>[.dirty]" in a git checkout of this project, "0.1.0" elsewhere."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return VERSION
    try:
        described = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty=.dirty", "--abbrev=12", "--exclude=*"],
            capture_output=True, text=True, timeout=10, check=True,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # no git here, or a checkout without a commit yet
        return VERSION
    return f"{VERSION}+g{described}"
