"""Run: pytest tests/pipelines/test_plan.py"""

from hypothesis import given
from hypothesis import strategies as st

from bitdgdm.pipelines.plan import default_unit_size, plan_units, unit_count

sizes = st.integers(1, 5000)


@given(first_id=st.integers(0, 10**12), count=st.integers(1, 20_000), unit_size=st.integers(50, 5000))
def test_every_id_is_in_exactly_one_unit_and_units_are_numbered_from_zero(
    first_id: int, count: int, unit_size: int
) -> None:
    units = list(plan_units(first_id, count, unit_size))
    assert [u.unit for u in units] == list(range(unit_count(first_id, count, unit_size)))
    covered = [i for u in units for i in range(u.first_id, u.first_id + u.count)]
    assert covered == list(range(first_id, first_id + count))


@given(count=st.integers(1, 5000), more=st.integers(0, 5000), unit_size=st.integers(50, 3000))
def test_a_campaign_that_asks_for_more_ids_keeps_its_full_units(
    count: int, more: int, unit_size: int
) -> None:
    small = [u for u in plan_units(0, count, unit_size) if u.count == unit_size]
    assert small == list(plan_units(0, count + more, unit_size))[: len(small)]


@given(first_id=st.integers(0, 10**6), count=sizes, unit_size=st.integers(1, 300))
def test_inner_unit_boundaries_are_multiples_of_the_unit_size(
    first_id: int, count: int, unit_size: int
) -> None:
    starts = [u.first_id for u in plan_units(first_id, count, unit_size)]
    assert all(start % unit_size == 0 for start in starts[1:])


@given(count=st.integers(1, 10**8), micro_batch=st.sampled_from([16, 64, 1000, 1024, 65536]))
def test_the_default_unit_holds_whole_micro_batches_and_stays_small(count: int, micro_batch: int) -> None:
    size = default_unit_size(count, micro_batch)
    assert size % micro_batch == 0 and size <= 65536
    assert unit_count(0, count, size) <= 100 or size > 65536 - micro_batch
