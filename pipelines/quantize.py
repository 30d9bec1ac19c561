"""`bitdgdm quantize`: a source model becomes a quantized artifact, in a file and in the registry.

Guarantees: the artifact is a function of (source weights, recipe, code) only, whatever the number of workers;
nothing is registered unless the whole artifact was written and read back.
Knows nothing of: how a layer is decomposed (quant/), how a network is built (models/).
"""

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from bitdgdm.infra import registry
from bitdgdm.infra.errors import BadInput, BitDGDMError, LayerFailed
from bitdgdm.infra.registry import ModelVersion
from bitdgdm.infra.version import code_version
from bitdgdm.models.digress import dead, live_weights, quantizable, thresholds
from bitdgdm.models.engine import load_engine
from bitdgdm.models.source import SourceModel, load_source
from bitdgdm.pipelines.model_files import MODEL_FILE, is_source_file, locate
from bitdgdm.pipelines.progress import ProgressBar
from bitdgdm.quant.artifact import ArtifactHeader, load_artifact, save_artifact
from bitdgdm.quant.layer_report import LayerReport
from bitdgdm.quant.parts import LinearParts
from bitdgdm.quant.recipe import Recipe
from bitdgdm.quant.recipe_book import get_recipe
from bitdgdm.tasks.decompose_layer import decompose_layer

Parts = tuple[LinearParts, LayerReport]


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
    worst_error: float
    seconds: float
    version: ModelVersion | None = None


def quantize(
    uri: str, recipe_name: str, *, out: Path | None = None, register: str | None = None, aliases: Sequence[str] = (),
    executor: str = "ray", workers: int | None = None, quiet: bool = False,
) -> Quantized:  # fmt: skip
    """Quantize the source model at `uri`; write it to `out` and register it when a name is given.

    Raises: UnknownRecipe, ModelNotFound, NotFinite, LayerFailed, RegistryUnavailable.
    """
    started = time.monotonic()
    recipe = get_recipe(recipe_name)  # refused before anything is read
    if aliases and not register:
        raise BadInput("an alias needs a registered name. Add --register NAME")
    resolved, source = _open_source(uri)
    names = quantizable(source.config)
    parts = _decompose_all(source, names, recipe, executor, workers, quiet)
    with tempfile.TemporaryDirectory(prefix="bitdgdm-") as folder:
        path = out or Path(folder) / MODEL_FILE
        made = _assemble(resolved, source, recipe, parts, path)
        version = _register(register, path, made, aliases) if register else None
    kept_at = str(out) if out else version.uri if version else ""
    return replace(made, path=kept_at, seconds=time.monotonic() - started, version=version)


def _open_source(uri: str) -> tuple[str, SourceModel]:
    resolved, path = locate(uri)
    if not is_source_file(path):
        raise BadInput(
            f"{uri} is quantized already. Quantize its source model instead: bitdgdm models show {uri}"
        )
    return resolved, load_source(str(path))


def _decompose_all(
    source: SourceModel, names: Sequence[str], recipe: Recipe, executor: str, workers: int | None, quiet: bool
) -> dict[str, Parts]:
    weights = {name: source.weights[f"{name}.weight"] for name in names}
    run = _decompose_local if executor == "local" else _decompose_on_ray
    with ProgressBar(f"{source.name} {recipe.name}", len(names), "layers", quiet=quiet) as bar:
        found: dict[str, Parts] = {}
        for name, parts in run(weights, recipe, workers):
            found[name] = parts
            bar.update(len(found))
    return {name: found[name] for name in names}  # the order of the network, not of arrival


def _decompose_local(
    weights: dict[str, Tensor], recipe: Recipe, workers: int | None
) -> Iterator[tuple[str, Parts]]:
    for name, weight in weights.items():
        yield name, decompose_layer(weight, recipe)


def _decompose_on_ray(
    weights: dict[str, Tensor], recipe: Recipe, workers: int | None
) -> Iterator[tuple[str, Parts]]:
    """Yield (name, parts) as layers finish: one task a Linear, on a quarter of a GPU each when there are GPUs."""
    import ray

    from bitdgdm.pipelines.ray_run import cluster
    from bitdgdm.tasks.decompose_layer import decompose_task

    with cluster() as c:
        claim = {"num_gpus": 0.25, "num_cpus": 0.5} if c.gpus else {"num_cpus": 1}
        most = workers or (4 * c.gpus if c.gpus else c.cpus)
        task = decompose_task.options(**claim)
        queue = iter(weights.items())
        pending: dict[ray.ObjectRef, str] = {}
        while True:
            while len(pending) < 2 * most and (item := next(queue, None)):
                pending[task.remote(item[1], recipe)] = item[0]
            if not pending:
                return
            ready, _ = ray.wait(list(pending), num_returns=1)
            for ref in ready:
                name = pending.pop(ref)
                try:
                    yield name, ray.get(ref)
                except ray.exceptions.RayTaskError as e:
                    if isinstance(e.cause, BitDGDMError):
                        raise e.cause from e
                    raise LayerFailed(name, f"{type(e.cause).__name__}: {e.cause}") from e
                except ray.exceptions.RayError as e:
                    raise LayerFailed(name, f"its worker died, also on retries ({type(e).__name__})") from e


def _assemble(
    uri: str, source: SourceModel, recipe: Recipe, parts: dict[str, Parts], path: Path
) -> Quantized:
    taus = thresholds(source.weights, source.config, recipe.outlier_sigma) if recipe.outlier_sigma else {}
    layers = {name: (p, source.weights.get(f"{name}.bias"), taus.get(name)) for name, (p, _) in parts.items()}
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
    worst = max(reports, key=lambda name: reports[name].relative_error)
    return Quantized(
        path=str(path), digest=digest, recipe=recipe.name, source=source.name, layers=len(layers),
        kept=sum(name.endswith(".weight") and tensor.dim() == 2 for name, tensor in kept.items()), dropped=len(dropped),
        bits_per_weight=header.bits_per_weight, source_bytes=sum(2 * w.numel() for w in source.weights.values()),
        artifact_bytes=path.stat().st_size, worst_layer=worst, worst_error=reports[worst].relative_error, seconds=0.0,
    )  # fmt: skip


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
        report = Path(folder) / "quant.json"
        report.write_text(
            json.dumps({**tags, "layers": {k: v.to_dict() for k, v in header.layers.items()}}, indent=1)
        )
        card = Path(folder) / "card.md"
        card.write_text(model_card(name, made, tags))
        return registry.register(
            name, {MODEL_FILE: path, "quant.json": report, "card.md": card}, tags, aliases
        )


def model_card(name: str, made: Quantized, tags: dict[str, str]) -> str:
    """Return a page about the version for people who find it in the registry."""
    facts = "\n".join(f"| {key} | {value} |" for key, value in sorted(tags.items()))
    return (
        f"# {name}: {made.source} quantized by {made.recipe}\n\n"
        f"{made.layers} Linears at {made.bits_per_weight:.2f} stored bits a weight, {made.kept} kept in 16 bit, "
        f"{made.dropped} dropped because they feed no output. {made.source_bytes / 1e6:.1f} MB (16 bit) -> "
        f"{made.artifact_bytes / 1e6:.1f} MB. Worst layer: {made.worst_layer}, {100 * made.worst_error:.1f} % error.\n\n"
        f"| fact | value |\n|---|---|\n{facts}\n\n"
        f"    bitdgdm generate --model models:/{name}/VERSION --count 1000 --out out/\n"
    )
