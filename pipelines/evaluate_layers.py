"""Each layer of a model, and each kind of layer: errors, outliers, sensitivity, spectra.

Guarantees: a layer is judged on full precision's own inputs, a kind by the divergence that it causes alone.
Knows nothing of: samples, pages.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import nn

from bitdgdm.infra.rows import Row
from bitdgdm.models.digress import GraphTransformer, build
from bitdgdm.models.divergence import Predictions, States, divergence
from bitdgdm.models.engine import TorchEngine
from bitdgdm.models.layer_errors import kind_of, output_errors, over_time
from bitdgdm.models.outliers import layer_outliers, spectra
from bitdgdm.models.source import SourceModel
from bitdgdm.pipelines.evaluate_samples import Asked
from bitdgdm.pipelines.measure import Rows, report_rows
from bitdgdm.pipelines.progress import ProgressBar
from bitdgdm.quant.artifact import Artifact, apply


def layer_rows(
    row: Rows, source: SourceModel, artifact: Artifact, asked: Asked, device: str, quiet: bool
) -> list[Row]:
    """Return errors of weights and outputs of each layer; outliers of their inputs over time."""
    names, rows = list(artifact.layers), report_rows(row, artifact.header.layers)
    few = min(32, asked.molecules)
    for metric, variant in _variants(artifact):
        network = apply(GraphTransformer(source.config), variant).eval()
        with ProgressBar(metric, 100, "%", quiet=quiet) as bar:
            errors = output_errors(
                source,
                network,
                names,
                molecules=few,
                seed=asked.seed,
                device=device,
                progress=percent(bar),
            )
        for name, error in over_time(errors).items():
            rows.append(row(metric, 100 * error, "%", n=few, of=f"layer {name}"))
        if variant is artifact:
            for e in errors:
                rows.append(row(metric, 100 * e.relative, "%", n=e.rows, of=f"layer {e.name}, t={e.t}"))
    with ProgressBar("inputs of layers", 100, "%", quiet=quiet) as bar:
        found = layer_outliers(
            source,
            molecules=min(16, few),
            steps=20,
            seed=asked.seed,
            device=device,
            progress=lambda f: bar.update(100 * f),
        )
    for o in found:
        of = f"layer {o['layer']}, t={(o['t_low'] + o['t_high']) // 2}"
        rows += [
            row(metric, scale * o[key], unit, n=o["rows"], of=of, baseline="")
            for key, metric, scale, unit in _OUTLIERS
        ]
    return rows


def _variants(artifact: Artifact) -> list[tuple[str, Artifact]]:
    """The artifact, and where its recipe keeps outliers of the input in 16 bit, the same with them rounded like the rest."""
    found, header = [("output error", artifact)], artifact.header
    if header.recipe.outlier_sigma is not None or header.recipe.outlier_budget:
        recipe = replace(header.recipe, outlier_sigma=None, outlier_budget=0)
        layers = {name: (parts, bias, None) for name, (parts, bias, _) in artifact.layers.items()}
        found.append(
            (
                "output error without outliers",
                replace(artifact, header=replace(header, recipe=recipe), layers=layers),
            )
        )
    return found


_OUTLIERS = (
    ("max_over_sigma", "input max over sigma", 1, ""),
    ("outlier_fraction", "input beyond 3 sigma of its row", 100, "%"),
)


def curves(source: SourceModel) -> dict[str, list[float]]:
    """Return the singular values of each weight, the largest first, as shares of the largest."""
    found: dict[str, list[float]] = {}
    for r in spectra(source):
        found.setdefault(r["layer"], []).append(r["singular_value"])
    return {name: [v / max(values[0], 1e-30) for v in values] for name, values in found.items()}


def kind_rows(
    row: Rows,
    source: SourceModel,
    network: nn.Module,
    names: Sequence[str],
    states: Sequence[States],
    wanted: Predictions,
    device: str,
    quiet: bool,
) -> list[Row]:
    """Return KL when the Linears of one kind alone are quantized, on every fifth batch of states."""
    some = slice(None, None, 5)
    part = Predictions(wanted.X[some], wanted.E[some])
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(kind_of(name), []).append(name)
    rows = []
    with ProgressBar("one kind of layer at a time", len(kinds), "kinds", quiet=quiet) as bar:
        for done, (kind, of) in enumerate(kinds.items()):
            mixed = build(source.config, source.weights)
            for name in of:
                owner, _, attribute = name.rpartition(".")
                setattr(mixed.get_submodule(owner), attribute, network.get_submodule(name))
            engine = TorchEngine(mixed, source.config, device, name=f"{row.case}, {kind} only")
            d = divergence(part, engine, states[some])
            rows.append(
                row("KL, only this kind quantized", 1e4 * d.kl, "1e-4", n=len(d.t), of=f"kind {kind}")
            )
            bar.update(done + 1)
    return rows


def percent(bar: ProgressBar) -> Callable[[float], None]:
    """Return what tells a bar of 100 % the fraction that is done."""
    return lambda fraction: bar.update(100 * fraction)
