"""Look up and fetch registered models.

Guarantees: what `show` prints was read from the file the version names, after its digest was checked; `pull` leaves
either whole, checked files or nothing new.
Knows nothing of: where the registry keeps its files.
"""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bitdgdm.infra import registry
from bitdgdm.infra.errors import ArtifactCorrupt
from bitdgdm.pipelines.model_files import MODEL_FILE, describe, fetch, is_source_file, locate
from bitdgdm.pipelines.parts_report import LayerParts, layer_parts
from bitdgdm.quant.artifact import load_artifact


@dataclass(frozen=True)
class Shown:
    """A version for people (`facts`) and programs (all of it)."""

    uri: str
    facts: dict[str, str]
    tags: dict[str, str]
    aliases: tuple[str, ...]
    recipe: dict[str, Any] = field(default_factory=dict)
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    parts: list[LayerParts] = field(default_factory=list)


@dataclass(frozen=True)
class Pulled:
    """Files that were fetched and checked."""

    uri: str
    path: str
    digest: str


def full_uri(model: str) -> str:
    """Return `model` as a URI: NAME, NAME@ALIAS and NAME/VERSION mean the registry, an existing path is a file."""
    if model.startswith(("models:", "builtin:")) or Path(model).exists():
        return model
    return f"models:/{model}"


def show_model(model: str, parts: bool = False) -> Shown:
    """Return what `model` is; `parts`: also what each part of each layer is worth. Raises: ModelNotFound, RegistryUnavailable, ArtifactCorrupt, ArtifactTooNew."""
    uri = full_uri(model)
    version = registry.resolve(uri) if uri.startswith("models:") else None
    resolved, path = locate(version.uri if version else uri)
    found = describe(resolved, path)
    tags, aliases = (version.tags, version.aliases) if version else ({}, ())
    facts = {
        "model": resolved, "alias": ", ".join(aliases) or "-", "kind": found.kind, "recipe": found.recipe,
        "digest": found.digest, "source model": found.source.get("uri", ""), "source digest": found.source.get("digest", ""),
        "data set": f"{found.config.dataset}, up to {found.config.n_pad} nodes, {found.config.diffusion_steps} steps",
        "size": f"{path.stat().st_size / 1e6:.1f} MB",
    }  # fmt: skip
    recipe: dict[str, Any] = {}
    layers: dict[str, dict[str, Any]] = {}
    split: list[LayerParts] = []
    if not is_source_file(path):
        artifact = load_artifact(path)
        header, split = artifact.header, layer_parts(artifact) if parts else []
        recipe, layers = (
            header.recipe.to_dict(),
            {name: report.to_dict() for name, report in header.layers.items()},
        )
        facts["bits a weight"] = f"{header.bits_per_weight:.2f}"
        facts["code version"] = header.code_version
    if version:
        facts["created"] = version.created
        facts["use it"] = f"bitdgdm generate --model {version.uri} --count 1000 --out out/"
    return Shown(
        resolved, {k: v for k, v in facts.items() if v}, tags, aliases, recipe, layers, found.config.to_dict(), split
    )


def pull_model(model: str, to: Path) -> Pulled:
    """Copy the files of `model` into folder `to`. Raises: as show_model, and ArtifactCorrupt for a wrong digest."""
    uri = full_uri(model)
    if not uri.startswith("models:"):
        resolved, path = locate(uri)
        files, expected = [path], None
    else:
        version = registry.resolve(uri)
        resolved = version.uri
        folder = fetch(version)
        files = sorted(p for p in folder.iterdir() if p.is_file())
        path, expected = folder / MODEL_FILE, version.tags.get("artifact_sha256")
    found = describe(resolved, path)
    if found.kind == "artifact":
        load_artifact(path)
    if expected and expected != found.digest:
        raise ArtifactCorrupt(
            str(path), f"its digest is {found.digest[:16]}, the registry says {expected[:16]}"
        )
    to.mkdir(parents=True, exist_ok=True)
    for file in files:
        part = to / f".{file.name}.part"
        shutil.copyfile(file, part)
        part.replace(to / file.name)
    return Pulled(resolved, str(to / path.name), found.digest)
