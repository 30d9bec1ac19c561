"""From a model URI to bytes on this machine.

Guarantees: an alias is resolved exactly once, here; what comes back names the immutable version, the content digest
and the file. Both kinds are served: source models (full precision) and quantized artifacts.
Knows nothing of: campaigns. Workers never see a URI, they read the copy that a campaign keeps.
"""

import atexit
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from bitdgdm.infra import registry
from bitdgdm.infra.errors import ModelNotFound
from bitdgdm.infra.registry import ModelVersion
from bitdgdm.models.digress import DigressConfig
from bitdgdm.models.source import BUILTIN_PREFIX, builtin_path, is_source_file, load_source
from bitdgdm.quant.artifact import read_header

MODEL_FILE = "model.safetensors"


@dataclass(frozen=True)
class ModelFile:
    """A model that was found. `recipe` is "full-precision" for a source model."""

    uri: str
    path: Path
    kind: str  # "source" or "artifact"
    digest: str
    recipe: str
    name: str
    config: DigressConfig
    source: dict[str, str]

    def lineage(self) -> dict[str, object]:
        """Return what a campaign or a shard names of its model."""
        return {
            "uri": self.uri,
            "digest": self.digest,
            "kind": self.kind,
            "recipe": self.recipe,
            "source": self.source,
        }


def locate(uri: str) -> tuple[str, Path]:
    """Return (immutable uri, file) of `uri`; a registry model is downloaded to a temporary folder.

    Raises: ModelNotFound, RegistryUnavailable.
    """
    if uri.startswith(BUILTIN_PREFIX):
        return uri, builtin_path(uri)
    if uri.startswith("models:"):
        version = registry.resolve(uri)
        return version.uri, fetch(version) / MODEL_FILE
    path = Path(uri)
    if path.is_dir():
        path = path / MODEL_FILE
    if not path.is_file():
        raise ModelNotFound(uri, f"{path} is no file")
    return str(path), path


def fetch(version: ModelVersion) -> Path:
    """Return a folder with the files of `version`; it goes with this process. Raises: RegistryUnavailable."""
    folder = Path(tempfile.mkdtemp(prefix="bitdgdm-model-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return registry.download(version, folder)


def open_model(uri: str) -> ModelFile:
    """Return the model at `uri`, checked whole.

    Raises: ModelNotFound, RegistryUnavailable, ArtifactCorrupt, ArtifactTooNew.
    """
    resolved, path = locate(uri)
    return describe(resolved, path)


def describe(uri: str, path: Path) -> ModelFile:
    """Return what the file at `path` holds. Raises: ArtifactCorrupt, ArtifactTooNew."""
    if is_source_file(path):
        model = load_source(str(path))
        return ModelFile(
            uri, path, "source", model.digest, "full-precision", model.name, model.config,
            {"uri": uri, "name": model.name, "digest": model.digest},
        )  # fmt: skip
    header = read_header(path)
    return ModelFile(
        uri, path, "artifact", header.digest, header.recipe.name, str(header.source.get("name", "model")),
        DigressConfig.from_dict(header.model_config), {k: str(v) for k, v in header.source.items()},
    )  # fmt: skip
