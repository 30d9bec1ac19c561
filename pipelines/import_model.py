"""`bitdgdm import`: a foreign checkpoint becomes a source model, in a file and in the registry.

Guarantees: nothing in the checkpoint is executed (law L5); what is registered was read back from disk first.
Knows nothing of: checkpoint formats (models/importer.py).
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bitdgdm.infra import registry
from bitdgdm.infra.registry import ModelVersion
from bitdgdm.infra.version import code_version
from bitdgdm.models.importer import import_checkpoint
from bitdgdm.models.source import load_source, save_source
from bitdgdm.pipelines.model_files import MODEL_FILE


@dataclass(frozen=True)
class Imported:
    """A source model that was imported."""

    name: str
    digest: str
    parameters: int
    layers: int
    path: str
    version: ModelVersion | None


def import_model(
    checkpoint: Path, *, config: Path | None = None, stats: Path | None = None, name: str | None = None,
    register: str | None = None, aliases: Sequence[str] = (), out: Path | None = None,
) -> Imported:  # fmt: skip
    """Read `checkpoint` and keep it as a source model.

    Raises: UnsafeCheckpoint, ModelMismatch, ArtifactCorrupt, NotFinite, RegistryUnavailable.
    """
    model = import_checkpoint(checkpoint, config_path=config, stats_path=stats, name=name or register)
    with tempfile.TemporaryDirectory(prefix="bitdgdm-") as folder:
        path = out or Path(folder) / MODEL_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        save_source(path, model)
        kept = load_source(str(path))
        version = None
        if register:
            tags = {
                "kind": "source", "recipe": "full-precision", "artifact_sha256": kept.digest,
                "dataset": kept.config.dataset, "source_uri": checkpoint.name, "code_version": code_version(),
            }  # fmt: skip
            version = registry.register(register, {MODEL_FILE: path}, tags, aliases)
    return Imported(
        kept.name, kept.digest, sum(w.numel() for w in kept.weights.values()), kept.config.n_layers,
        str(out) if out else (version.uri if version else ""), version,
    )  # fmt: skip
