"""Layers that are decomposed already, kept on disk until their artifact is written.

Guarantees: a group is there whole or not at all, after a kill at any moment too; every byte is checked on reading,
and a file that fails is computed again; what was found under other weights, another recipe, other code or on another
kind of processor is never taken.
Knows nothing of: how layers are grouped, decomposed and assembled.
"""

import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import bitdgdm.models
import bitdgdm.quant
from bitdgdm.infra.errors import ArtifactCorrupt
from bitdgdm.infra.fingerprint import fingerprint, sha256_hex
from bitdgdm.infra.log import get_logger
from bitdgdm.infra.registry_address import home
from bitdgdm.infra.version import code_version
from bitdgdm.models.engine import hardware_name
from bitdgdm.models.source import SourceModel
from bitdgdm.quant.container import read_container, write_container
from bitdgdm.quant.layer_report import LayerReport
from bitdgdm.quant.parts import PLAIN, LinearParts
from bitdgdm.quant.recipe import Recipe

Parts = tuple[LinearParts, LayerReport]

FORGOTTEN_AFTER_S = 30 * 24 * 3600
"""What nobody came back for in this time is deleted by the next job."""

log = get_logger("finished_layers")


class FinishedLayers:
    """The finished layers of one (weights, recipe, code, processor), in a folder of their own."""

    def __init__(self, source: SourceModel, recipe: Recipe) -> None:
        root = home() / "decompositions"
        self.folder = root / fingerprint(
            {
                "weights": source.digest,
                "recipe": recipe.to_dict(),
                "version": code_version(),
                "code": _code_digest(),
                "hardware": hardware_name("cuda" if torch.cuda.is_available() else "cpu"),
                "torch": str(torch.__version__),
            }
        )
        _forget_old(root, besides=self.folder)

    def read(self) -> dict[str, Parts]:
        """All layers that are there and intact, by name."""
        found: dict[str, Parts] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                found |= _read(path)
            except ArtifactCorrupt as error:
                log.warning("%s; its layers are decomposed again", error)
                path.unlink(missing_ok=True)
        return found

    def write(self, layers: Mapping[str, Parts]) -> None:
        """Keep the layers of one group; a group that is there already is replaced.

        A disk that can't take them costs the chance to resume, not the job.
        """
        tensors: dict[str, Tensor] = {}
        about: dict[str, Any] = {}
        for name, (parts, report) in layers.items():
            tensors |= {f"{name}.{key}": tensor for key, tensor in parts.tensors().items()}
            plain = {key: getattr(parts, key) for key in PLAIN}
            about[name] = {"parts": plain, "report": report.to_dict()}
        path = self.folder / f"{fingerprint(sorted(layers))[:16]}.safetensors"
        try:
            write_container(path, tensors, {"layers": json.dumps(about)})
        except OSError as error:
            log.warning("%s; if this job is stopped, it begins anew", error)

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def _read(path: Path) -> dict[str, Parts]:
    """Raises: ArtifactCorrupt."""
    tensors, metadata = read_container(path)
    try:
        found: dict[str, Parts] = {}
        for name, about in json.loads(metadata["layers"]).items():
            own: dict[str, Any] = {
                key.removeprefix(f"{name}."): tensor
                for key, tensor in tensors.items()
                if key.rpartition(".")[0] == name
            }
            plain = about["parts"] | {"shape": tuple(about["parts"]["shape"])}
            found[name] = LinearParts(**plain, **own), LayerReport.from_dict(about["report"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactCorrupt(str(path), f"it doesn't hold layers ({error!r})") from error
    return found


def _code_digest() -> str:
    """Of the code that can change the parts: two states of an edited checkout have one version."""
    folders = (Path(module.__path__[0]) for module in (bitdgdm.models, bitdgdm.quant))
    sources = sorted(
        path for folder in folders for path in folder.iterdir() if path.suffix in (".py", ".json")
    )
    return fingerprint([sha256_hex(path.read_bytes()) for path in sources])


def _forget_old(root: Path, besides: Path) -> None:
    oldest = time.time() - FORGOTTEN_AFTER_S
    for folder in root.glob("*"):
        if folder != besides and folder.stat().st_mtime < oldest:
            shutil.rmtree(folder, ignore_errors=True)
