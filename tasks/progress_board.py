"""Where workers say how far their unit is: for progress bars, the watchdog, and units that kill their workers.

Guarantees: losing it loses nothing; totals come from commit records (law L3).
Knows nothing of: what a unit is made of.
"""

import ray


@ray.remote(num_cpus=0, max_restarts=-1)
class ProgressBoard:
    """Fractions of units in work. An actor: many workers write, one driver reads."""

    def __init__(self) -> None:
        self._done: dict[int, float] = {}
        self._begun: dict[int, int] = {}
        self._reports = 0

    def begin(self, unit: int) -> int:
        """Return how often work at `unit` has begun since it last ended, this time included."""
        self._reports += 1
        self._begun[unit] = self._begun.get(unit, 0) + 1
        return self._begun[unit]

    def report(self, unit: int, fraction: float) -> None:
        """Note that `unit` is `fraction` (0..1) finished; 1 forgets it, its commit record counts from now on."""
        self._reports += 1
        if fraction >= 1:
            self._done.pop(unit, None)
            self._begun.pop(unit, None)
        else:
            self._done[unit] = fraction

    def snapshot(self) -> tuple[int, dict[int, float]]:
        """Return (number of reports so far, fraction of each unit in work)."""
        return self._reports, dict(self._done)
