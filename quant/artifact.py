"""The artifact: a quantized network in one file, and the network built from it.

Guarantees: equal content gives equal bytes; loading checks the format version first, then every byte against
the stored digest, then that header and tensors agree, before anything is built; what is stored is the logical
layout of LinearParts, so an artifact outlives changes of the kernels. Nothing of a file is executed.
Knows nothing of: the network's class (`model_config` is passed through), the registry, where the file is
kept.

File (container.py): metadata `format_version`, `digest` and `header` (JSON); tensors `<layer>.<part>` for
each quantized Linear (`qweight`, `scale`, `proj_up`, ... as in LinearParts, `bias`, `tau`) and kept tensors
by their own name.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitdgdm.infra.errors import ArtifactCorrupt, ArtifactTooNew, ModelMismatch, NotFinite
from bitdgdm.quant.container import read_container, read_metadata, write_container
from bitdgdm.quant.layer_report import LayerReport
from bitdgdm.quant.layout import fits
from bitdgdm.quant.linear import QuantLinear
from bitdgdm.quant.parts import LinearParts, narrow, parts_of
from bitdgdm.quant.recipe import Recipe

FORMAT_VERSION = 2
"""Version 2 added what the recipes after the first five need; a file of version 1 reads as what it was."""

Layer = tuple[LinearParts, Tensor | None, Tensor | None]
"""Parts, bias [out] or None, tau [in] or None."""


@dataclass(frozen=True)
class ArtifactHeader:
    """Everything about an artifact but its tensors.

    layers: report per quantized Linear. dropped: names of Linears that feed nothing and were left out.
    model_config: opaque to this floor. source: {"uri", "name", "version", "digest"} of the source model.
    digest: set when the file is written or read.
    """

    recipe: Recipe
    layers: Mapping[str, LayerReport]
    n_pad: int
    model_config: Mapping[str, Any]
    source: Mapping[str, Any]
    code_version: str
    dropped: tuple[str, ...] = ()
    format_version: int = FORMAT_VERSION
    digest: str = field(default="", compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, without the digest."""
        return {
            "recipe": self.recipe.to_dict(),
            "layers": {name: report.to_dict() for name, report in self.layers.items()},
            "n_pad": self.n_pad,
            "model_config": dict(self.model_config),
            "source": dict(self.source),
            "code_version": self.code_version,
            "dropped": list(self.dropped),
            "format_version": self.format_version,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], digest: str = "") -> "ArtifactHeader":
        """Raises: KeyError, TypeError or ValueError if keys or types don't fit."""
        return cls(
            recipe=Recipe.from_dict(values["recipe"]),
            layers={name: LayerReport.from_dict(report) for name, report in values["layers"].items()},
            n_pad=int(values["n_pad"]),
            model_config=dict(values["model_config"]),
            source=dict(values["source"]),
            code_version=str(values["code_version"]),
            dropped=tuple(values["dropped"]),
            format_version=int(values["format_version"]),
            digest=digest,
        )

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of all quantized Linears over their number of weights."""
        weights = sum(report.shape[0] * report.shape[1] for report in self.layers.values())
        return sum(report.stored_bits for report in self.layers.values()) / max(1, weights)


@dataclass(frozen=True)
class Artifact:
    """A loaded artifact. kept: the tensors outside the quantized Linears, by their name in the network."""

    header: ArtifactHeader
    layers: Mapping[str, Layer]
    kept: Mapping[str, Tensor]
    digest: str


def save_artifact(
    path: str | Path, header: ArtifactHeader, layers: Mapping[str, Layer], kept: Mapping[str, Tensor]
) -> str:
    """Write one file, atomically, and return its content digest (hex SHA-256).

    Biases, thresholds and kept float tensors are stored in 16 bit where their values fit (`narrow`), except
    under a recipe that keeps weights in 32 bit.
    Raises: NotFinite; ValueError if header, layers and names contradict each other.
    """
    if set(layers) != set(header.layers):
        raise ValueError(
            f"layers without a report or reports without a layer: {set(layers) ^ set(header.layers)}"
        )
    keep = (lambda t: t.to(torch.float32)) if header.recipe.weight_bits == 32 else narrow
    tensors: dict[str, Tensor] = {}
    for name, (parts, bias, tau) in layers.items():
        extra = {"bias": bias, "tau": tau}
        stored = parts.tensors() | {key: keep(t.detach().cpu()) for key, t in extra.items() if t is not None}
        tensors |= {f"{name}.{key}": tensor for key, tensor in stored.items()}
    for name, tensor in kept.items():
        if _layer_of(name, layers) is not None:
            raise ValueError(f"kept tensor {name} has the name of a part of a quantized layer")
        tensors[name] = keep(tensor.detach().cpu()) if tensor.is_floating_point() else tensor
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
            raise NotFinite(name)
    text = json.dumps(header.to_dict(), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return write_container(
        Path(path), tensors, {"format_version": str(header.format_version), "header": text}
    )


def read_header(path: str | Path) -> ArtifactHeader:
    """The header alone, without reading the tensors; bytes are checked by `load_artifact` only.

    Raises: ModelNotFound, ArtifactTooNew, ArtifactCorrupt.
    """
    return _header(path, read_metadata(Path(path)))


def load_artifact(path: str | Path) -> Artifact:
    """Read and check a whole artifact. Raises: ModelNotFound, ArtifactTooNew, ArtifactCorrupt."""
    _check_version(path, read_metadata(Path(path)))
    tensors, metadata = read_container(Path(path))
    header = _header(path, metadata)
    found: dict[str, dict[str, Tensor]] = {name: {} for name in header.layers}
    kept: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer = _layer_of(name, found)
        if layer is None:
            kept[name] = tensor
        else:
            found[layer][name.removeprefix(f"{layer}.")] = tensor
    layers = {
        name: _layer(path, name, found[name], report, header.recipe.for_layer(name))
        for name, report in header.layers.items()
    }
    return Artifact(header, layers, kept, header.digest)


def apply(module: nn.Module, artifact: Artifact) -> nn.Module:
    """Make `module` the artifact's network, in place: named Linears become QuantLinear, other tensors are
    loaded.

    Raises: ModelMismatch if names or shapes of the module and the artifact don't match each other exactly;
    tensors of `dropped` Linears may be missing and stay as they are. The module is unchanged then.
    """
    problems: list[str] = []
    for name, (parts, bias, _) in artifact.layers.items():
        linear = dict(module.named_modules()).get(name)
        if not isinstance(linear, nn.Linear):
            problems.append(f"there is no Linear {name}")
        elif tuple(linear.weight.shape) != parts.shape or (linear.bias is None) != (bias is None):
            problems.append(f"{name} is {list(linear.weight.shape)}, the artifact has {list(parts.shape)}")
    here = {name: t for name, t in module.state_dict().items() if _layer_of(name, artifact.layers) is None}
    for name in sorted(set(here) | set(artifact.kept)):
        if name not in artifact.kept:
            if _layer_of(name, artifact.header.dropped) is None:
                problems.append(f"the artifact lacks {name}")
        elif name not in here:
            problems.append(f"the network has no {name}")
        elif here[name].shape != artifact.kept[name].shape:
            problems.append(
                f"{name} is {list(here[name].shape)}, the artifact has {list(artifact.kept[name].shape)}"
            )
    if problems:
        raise ModelMismatch(f"the artifact {artifact.digest[:12]}", problems)
    with torch.no_grad():
        for name, tensor in artifact.kept.items():
            here[name].copy_(tensor)
    for name, (parts, bias, tau) in artifact.layers.items():
        parent, _, child = name.rpartition(".")
        owner = module.get_submodule(parent)
        device = next(owner.get_submodule(child).parameters()).device
        recipe = artifact.header.recipe.for_layer(name)
        setattr(owner, child, QuantLinear.from_parts(parts, bias, recipe, tau).to(device))
    return module


def _check_version(path: str | Path, metadata: Mapping[str, str]) -> None:
    try:
        version = int(metadata["format_version"])
    except (KeyError, ValueError) as error:
        raise ArtifactCorrupt(str(path), "it has no format version; is it an artifact?") from error
    if version > FORMAT_VERSION:
        raise ArtifactTooNew(str(path), version, FORMAT_VERSION)


def _header(path: str | Path, metadata: Mapping[str, str]) -> ArtifactHeader:
    _check_version(path, metadata)
    try:
        return ArtifactHeader.from_dict(json.loads(metadata["header"]), metadata["digest"])
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ArtifactCorrupt(str(path), f"its header can't be read ({error!r})") from error


def _layer_of(name: str, layers: Any) -> str | None:
    """The layer whose part a tensor name is: the name up to its last dot, if that is a layer."""
    layer = name.rpartition(".")[0]
    return layer if layer in layers else None


def _layer(
    path: str | Path, name: str, found: dict[str, Tensor], report: LayerReport, recipe: Recipe
) -> Layer:
    """Build the parts, checked against the report and the layer's recipe."""
    bias, tau = found.pop("bias", None), found.pop("tau", None)
    rows, columns = report.shape
    extra = ((bias, rows), (tau, columns))
    if not fits(found, report, recipe) or any(t is not None and tuple(t.shape) != (n,) for t, n in extra):
        raise ArtifactCorrupt(str(path), f"the parts of {name} don't fit its {rows} x {columns} report")
    return parts_of(report.shape, found, recipe), bias, tau
