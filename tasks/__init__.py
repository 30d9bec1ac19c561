"""One unit of remote work per file; the only place with Ray remote functions and actor classes."""

if __name__ != "bitdgdm.tasks":
    raise ImportError(f"this folder is bitdgdm.tasks, not {__name__!r}: import it as bitdgdm.tasks")

import bitdgdm.infra.cluster  # noqa: F401  it sets what Ray reads when a task's module imports Ray
