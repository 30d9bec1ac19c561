"""One log on stderr: for people on a terminal, JSON lines for machines.

Guarantees: stdout stays free for results; `configure` can be called again; one JSON line a record, with the
campaign, unit, attempt and node that a call gave in `extra`.
Knows nothing of: what is logged, other packages' loggers.
"""

import functools
import json
import logging
import os
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

ROOT = "bitdgdm"
_CONTEXT = ("campaign", "node", "attempt", "unit")  # unit last: Ray folds lines that differ at the end only


def get_logger(name: str = ROOT) -> logging.Logger:
    """Return the logger `name` below "bitdgdm"."""
    return logging.getLogger(name if name == ROOT or name.startswith(f"{ROOT}.") else f"{ROOT}.{name}")


def configure(json: bool | None = None, level: str | None = None) -> None:
    """Send the project's log to stderr. json: None takes JSON lines unless stderr is a terminal.

    level: a name such as "DEBUG"; None takes BITDGDM_LOG_LEVEL, else INFO.
    """
    root = get_logger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
    as_json = not sys.stderr.isatty() if json is None else json
    root.addHandler(_json_handler() if as_json else _terminal_handler())
    root.setLevel((level or os.environ.get("BITDGDM_LOG_LEVEL", "INFO")).upper())
    root.propagate = False


class JsonLines(logging.Formatter):
    """One JSON document a record."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {
            "time": time,
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        line.update({name: value for name in _CONTEXT if (value := getattr(record, name, None)) is not None})
        return json.dumps(line, default=str, ensure_ascii=False)


def _json_handler() -> logging.Handler:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    return handler


@functools.cache
def terminal() -> "Console":
    """Return the console of stderr; whoever draws on it, such as a progress bar, makes room for log lines."""
    from rich.console import Console

    return Console(stderr=True)


def _terminal_handler() -> logging.Handler:
    from rich.logging import RichHandler

    return RichHandler(console=terminal(), show_path=False, log_time_format="[%X]", rich_tracebacks=True)
