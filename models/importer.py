"""Foreign DiGress checkpoints become source models: Lightning .ckpt, plain state_dict .pt, raw .safetensors.

Guarantees: nothing in a checkpoint is executed (law L5). Pickles are read by torch's weights-only unpickler;
of the classes that a Lightning checkpoint mentions, those of DiGress and of the libraries it is made with
come back as inert records, any other name is refused. Every failure is one error that says what to do.
Knows nothing of: the registry, how a model is used.

This is the only module that reads pickles.
"""

import json
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import safetensors.torch
import torch
import yaml
from safetensors import SafetensorError
from torch import Tensor

from bitdgdm.infra.errors import (
    BadInput,
    CheckpointUnreadable,
    ModelMismatch,
    ModelNotFound,
    UnsafeCheckpoint,
)
from bitdgdm.models.checkpoint_config import STATS, STATS_OF_MOLECULES, digress_config
from bitdgdm.models.source import SourceModel, is_source_file, load_source, source_model

# Modules whose names occur in honest checkpoints of DiGress. Nothing of them is imported or run.
_DIGRESS = ("src", "datasets", "models", "metrics", "analysis", "diffusion", "guidance", "utils")
_LIBRARIES = (
    *("omegaconf", "hydra", "pytorch_lightning", "lightning", "lightning_fabric", "torchmetrics", "numpy"),
    *(
        "torch_geometric",
        "torch.nn",
        "torch.distributions",
        "torch.optim",
        "pathlib",
        "typing",
        "collections",
    ),
)
_BUILTIN_TYPES = {
    f"builtins.{name}" for name in ("dict", "list", "tuple", "str", "int", "float", "bool", "object")
}
_DAMAGE = (
    *(RuntimeError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError, AssertionError),
    *(struct.error, zipfile.BadZipFile, OverflowError, MemoryError, NotImplementedError),
)
_PREFIXES = ("model.", "_orig_mod.", "module.")
_DEEPEST = 50


class Inert:
    """What is left of a pickled object whose class is not ours: the state it was saved with."""

    def __new__(cls, *_: Any) -> "Inert":
        self = super().__new__(cls)
        self.state = {}
        return self

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) == 2:  # (__dict__, slots)
            state = state[0]
        self.state: Any = state


def _plain_dict(*_: Any) -> dict[Any, Any]:
    return {}


def import_checkpoint(
    path: str | Path,
    config_path: str | Path | None = None,
    name: str | None = None,
    stats_path: str | Path | None = None,
) -> SourceModel:
    """Read a DiGress checkpoint.

    config_path: the run's Hydra config.yaml (outputs/.../.hydra/config.yaml); else the one inside a .ckpt
    counts.
    stats_path: JSON with the keys of checkpoint_config.STATS for a data set that is not known by name; else
    those inside a .ckpt count, then the published ones of the data set that the config names.
    name: defaults to the file's name without its ending.
    Raises: ModelNotFound, UnsafeCheckpoint, CheckpointUnreadable, ModelMismatch, NotFinite, BadInput.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelNotFound(str(path), "there is no such file")
    if is_source_file(path):
        return load_source(path)
    content, hyper = _read(path)
    weights = _network(content, str(path))
    hydra = _yaml(Path(config_path)) if config_path else _plain(hyper.get("cfg"))
    stats = _stats_file(Path(stats_path)) if stats_path else _stats_inside(hyper, hydra)
    config = digress_config(weights, hydra if isinstance(hydra, dict) else {}, stats, str(path))
    return source_model(config, weights, name or path.stem)


def _read(path: Path) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Return (tensors by name, hyper-parameters)."""
    with path.open("rb") as file:
        start = file.read(9)
    if path.suffix == ".safetensors" or start[8:9] == b"{":
        try:
            return safetensors.torch.load_file(path), {}
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise CheckpointUnreadable(str(path), _short(error)) from error
    if start[:2] not in (b"PK", b"\x80\x02"):
        raise CheckpointUnreadable(str(path), "it is neither a zip archive nor a pickle nor safetensors")
    loaded = _load_pickle(path)
    if not isinstance(loaded, dict):
        raise CheckpointUnreadable(str(path), f"it holds a {type(loaded).__name__} and no state_dict")
    content = loaded.get("state_dict", loaded)
    hyper = loaded.get("hyper_parameters", {}) if content is not loaded else {}
    if isinstance(hyper, Inert):
        hyper = hyper.state
    if not isinstance(content, dict):
        raise CheckpointUnreadable(str(path), f"its state_dict is a {type(content).__name__}")
    return content, hyper if isinstance(hyper, dict) else {}


def _load_pickle(path: Path) -> Any:
    """Tensors, plain values and inert records. Raises: UnsafeCheckpoint, CheckpointUnreadable."""
    try:
        stand_ins = _stand_ins(path) if zipfile.is_zipfile(path) else []
        with torch.serialization.safe_globals(stand_ins):
            return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise UnsafeCheckpoint(str(path), _short(error)) from error
    except (*_DAMAGE, OSError) as error:
        raise CheckpointUnreadable(str(path), _short(error)) from error


def _stand_ins(path: Path) -> list[Callable | tuple[Callable, str]]:
    """A stand-in for each foreign name in the pickle. Raises: UnsafeCheckpoint for one that isn't known."""
    found: list[Callable | tuple[Callable, str]] = []
    for name in sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path))):
        if name == "collections.defaultdict":
            found.append((_plain_dict, name))
        elif _is_known(name):
            found.append((type("Inert", (Inert,), {}), name))
        else:
            raise UnsafeCheckpoint(str(path), f"it asks for {name}")
    return found


def _is_known(name: str) -> bool:
    top = name.split(".")[0]
    of_library = any(name.startswith(f"{module}.") for module in _LIBRARIES)
    return of_library or top in _DIGRESS or top.startswith("diffusion_model") or name in _BUILTIN_TYPES


def _network(content: Mapping[str, Any], where: str) -> dict[str, Tensor]:
    """The network's tensors by the published names; in a Lightning module they lie under "model."."""
    tensors = {name: value for name, value in content.items() if isinstance(name, str) and _is_dense(value)}
    inside = [name for name in tensors if name.startswith(_PREFIXES[0])]
    if inside:  # beside it lie buffers of metrics and the like
        tensors = {name: tensors[name] for name in inside}
    weights: dict[str, Tensor] = {}
    for name, value in tensors.items():
        bare = name
        while (cut := next((p for p in _PREFIXES if bare.startswith(p)), None)) is not None:
            bare = bare.removeprefix(cut)
        if bare in weights:
            raise ModelMismatch(where, [f"{bare} is there twice"])
        weights[bare] = value.detach().float() if value.dtype == torch.float64 else value.detach()
    return weights


def _is_dense(value: Any) -> bool:
    if not isinstance(value, Tensor) or value.device.type != "cpu":
        return False
    return value.layout == torch.strided and value.is_floating_point()


def _plain(value: Any, depth: int = 0) -> Any:
    """Plain values out of omegaconf's inert containers and nodes (their states hold _content or _val)."""
    if depth > _DEEPEST:
        return None
    if isinstance(value, Inert):
        state = value.state if isinstance(value.state, dict) else {}
        return _plain(state.get("_content", state.get("_val")), depth + 1)
    if isinstance(value, dict):
        return {key: _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, depth + 1) for item in value]
    return value


def _stats_inside(hyper: Mapping[str, Any], hydra: Any) -> dict[str, Any] | None:
    """The data set's statistics as DiGress's own dataset_infos object holds them, if a .ckpt has it whole."""
    infos = hyper.get("dataset_infos")
    state = infos.state if isinstance(infos, Inert) and isinstance(infos.state, dict) else {}
    names = {"node_marginals": "node_types", "edge_marginals": "edge_types", "n_nodes": "n_nodes"}
    if not all(isinstance(state.get(key), Tensor) and state[key].dim() == 1 for key in names.values()):
        return None
    found: dict[str, Any] = {ours: state[theirs].double().tolist() for ours, theirs in names.items()}
    dataset = hydra.get("dataset") if isinstance(hydra, dict) else None
    label = dataset.get("name") if isinstance(dataset, dict) else None
    found["dataset"] = str(label or state.get("name") or "unknown").lower()
    if found["dataset"] == "qm9":
        found["dataset"] = "qm9-no-h" if state.get("remove_h", True) else "qm9-h"
    if isinstance(state.get("atom_decoder"), list):
        weights = state.get("atom_weights")
        values = list(weights.values()) if isinstance(weights, dict) else weights
        of_atoms = (state["atom_decoder"], state.get("valencies"), values, state.get("max_weight"))
        found |= dict(zip(STATS_OF_MOLECULES, of_atoms, strict=True))
    return None if any(value is None for value in found.values()) else found


def _yaml(path: Path) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BadInput(
            f"{path} can't be read as YAML ({_short(error)}). Give the run's .hydra/config.yaml"
        ) from error
    if not isinstance(loaded, dict) or not isinstance(loaded.get("model"), dict):
        raise BadInput(
            f"{path} has no section `model`. Give the composed config: outputs/.../.hydra/config.yaml"
        )
    return loaded


def _stats_file(path: Path) -> dict[str, Any]:
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(
            f"{path} can't be read as JSON ({_short(error)}). It needs the keys {', '.join(STATS)}"
        ) from error
    if not isinstance(loaded, dict):
        raise BadInput(f"{path} holds a {type(loaded).__name__}. It needs the keys {', '.join(STATS)}")
    return loaded


def _short(error: BaseException) -> str:
    """The first sentence of an error: torch's go on for paragraphs."""
    text = " ".join(str(error).split()) or type(error).__name__
    for mark in ("Unsupported global: ", "Trying to load ", "WeightsUnpickler error: "):
        if mark in text:
            text = text[text.index(mark) + (len(mark) if mark.startswith("Weights") else 0) :]
            break
    return text.split(". ")[0].split(" was not an allowed")[0].split(" Check the doc")[0][:160]
