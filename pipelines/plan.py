"""Cut a campaign into units.

Guarantees: the plan is a pure function of (first_id, count, unit_size); every id is in exactly one unit; unit
boundaries are multiples of unit_size counted from id 0, so a campaign that asks for more ids later has equal units.
Knows nothing of: workers, storage, models.
"""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Unit:
    """The ids [first_id, first_id + count): one shard, one commit record."""

    unit: int
    first_id: int
    count: int


def default_unit_size(count: int, micro_batch: int) -> int:
    """Return a multiple of `micro_batch` that gives about 100 units, at most 65,536 molecules each.

    Small units lose little when a node dies and give a live rate; large ones make fewer objects.
    """
    wanted = -(-count // 100)
    batches = max(1, min(-(-wanted // micro_batch), max(1, 65536 // micro_batch)))
    return batches * micro_batch


def plan_units(first_id: int, count: int, unit_size: int) -> Iterator[Unit]:
    """Yield the units that cover ids first_id .. first_id + count - 1, numbered from 0."""
    last, skipped = first_id + count, first_id // unit_size
    for position in range(skipped, -(-last // unit_size)):
        start = max(first_id, position * unit_size)
        yield Unit(position - skipped, start, min(last, (position + 1) * unit_size) - start)


def unit_count(first_id: int, count: int, unit_size: int) -> int:
    """Return how many units `plan_units` yields."""
    return -(-(first_id + count) // unit_size) - first_id // unit_size
