"""Run: .venv/bin/python -m pytest tests/quant/test_search.py"""

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitdgdm.quant import search
from bitdgdm.quant.recipe import Recipe
from bitdgdm.quant.search import Option, choose, mixed

option = st.builds(Option, st.just(""), st.integers(0, 30), st.floats(0, 1))
table = st.lists(st.lists(option, min_size=1, max_size=4), min_size=1, max_size=6)


def named(rows):
    return {f"g{i}": [Option(f"o{j}", o.cost, o.loss) for j, o in enumerate(r)] for i, r in enumerate(rows)}


def best_of_all(groups, budget):
    """The least loss over every combination; None if none fits."""
    fitting = [
        sum(o.loss for o in combination)
        for combination in itertools.product(*groups.values())
        if sum(o.cost for o in combination) <= budget
    ]
    return min(fitting, default=None)


@settings(deadline=None, max_examples=300)
@given(table, st.integers(0, 120))
def test_no_combination_within_the_budget_is_better(rows, budget):
    groups = named(rows)
    wanted = best_of_all(groups, budget)
    if wanted is None:
        with pytest.raises(ValueError, match="cheapest"):
            choose(groups, budget)
        return
    found = choose(groups, budget)
    chosen = [next(o for o in groups[g] if o.name == name) for g, name in found.picked.items()]
    assert found.exact and list(found.picked) == list(groups)
    assert found.loss == pytest.approx(wanted, abs=1e-12)
    assert sum(o.loss for o in chosen) == pytest.approx(found.loss, abs=1e-12)
    assert sum(o.cost for o in chosen) == found.cost <= budget


@settings(deadline=None, max_examples=100)
@given(table, st.integers(30, 120))
def test_with_too_little_room_the_answer_still_fits_and_its_bound_is_one(rows, budget):
    groups = named(rows)
    wanted = best_of_all(groups, budget)
    if wanted is None:
        return
    before, search.MOST_STATES = search.MOST_STATES, 1
    try:
        found = choose(groups, budget)
    finally:
        search.MOST_STATES = before
    assert found.cost <= budget
    assert found.bound <= wanted + 1e-12 and wanted <= found.loss + 1e-12


def test_two_hundred_groups_are_chosen_exactly():
    groups = {
        f"g{i}": [Option(f"{bits}", 1000 * bits + i % 7, (1 + i % 13) * 4.0**-bits) for bits in (3, 4, 6, 8)]
        for i in range(200)
    }
    found = choose(groups, 200 * 4300)
    assert found.exact and found.cost <= 200 * 4300
    assert {found.picked[f"g{i}"] for i in range(0, 200, 13)} <= {"3"}  # the least sensitive pay


def test_a_larger_budget_never_loses_more():
    groups = named([[Option("", c, 1 / (1 + c + i)) for c in range(5)] for i in range(6)])
    losses = [choose(groups, budget).loss for budget in range(25)]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize(
    "groups", [{}, {"g": []}, {"g": [Option("o", 1, float("nan"))]}, {"g": [Option("o", float("inf"), 0)]}]
)
def test_what_can_not_be_chosen_from_is_refused(groups):
    with pytest.raises(ValueError, match=r"g has no options|nothing to choose"):
        choose(groups, 10)


OPTIONS = {
    "a": Recipe("a", 4, 4, rank=4, solver="svd", low_rank_metric="input", rounding="gptq", calibration="uniform"),
    "b": Recipe("b", 8, 8, act_asymmetric=True),
    "full": Recipe("full", 16, 16),
}  # fmt: skip


def test_a_mixed_recipe_is_each_option_where_it_was_picked():
    picked = {"*.q": "a", "*.k": "b", "*.v": "a", "*.x_out": "full"}
    recipe = mixed("mixed", OPTIONS, picked)
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    about = {"name": "", "summary": "", "source": "", "cost": "", "calibration": ""}
    for pattern, option_name in picked.items():
        got = recipe.for_layer(pattern.replace("*", "layers.3"))
        assert got.to_dict() | about == OPTIONS[option_name].to_dict() | about
        assert got.needs_calibration == OPTIONS[option_name].needs_calibration


def test_a_mixed_recipe_of_one_option_has_no_overrides_and_needs_what_it_needs():
    assert mixed("m", OPTIONS, {"*.q": "b", "*.k": "b"}).overrides == ()
    assert mixed("m", OPTIONS, {"*.q": "b", "*.k": "b"}).calibration == "none"
    assert mixed("m", OPTIONS, {"*.q": "b", "*.k": "b", "*.v": "a"}).calibration == "uniform"
