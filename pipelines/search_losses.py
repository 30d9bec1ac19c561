"""What a group of Linears costs and loses under a recipe, with everything else in full precision.

Guarantees: measurements outlive a killed search and are taken over by the next one that asks for the same: the same
weights, recipe, states, code and kind of processor.
Knows nothing of: budgets and what is chosen (search.py).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bitdgdm.infra.fingerprint import fingerprint
from bitdgdm.infra.registry_address import home
from bitdgdm.models.calibrate import calibrate
from bitdgdm.models.digress import quantizable
from bitdgdm.models.divergence import Predictions, States
from bitdgdm.models.sensitivity import layers_of, loss
from bitdgdm.models.source import SourceModel
from bitdgdm.pipelines.finished_layers import FinishedLayers
from bitdgdm.pipelines.layer_groups import layer_groups
from bitdgdm.pipelines.progress import ProgressBar
from bitdgdm.quant.decompose import decompose_group
from bitdgdm.quant.linear import QuantLinear
from bitdgdm.quant.parts import LinearParts, stored_bits
from bitdgdm.quant.recipe import Recipe
from bitdgdm.quant.stats import LayerStats


@dataclass(frozen=True)
class Measured:
    """What a group costs and loses under one candidate: stored bits, and KL with all else in full precision."""

    bits: int
    kl: float


class Workshop:
    """Makes quantized Linears, and keeps what several of them need: statistics of the inputs."""

    def __init__(self, source: SourceModel, device: str, quiet: bool) -> None:
        self.source, self.device, self.quiet = source, device, quiet
        self._stats: dict[str, dict[str, LayerStats]] = {}
        self._made: dict[tuple[str, str], LinearParts] = {}

    def parts(self, recipe: Recipe, names: Sequence[str]) -> dict[str, LinearParts]:
        """The parts of the Linears `names` under a recipe without overrides."""
        missing = [n for n in names if (recipe.name, n) not in self._made]
        for group in layer_groups({n: self.source.weights[f"{n}.weight"] for n in missing}, recipe):
            stats = None
            if recipe.needs_calibration:
                stats = [self._seen(recipe.calibration)[n] for n in group.names]
            weights = [self.source.weights[f"{n}.weight"].to(self.device) for n in group.names]
            made = decompose_group(weights, recipe, stats, contributions=False)
            self._made |= {(recipe.name, n): p for n, (p, _) in zip(group.names, made, strict=True)}
        return {n: self._made[recipe.name, n] for n in names}

    def layers(self, recipe: Recipe, names: Sequence[str]) -> dict[str, QuantLinear]:
        return layers_of(self.source, self.parts(recipe, names), recipe)

    def _seen(self, choice: str) -> dict[str, LayerStats]:
        if choice not in self._stats:
            names = quantizable(self.source.config)
            with ProgressBar(f"{self.source.name} inputs", 100, "%", quiet=self.quiet) as bar:
                self._stats[choice] = calibrate(
                    self.source,
                    names,
                    choice=choice,
                    device=self.device,
                    progress=lambda done: bar.update(100 * done),
                )
        return self._stats[choice]


def measured(
    workshop: Workshop, groups: Mapping[str, Sequence[str]], recipes: Sequence[Recipe], reference: Predictions,
    states: Sequence[States], about_states: object,
) -> dict[str, dict[str, Measured]]:  # fmt: skip
    """Every group under every candidate. about_states: a JSON value that tells these states from others."""
    source, device = workshop.source, workshop.device
    journal = Journal(home() / "searches" / f"{source.digest[:16]}.jsonl")
    made_by = {r.name: FinishedLayers(source, r).folder.name for r in recipes}
    found: dict[str, dict[str, Measured]] = {group: {} for group in groups}
    with ProgressBar(
        f"{source.name} losses", len(groups) * len(recipes), "losses", quiet=workshop.quiet
    ) as bar:
        for done, (group, recipe) in enumerate(((g, r) for r in recipes for g in groups), start=1):
            key = fingerprint(
                {
                    "parts": made_by[recipe.name], "members": list(groups[group]),
                    "device": device, "states": about_states,
                }
            )  # fmt: skip
            if key not in journal.found:
                bits = sum(stored_bits(p) for p in workshop.parts(recipe, groups[group]).values())
                layers = workshop.layers(recipe, groups[group])
                journal.add(key, Measured(bits, loss(source, layers, reference, states, device).kl))
            found[group][recipe.name] = journal.found[key]
            bar.update(done)
    return found


class Journal:
    """Measurements by key, one JSON line each; a line that was cut off by a kill is measured again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.found: dict[str, Measured] = dict(_lines(path))

    def add(self, key: str, value: Measured) -> None:
        self.found[key] = value
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write("\n" + json.dumps([key, value.bits, value.kl]))  # the line before may be cut off


def _lines(path: Path) -> Iterator[tuple[str, Measured]]:
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            key, bits, kl = json.loads(line)
        except (ValueError, TypeError):
            continue
        if isinstance(key, str) and isinstance(bits, int) and isinstance(kl, float):
            yield key, Measured(bits, kl)
