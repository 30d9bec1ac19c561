"""Progress on a terminal, one log line now and then elsewhere.

Guarantees: written to stderr only; the rate and the ETA count work of this run, not what an earlier run had done.
Knows nothing of: what the work is.
"""

import logging
import sys
import time
from types import TracebackType

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from bitdgdm.infra.log import terminal

log = logging.getLogger("bitdgdm.progress")
LOG_EVERY_S = 30.0


def rate_text(per_s: float, unit: str) -> str:
    """Return "12.3 molecules/s", or per minute when slower than one a second."""
    return f"{per_s:.1f} {unit}/s" if per_s >= 1 else f"{60 * per_s:.1f} {unit}/min"


class _Rate(ProgressColumn):
    def __init__(self, unit: str, start: float) -> None:
        super().__init__()
        self._unit, self._start = unit, start

    def render(self, task: Task) -> Text:
        if not task.elapsed or task.completed == self._start:
            return Text("starting")
        return Text(rate_text((task.completed - self._start) / task.elapsed, self._unit))


class ProgressBar:
    """A context manager with `update(done)`; `done` and `total` are in units of `unit`."""

    def __init__(self, title: str, total: float, unit: str, done: float = 0.0, quiet: bool = False) -> None:
        self._title, self._total, self._unit, self._start, self._done = title, total, unit, done, done
        self._begun = self._logged = time.monotonic()
        self._quiet = quiet
        self._bar: Progress | None = None
        if sys.stderr.isatty() and not quiet:
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(bar_width=30), MofNCompleteColumn(), _Rate(unit, done),
                TimeRemainingColumn(elapsed_when_finished=True), console=terminal(), speed_estimate_period=600,
            )  # fmt: skip
            self._task = self._bar.add_task(title, total=int(total), completed=int(done))

    def __enter__(self) -> "ProgressBar":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, done: float) -> None:
        """Show that `done` of the total is finished."""
        self._done = max(self._done, done)
        if self._bar:
            self._bar.update(self._task, completed=int(self._done))
        elif not self._quiet and time.monotonic() - self._logged >= LOG_EVERY_S:
            self._logged = time.monotonic()
            per_s = (self._done - self._start) / (self._logged - self._begun)
            left_s = (self._total - self._done) / per_s if per_s > 0 else float("inf")
            log.info(
                "%s: %d of %d, %s, %.0f s left",
                self._title,
                self._done,
                self._total,
                rate_text(per_s, self._unit),
                left_s,
            )
