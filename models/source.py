"""Source models: a full-precision network with everything needed to sample from it, in one safetensors file.

Guarantees: the digest is a function of config and tensors alone (not of the name, the file or the machine);
a file with any byte changed or missing is refused; nothing in a file is executed (law L5); names, shapes and
finiteness are checked before a model is returned.
Knows nothing of: foreign checkpoint formats (importer.py), the registry, quantization.

File: quant/container.py; metadata `kind` "source", `format_version`, `name`, `config` (JSON of
DigressConfig).
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bitdgdm.infra.errors import ArtifactCorrupt, ArtifactTooNew, BadInput, ModelNotFound, NotFinite
from bitdgdm.infra.fingerprint import canonical_json
from bitdgdm.models.digress import check_weights
from bitdgdm.models.digress_config import DigressConfig
from bitdgdm.quant.container import read_container, read_metadata, write_container

FORMAT_VERSION = 1
BUILTIN_PREFIX = "builtin:"
_BUILTIN = {"digress-qm9": Path(__file__).parent / "data" / "digress_qm9.safetensors"}
_FILE_IN_FOLDER = "model.safetensors"


@dataclass(frozen=True)
class SourceModel:
    """A trained network. Make one with `source_model`, which checks it and computes the digest.

    weights: by the published parameter names, in the type they are kept in; the tensors that feed no output
    (digress.dead_tensors) may be among them.
    """

    config: DigressConfig
    weights: Mapping[str, Tensor]
    name: str
    digest: str


def source_model(config: DigressConfig, weights: Mapping[str, Tensor], name: str) -> SourceModel:
    """Check a network and name its content. Raises: ModelMismatch, NotFinite."""
    check_weights(weights, config, name)
    for tensor_name, tensor in weights.items():
        if not bool(torch.isfinite(tensor).all()):
            raise NotFinite(f"{tensor_name} of {name}")
    return SourceModel(config, dict(weights), name, content_digest(config, weights))


def content_digest(config: DigressConfig, weights: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) of config and tensor headers as canonical JSON, then of the tensors' bytes by name."""
    names = sorted(weights)
    headers = [[n, str(weights[n].dtype), list(weights[n].shape)] for n in names]
    sha = hashlib.sha256(canonical_json([config.to_dict(), headers]).encode())
    for name in names:
        flat = weights[name].detach().cpu().contiguous().reshape(-1)
        sha.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return sha.hexdigest()


def halved(model: SourceModel) -> SourceModel:
    """The model with its weights in float16. Raises: NotFinite if one is beyond 65,504."""
    weights = {name: tensor.to(torch.float16) for name, tensor in model.weights.items()}
    return source_model(model.config, weights, model.name)


def save_source(path: str | Path, model: SourceModel) -> None:
    """Write one file, atomically; equal models give equal bytes."""
    metadata = {
        "kind": "source",
        "format_version": str(FORMAT_VERSION),
        "name": model.name,
        "config": canonical_json(model.config.to_dict()),
    }
    write_container(Path(path), model.weights, metadata)


def builtin_path(uri: str) -> Path:
    """The file of a shipped model. Raises: ModelNotFound."""
    name = uri.removeprefix(BUILTIN_PREFIX)
    if name not in _BUILTIN:
        raise ModelNotFound(uri, f"the shipped models are {', '.join(BUILTIN_PREFIX + n for n in _BUILTIN)}")
    return _BUILTIN[name]


def is_source_file(path: str | Path) -> bool:
    """Whether the file says that it is a source model; False for anything unreadable."""
    try:
        return read_metadata(Path(path)).get("kind") == "source"
    except (ArtifactCorrupt, ModelNotFound):
        return False


def load_source(uri: str | Path) -> SourceModel:
    """Read a source model, every byte checked.

    uri: "builtin:digress-qm9", a file, or a folder that holds model.safetensors.
    Raises: ModelNotFound, ArtifactCorrupt, ArtifactTooNew, ModelMismatch, NotFinite; BadInput for a file
    that is no source model.
    """
    text = str(uri)
    path = builtin_path(text) if text.startswith(BUILTIN_PREFIX) else Path(uri)
    if path.is_dir():
        path = path / _FILE_IN_FOLDER
    metadata = read_metadata(path)
    if "recipe" in metadata.get("header", ""):
        raise BadInput(
            f"{path} is a quantized artifact. Give its source model, for example builtin:digress-qm9"
        )
    if metadata.get("kind") != "source":
        raise BadInput(
            f"{path} has weights but no model config. Make it a source model: bitdgdm import {path}"
        )
    version = metadata.get("format_version", "")
    if not version.isdecimal():
        raise ArtifactCorrupt(str(path), f"its format version is {version!r}")
    if int(version) > FORMAT_VERSION:
        raise ArtifactTooNew(str(path), int(version), FORMAT_VERSION)
    weights, metadata = read_container(path)
    try:
        config = json.loads(metadata["config"])
        name = metadata["name"]
    except (KeyError, ValueError) as error:
        raise ArtifactCorrupt(str(path), "it has no config") from error
    return source_model(DigressConfig.from_dict(config), weights, name)
