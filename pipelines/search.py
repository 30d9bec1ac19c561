"""`bitdgdm search`: measure what each group of layers loses under each recipe, then mix recipes under a budget.

Guarantees: the mixed recipe keeps the budget; what the sum of the losses predicts is reported beside what the mixed
network loses; measurements outlive a killed search and are taken over by the next one that asks for the same.
Knows nothing of: how a layer is decomposed, how KL is measured, how the choice is made.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitdgdm.infra.errors import BadInput
from bitdgdm.models.digress import build, quantizable
from bitdgdm.models.divergence import States, divergence, held_out_states, own_states, predict
from bitdgdm.models.engine import TorchEngine, resolve_device
from bitdgdm.models.sensitivity import loss, replaced, rows_a_graph
from bitdgdm.models.source import SourceModel, load_source
from bitdgdm.pipelines.model_files import is_source_file, locate
from bitdgdm.pipelines.search_losses import Measured, Workshop, measured
from bitdgdm.quant.linear import QuantLinear
from bitdgdm.quant.rates import RATES, time_of
from bitdgdm.quant.recipe import Recipe
from bitdgdm.quant.recipe_book import open_recipe
from bitdgdm.quant.search import Choice, Option, choose, mixed

FULL = Recipe("full-precision", 16, 16)
"""Every group may stay as it is."""

CANDIDATES = (
    "gptq-asym-w3a8", "gptq-asym-w4a8", "gptq-asym-w8a8", "gptq-asym-w4a4", "bitdgdm-input-w4a4-r2",
    "bitdgdm-input-w4a4-r4", "bitdgdm-input-w4a4-r8",
)  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """bits: stored bits a weight at most; or speedup: at least, over bf16 in the Linears' arithmetic on `chip`.

    by: "kind" (the same recipe in all layers of the network) or "layer". molecules, steps: the trajectories on which
    losses are measured. check: held-out molecules on which the mixed network is judged, 0 for none.
    """

    bits: float | None = None
    speedup: float | None = None
    chip: str = "h200"
    candidates: tuple[str, ...] = CANDIDATES
    by: str = "kind"
    molecules: int = 32
    steps: int = 10
    check: int = 500
    seed: int = 0


@dataclass(frozen=True)
class Searched:
    """losses: KL of each group under each candidate, alone. KL in nats; held_out_kl is None if nothing was checked."""

    recipe: Recipe
    picked: Mapping[str, str]
    losses: Mapping[str, Mapping[str, float]]
    bits_per_weight: float
    speedup: float
    predicted_kl: float
    measured_kl: float
    held_out_kl: float | None
    exact: bool
    bound: float


def search(uri: str, asked: Asked, name: str, *, device: str = "auto", quiet: bool = False) -> Searched:
    """Search for a recipe `name` of the source model at `uri`.

    Raises: BadInput for a budget that no mixture keeps, UnknownRecipe, ModelNotFound, LayerFailed.
    """
    recipes = _candidates(asked)
    _, path = locate(uri)
    if not is_source_file(path):
        raise BadInput(f"{uri} is quantized already. Search on its source model: bitdgdm models show {uri}")
    source, where = load_source(str(path)), resolve_device(device)
    groups = groups_of(quantizable(source.config), asked.by)
    options = {r.name: r for r in (*recipes, FULL)}
    # first of all: a network that can express no held-out molecule is refused before any work
    known = held_out_states(source.config, molecules=asked.check, seed=asked.seed) if asked.check else []
    full = TorchEngine(build(source.config, source.weights, source.name), source.config, where)
    states = own_states(full, source.config, asked.molecules, asked.steps, asked.seed)
    reference = predict(full, states)
    workshop = Workshop(source, where, quiet)
    found = measured(workshop, groups, recipes, reference, states, [asked.molecules, asked.steps, asked.seed])
    for group, size in _sizes(source, groups).items():
        found[group][FULL.name] = Measured(16 * size, 0.0)
    times = _times(source, asked.chip, groups, options, states)
    choice = _choice(asked, found, times, _sizes(source, groups))
    recipe = mixed(name, options, choice.picked, _summary(asked, choice))
    layers: dict[str, QuantLinear] = {}
    for option in dict.fromkeys(choice.picked.values()):
        members = [n for g, o in choice.picked.items() if o == option for n in groups[g]]
        layers |= workshop.layers(options[option], members) if option != FULL.name else {}
    held_out = None
    if known:
        held_out = divergence(full, replaced(source, layers, where), known).kl
    spent = sum(times[g][o] for g, o in choice.picked.items())
    stored = sum(found[g][o].bits for g, o in choice.picked.items())
    return Searched(
        recipe=recipe, picked=choice.picked,
        losses={g: {o: at.kl for o, at in row.items()} for g, row in found.items()},
        bits_per_weight=stored / sum(_sizes(source, groups).values()),
        speedup=sum(times[g][FULL.name] for g in groups) / spent, predicted_kl=choice.loss,
        measured_kl=loss(source, layers, reference, states, where).kl, held_out_kl=held_out, exact=choice.exact,
        bound=choice.bound,
    )  # fmt: skip


def groups_of(names: Sequence[str], by: str) -> dict[str, tuple[str, ...]]:
    """Linears by a pattern that matches them and no others: a kind in all layers, or each by its own name."""
    if by == "layer":
        return {name: (name,) for name in names}
    if by != "kind":
        raise BadInput(f"layers are grouped by kind or by layer, not by {by!r}. Give --by kind")
    found: dict[str, list[str]] = {}
    for name in names:
        stack, _, kind = name.split(".", 2)
        found.setdefault(f"{stack}.*.{kind}", []).append(name)
    return {pattern: tuple(members) for pattern, members in found.items()}


def _candidates(asked: Asked) -> list[Recipe]:
    if (asked.bits is None) == (asked.speedup is None):
        raise BadInput("a search has one budget. Give --bits 4.3 or --speedup 2")
    if asked.chip not in RATES:
        raise BadInput(f"no rates are known of {asked.chip!r}. Use one of {', '.join(RATES)}")
    recipes = [open_recipe(candidate) for candidate in dict.fromkeys(asked.candidates)]
    for r in recipes:
        if r.overrides or r.repair_steps or not r.weight_quantized:
            raise BadInput(
                f"{r.name} is no recipe of one layer (overrides, repair or full precision). Leave it out of --candidate"
            )
    if not recipes:
        raise BadInput("there is nothing to mix. Give --candidate NAME, or leave it out for the default ones")
    return recipes


def _sizes(source: SourceModel, groups: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Weights of each group."""
    return {g: sum(source.weights[f"{n}.weight"].numel() for n in members) for g, members in groups.items()}


def _choice(
    asked: Asked, found: Mapping[str, Mapping[str, Measured]], times: Mapping[str, Mapping[str, float]],
    sizes: Mapping[str, int],
) -> Choice:  # fmt: skip
    costs = times
    if asked.bits is not None:
        costs = {g: {o: float(at.bits) for o, at in row.items()} for g, row in found.items()}
        budget = asked.bits * sum(sizes.values())
    else:
        assert asked.speedup is not None
        budget = sum(row[FULL.name] for row in times.values()) / asked.speedup
    table = {g: [Option(o, costs[g][o], at.kl) for o, at in row.items()] for g, row in found.items()}
    try:
        return choose(table, budget)
    except ValueError as error:
        least = sum(min(row.values()) for row in costs.values())
        reach = f"{least / sum(sizes.values()):.2f} bits a weight"
        if asked.bits is None:
            reach = f"{sum(row[FULL.name] for row in times.values()) / least:.2f} times the speed of bf16"
        raise BadInput(
            f"no mixture keeps the budget: the candidates reach {reach} at best. Allow more, or add a cheaper --candidate"
        ) from error


def _times(
    source: SourceModel, chip: str, groups: Mapping[str, Sequence[str]], options: Mapping[str, Recipe],
    states: Sequence[States],
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Time of each group under each option on the chip."""

    def time(recipe: Recipe, name: str) -> float:
        out, width = source.weights[f"{name}.weight"].shape
        return time_of(recipe, (out, width), rows_a_graph(name, states), chip)

    return {g: {o: sum(time(r, n) for n in groups[g]) for o, r in options.items()} for g in groups}


def _summary(asked: Asked, choice: Choice) -> str:
    budget = (
        f"{asked.bits:g} stored bits a weight"
        if asked.bits is not None
        else f"{asked.speedup:g}x on {asked.chip}"
    )
    return f"recipes mixed by {asked.by} within {budget}, predicted KL {1e4 * choice.loss:.3g}e-4"


def write_recipe(recipe: Recipe, path: Path) -> None:
    """As a JSON file that `--recipe` takes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(recipe.to_dict(), indent=1) + "\n", encoding="utf-8")


def document(found: Searched) -> dict[str, Any]:
    """Everything that was found, as plain JSON values."""
    return {**{k: v for k, v in vars(found).items() if k != "recipe"}, "recipe": found.recipe.to_dict()}
