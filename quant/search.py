"""Mixed precision: which recipe each group of layers takes, so that the losses sum to least under a budget.

Guarantees: the choice is within the budget and optimal for the given costs and losses (`exact`), or its distance from
the optimum is bounded (`bound`); ties are decided by the order of the options. Whether losses do add up is for the
caller to measure.
Knows nothing of: what a cost is (bits, clocks), how a loss was measured, networks.

Method: a multiple-choice knapsack. The Lagrangian L(m) = sum_g min_o (loss + m cost) - m budget bounds the optimum from
below; its solutions, filled up greedily, give a first choice; then groups are joined one by one, keeping the pairs
(cost, loss) that no other pair beats and that the bound still lets win.
Source: Dyer, Kayal, Walker, "A branch and bound algorithm for solving the multiple-choice knapsack problem", 1984.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitdgdm.quant.recipe import Recipe

MOST_STATES = 2**20
"""Partial choices that are kept at a time; more, and the answer may be a little worse than the best."""

_ABOUT = ("name", "summary", "source", "cost", "version", "overrides", "calibration")
"""Fields of a recipe that don't say what a layer is."""


@dataclass(frozen=True)
class Option:
    """One way to treat a group."""

    name: str
    cost: float
    loss: float


@dataclass(frozen=True)
class Choice:
    """picked: an option's name for each group. loss: their sum; bound: no choice within the budget has less."""

    picked: Mapping[str, str]
    cost: float
    loss: float
    bound: float
    exact: bool


def choose(groups: Mapping[str, Sequence[Option]], budget: float) -> Choice:
    """The options with the least summed loss whose summed cost is at most `budget`.

    Raises: ValueError if there are no groups or options, a number isn't finite, or not even the cheapest options fit.
    """
    fronts = [_front(name, options) for name, options in groups.items()]
    if not fronts:
        raise ValueError("there is nothing to choose for")
    least = sum(float(costs[0]) for costs, _, _ in fronts)
    if least > budget:
        raise ValueError(f"the cheapest options cost {least:g}, the budget is {budget:g}")
    multiplier, first = _lagrangian(fronts, budget)
    picked, exact = _join(fronts, budget, multiplier, first)
    names = {
        group: options[place].name
        for (group, options), (_, _, order), i in zip(groups.items(), fronts, picked, strict=True)
        for place in (order[i],)
    }
    cost, loss = _sums(fronts, picked)
    lower = _dual(fronts, budget, multiplier)
    return Choice(names, cost, loss, loss if exact else min(loss, lower), exact)


def mixed(name: str, options: Mapping[str, Recipe], picked: Mapping[str, str], summary: str = "") -> Recipe:
    """One recipe that treats each group as the option picked for it.

    options: recipes without overrides, by name. picked: an option for each pattern of layer names. The option picked
    most often is the recipe itself, the others are overrides of it.
    """
    uses = [picked[pattern] for pattern in picked]
    main = max(dict.fromkeys(uses), key=lambda option: (options[option].weight_quantized, uses.count(option)))
    base = options[main]
    overrides = tuple((pattern, _changes(base, options[p])) for pattern, p in picked.items() if p != main)
    needs = [options[p].calibration for p in uses if options[p].needs_calibration]
    values: dict[str, Any] = {f.name: getattr(base, f.name) for f in fields(Recipe)}
    values |= {
        "name": name, "summary": summary or f"mixed precision over {len(set(uses))} recipes", "source": "bitdgdm search",
        "cost": "that of the recipes it mixes", "overrides": overrides, "calibration": needs[0] if needs else "none",
    }  # fmt: skip
    return Recipe(**values)


def _changes(base: Recipe, other: Recipe) -> tuple[tuple[str, Any], ...]:
    pairs = ((f.name, getattr(other, f.name)) for f in fields(Recipe) if f.name not in _ABOUT)
    return tuple((key, value) for key, value in pairs if value != getattr(base, key))


Front = tuple[NDArray[np.float64], NDArray[np.float64], list[int]]
"""Costs, rising, and losses, falling, of the options that none beats, and their places among all."""


def _front(group: str, options: Sequence[Option]) -> Front:
    if not options or not all(np.isfinite([o.cost, o.loss]).all() for o in options):
        raise ValueError(f"{group} has no options, or one whose cost or loss is not a number")
    order: list[int] = []
    for i in sorted(range(len(options)), key=lambda i: (options[i].cost, options[i].loss, i)):
        if not order or options[i].loss < options[order[-1]].loss:
            order.append(i)
    return np.array([options[i].cost for i in order]), np.array([options[i].loss for i in order]), order


def _sums(fronts: Sequence[Front], picked: Sequence[int]) -> tuple[float, float]:
    pairs = [
        (float(costs[i]), float(losses[i])) for (costs, losses, _), i in zip(fronts, picked, strict=True)
    ]
    return sum(c for c, _ in pairs), sum(loss for _, loss in pairs)


def _dual(fronts: Sequence[Front], budget: float, multiplier: float) -> float:
    return (
        float(sum((losses + multiplier * costs).min() for costs, losses, _ in fronts)) - multiplier * budget
    )


def _cheapest(fronts: Sequence[Front], multiplier: float) -> list[int]:
    return [int((losses + multiplier * costs).argmin()) for costs, losses, _ in fronts]


def _lagrangian(fronts: Sequence[Front], budget: float) -> tuple[float, list[int]]:
    """The multiplier with the best lower bound, and a choice within the budget."""
    best = [0] * len(fronts)
    low, high = 0.0, 1e-30
    while _sums(fronts, _cheapest(fronts, high))[0] > budget and high < 1e30:
        high *= 16
    for _ in range(100):
        middle = (low + high) / 2
        picked = _cheapest(fronts, middle)
        if _sums(fronts, picked)[0] <= budget:
            high, best = middle, picked
        else:
            low = middle
    multiplier = max((low, high), key=lambda m: _dual(fronts, budget, m))
    return multiplier, _filled(fronts, budget, best)


def _filled(fronts: Sequence[Front], budget: float, picked: Sequence[int]) -> list[int]:
    """Spend what is left of the budget on the largest gains that fit."""
    found = list(picked)
    while True:
        room = budget - _sums(fronts, found)[0]
        gains = [
            (float(losses[i] - losses[j]), g, j)
            for g, ((costs, losses, _), i) in enumerate(zip(fronts, found, strict=True))
            for j in range(i + 1, len(costs))
            if costs[j] - costs[i] <= room
        ]
        if not gains:
            return found
        _, g, j = max(gains)
        found[g] = j


def _join(
    fronts: Sequence[Front], budget: float, multiplier: float, first: Sequence[int]
) -> tuple[list[int], bool]:
    """The best choice, as a place in each front, and whether nothing was left out for lack of room."""
    best = _sums(fronts, first)[1]
    slack = 1e-12 * (abs(best) + 1e-300)
    rest_cost = sum(float(costs[0]) for costs, _, _ in fronts)
    rest_dual = float(sum((losses + multiplier * costs).min() for costs, losses, _ in fronts))
    cost, loss, exact = np.zeros(1), np.zeros(1), True
    back: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    for costs, losses, _ in fronts:
        rest_cost -= float(costs[0])
        rest_dual -= float((losses + multiplier * costs).min())
        wide_cost, wide_loss = (cost[:, None] + costs).ravel(), (loss[:, None] + losses).ravel()
        reach = wide_loss + multiplier * (wide_cost - budget) + rest_dual
        tolerance = 1e-9 * max(1.0, abs(budget))
        alive = np.flatnonzero((wide_cost + rest_cost <= budget + tolerance) & (reach <= best + slack))
        order = alive[np.lexsort((wide_loss[alive], wide_cost[alive]))]
        lowest = np.minimum.accumulate(wide_loss[order]) if len(order) else wide_loss[order]
        keep = np.ones(len(order), dtype=bool)
        keep[1:] = wide_loss[order][1:] < lowest[:-1]
        order = order[keep]
        if len(order) > MOST_STATES:
            exact = False
            order = np.sort(order[np.argpartition(reach[order], MOST_STATES)[:MOST_STATES]])
            order = order[np.argsort(wide_cost[order], kind="stable")]
        cost, loss = wide_cost[order], wide_loss[order]
        back.append((order // len(costs), order % len(costs)))
    fits = np.flatnonzero(cost <= budget)
    if not len(fits) or loss[fits].min() >= best:
        return list(first), exact
    state, found = int(fits[loss[fits].argmin()]), []
    for parents, places in reversed(back):
        found.append(int(places[state]))
        state = int(parents[state])
    return found[::-1], exact
