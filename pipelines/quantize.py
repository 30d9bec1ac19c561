"""`bitdgdm quantize`: a source model becomes a quantized artifact, in a file and in the registry.

Guarantees: the artifact is a function of (source weights, recipe, code) only, whatever the number of workers and
however often it was stopped; nothing is registered unless the whole artifact was written and read back.
Knows nothing of: how layers are decomposed (decompose_network.py, quant/), how a network is built (models/).
"""

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bitdgdm.infra import registry
from bitdgdm.infra.errors import BadInput, RepairFailed
from bitdgdm.infra.registry import ModelVersion
from bitdgdm.infra.version import code_version
from bitdgdm.models.digress import dead, live_weights, quantizable, thresholds
from bitdgdm.models.distill import repaired
from bitdgdm.models.engine import load_engine
from bitdgdm.models.source import SourceModel, load_source
from bitdgdm.pipelines.decompose_network import decompose_network
from bitdgdm.pipelines.finished_layers import FinishedLayers, Parts
from bitdgdm.pipelines.model_files import MODEL_FILE, is_source_file, locate
from bitdgdm.pipelines.progress import ProgressBar
from bitdgdm.quant.artifact import ArtifactHeader, Layer, load_artifact, save_artifact
from bitdgdm.quant.layer_report import report
from bitdgdm.quant.recipe import Recipe
from bitdgdm.quant.recipe_book import open_recipe

_CHANGED_BY_REPAIR = (
    "rank", "relative_error", "sqnr_db", "stored_bits", "bits_per_weight", "output_error",
    "output_error_without_low_rank", "output_error_without_sparse", "output_error_without_outliers",
)  # fmt: skip


@dataclass(frozen=True)
class Quantized:
    """What `quantize` made."""

    path: str
    digest: str
    recipe: str
    source: str
    layers: int
    kept: int
    dropped: int
    bits_per_weight: float
    source_bytes: int
    artifact_bytes: int
    worst_layer: str
    worst_of: str
    worst_error: float
    seconds: float
    version: ModelVersion | None = None


def quantize(
    uri: str, recipe_name: str, *, out: Path | None = None, register: str | None = None, aliases: Sequence[str] = (),
    executor: str = "ray", workers: int | None = None, quiet: bool = False,
) -> Quantized:  # fmt: skip
    """Quantize the source model at `uri`; write it to `out` and register it when a name is given.

    Raises: UnknownRecipe, ModelNotFound, NotFinite, LayerFailed, RepairFailed, RegistryUnavailable.
    """
    started = time.monotonic()
    recipe = open_recipe(recipe_name)  # refused before anything is read
    if aliases and not register:
        raise BadInput("an alias needs a registered name. Add --register NAME")
    resolved, source = _open_source(uri)
    names = quantizable(source.config)
    finished = FinishedLayers(source, recipe)
    parts = decompose_network(
        source, names, recipe, finished, executor=executor, workers=workers, quiet=quiet
    )
    layers = _with_bias_and_tau(source, recipe, parts)
    if recipe.repair_steps:
        parts, layers = _repair(source, recipe, parts, layers, quiet)
    with tempfile.TemporaryDirectory(prefix="bitdgdm-") as folder:
        path = out or Path(folder) / MODEL_FILE
        made = _assemble(resolved, source, recipe, parts, layers, path)
        version = _register(register, path, made, aliases) if register else None
    finished.clear()
    kept_at = str(out) if out else version.uri if version else ""
    return replace(made, path=kept_at, seconds=time.monotonic() - started, version=version)


def _open_source(uri: str) -> tuple[str, SourceModel]:
    resolved, path = locate(uri)
    if not is_source_file(path):
        raise BadInput(
            f"{uri} is quantized already. Quantize its source model instead: bitdgdm models show {uri}"
        )
    return resolved, load_source(str(path))


def _assemble(
    uri: str,
    source: SourceModel,
    recipe: Recipe,
    parts: dict[str, Parts],
    layers: dict[str, Layer],
    path: Path,
) -> Quantized:
    reports = {name: report for name, (_, report) in parts.items()}
    dropped = dead(source.config)
    replaced = tuple(f"{name}." for name in layers)
    live = live_weights(source.weights, source.config)
    kept = {name: tensor for name, tensor in live.items() if not name.startswith(replaced)}
    header = ArtifactHeader(
        recipe=recipe, layers=reports, n_pad=source.config.n_pad, model_config=source.config.to_dict(),
        source={"uri": uri, "name": source.name, "digest": source.digest}, code_version=code_version(), dropped=dropped,
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = save_artifact(path, header, layers, kept)
    load_engine(path, device="cpu", digest=digest)  # what can't be read back and built is not handed on
    worst = max(reports, key=lambda name: reports[name].error)
    return Quantized(
        path=str(path), digest=digest, recipe=recipe.name, source=source.name, layers=len(layers),
        kept=sum(name.endswith(".weight") and tensor.dim() == 2 for name, tensor in kept.items()), dropped=len(dropped),
        bits_per_weight=header.bits_per_weight, source_bytes=sum(2 * w.numel() for w in source.weights.values()),
        artifact_bytes=path.stat().st_size, worst_layer=worst, worst_of=reports[worst].of,
        worst_error=reports[worst].error, seconds=0.0,
    )  # fmt: skip


def _with_bias_and_tau(source: SourceModel, recipe: Recipe, parts: dict[str, Parts]) -> dict[str, Layer]:
    """What the artifact stores of each layer; tau behind a LayerNorm, for the layer's own k."""
    sigmas = {name: recipe.for_layer(name).outlier_sigma for name in parts}
    by_sigma = {
        k: thresholds(source.weights, source.config, k) for k in set(sigmas.values()) if k is not None
    }
    taus = {name: by_sigma[k].get(name) for name, k in sigmas.items() if k is not None}
    return {name: (p, source.weights.get(f"{name}.bias"), taus.get(name)) for name, (p, _) in parts.items()}


def _repair(
    source: SourceModel, recipe: Recipe, parts: dict[str, Parts], layers: dict[str, Layer], quiet: bool
) -> tuple[dict[str, Parts], dict[str, Layer]]:
    """Parts and layers with the factors and biases of a short distillation; of the reports what that changed."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with ProgressBar(f"{source.name} repair", 100, "%", quiet=quiet) as bar:
        try:
            new = repaired(
                source, recipe, layers, device=device, progress=lambda done: bar.update(100 * done)
            )
        except ValueError as error:
            raise RepairFailed(recipe.name, str(error)) from error
    found: dict[str, Parts] = {}
    for name, (_, old) in parts.items():
        now = report(source.weights[f"{name}.weight"].float(), new[name][0])
        changed = {field: getattr(now, field) for field in _CHANGED_BY_REPAIR}
        found[name] = new[name][0], replace(old, **changed)
    return found, new


def _register(name: str, path: Path, made: Quantized, aliases: Sequence[str]) -> ModelVersion:
    artifact = load_artifact(path)
    header = artifact.header
    tags = {
        "kind": "artifact", "recipe": made.recipe, "recipe_version": str(header.recipe.version),
        "artifact_sha256": made.digest, "bits_per_weight": f"{made.bits_per_weight:.3f}",
        "source_model": str(header.source["name"]), "source_uri": str(header.source["uri"]),
        "source_sha256": str(header.source["digest"]), "code_version": header.code_version,
        "format_version": str(header.format_version), "dataset": str(header.model_config["dataset"]),
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="bitdgdm-") as folder:
        facts = Path(folder) / "quant.json"
        facts.write_text(
            json.dumps({**tags, "layers": {k: v.to_dict() for k, v in header.layers.items()}}, indent=1)
        )
        card = Path(folder) / "card.md"
        card.write_text(model_card(name, made, tags))
        return registry.register(
            name, {MODEL_FILE: path, "quant.json": facts, "card.md": card}, tags, aliases
        )


def model_card(name: str, made: Quantized, tags: dict[str, str]) -> str:
    """Return a page about the version for people who find it in the registry."""
    facts = "\n".join(f"| {key} | {value} |" for key, value in sorted(tags.items()))
    return (
        f"# {name}: {made.source} quantized by {made.recipe}\n\n"
        f"{made.layers} Linears at {made.bits_per_weight:.2f} stored bits a weight, {made.kept} kept in 16 bit, "
        f"{made.dropped} dropped because they feed no output. {made.source_bytes / 1e6:.1f} MB (16 bit) -> "
        f"{made.artifact_bytes / 1e6:.1f} MB. Worst layer: {made.worst_layer}, {100 * made.worst_error:.1f} % error "
        f"of its {made.worst_of}.\n\n"
        f"| fact | value |\n|---|---|\n{facts}\n\n"
        f"    bitdgdm generate --model models:/{name}/VERSION --count 1000 --out out/\n"
    )
