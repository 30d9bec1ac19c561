"""From the tensors of a foreign DiGress checkpoint, its Hydra config and its data set to a DigressConfig.

Guarantees: dims come from tensor shapes; a config that contradicts them is an error, but for dim_ffy, which
the published code ignores; the data set is never guessed.
Knows nothing of: file formats, pickles.
"""

import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from bitdgdm.infra.errors import ModelMismatch
from bitdgdm.models.digress_config import BONDS, QM9_NO_H, DigressConfig, Dims, HiddenDims

STATS = ("dataset", "node_marginals", "edge_marginals", "n_nodes")
STATS_OF_MOLECULES = ("atoms", "valencies", "atom_weights", "max_weight")
_DATASETS = Path(__file__).parent / "data" / "datasets.json"
_DEFAULTS = {"type": "discrete", "diffusion_noise_schedule": "cosine", "extra_features": "all"}


def digress_config(
    weights: Mapping[str, Tensor], hydra: Mapping[str, Any], stats: Mapping[str, Any] | None, where: str
) -> DigressConfig:
    """The config of the network whose tensors these are.

    hydra: sections `model` and `dataset` as DiGress's own config files have them; may be empty.
    stats: the keys STATS (and STATS_OF_MOLECULES); None takes those of the data set that `hydra` names.
    Raises: ModelMismatch.
    """
    model = _section(hydra, "model", where)
    wrong = [
        f"{key} is {model[key]!r}, only {value!r} is supported"
        for key, value in _DEFAULTS.items()
        if model.get(key, value) != value
    ]
    sizes = _sizes(weights, where)
    hidden_mlp, hidden = _section(model, "hidden_mlp_dims", where), _section(model, "hidden_dims", where)
    given = {"n_layers": model.get("n_layers"), **{f"mlp_{k}": v for k, v in hidden_mlp.items()}, **hidden}
    wrong += [
        f"the config says {key}={given[key]}, the tensors {sizes[key]}"
        for key in sizes.keys() & given.keys()
        if key != "dim_ffy" and given[key] not in (None, sizes[key])
    ]
    if wrong:
        raise ModelMismatch(where, sorted(wrong))
    stats = _checked(stats if stats is not None else known_stats(hydra, where), where)
    marginals = {key: tuple(_share(stats[key], where)) for key in ("node_marginals", "edge_marginals")}
    if model.get("transition", "marginal") == "uniform":
        marginals = {key: (1 / len(values),) * len(values) for key, values in marginals.items()}
    elif model.get("transition", "marginal") != "marginal":
        raise ModelMismatch(where, [f"transition is {model['transition']!r}, not marginal or uniform"])
    try:
        return DigressConfig(
            dataset=str(stats["dataset"]),
            n_layers=sizes["n_layers"],
            diffusion_steps=int(model.get("diffusion_steps") or 500),
            n_pad=len(stats["n_nodes"]) - 1,
            input_dims=Dims(sizes["in_X"], sizes["in_E"], sizes["in_y"]),
            hidden_mlp_dims=Dims(sizes["mlp_X"], sizes["mlp_E"], sizes["mlp_y"]),
            # the number of heads leaves no trace in the tensors; all published models have 8
            hidden_dims=HiddenDims(
                n_head=int(given.get("n_head") or 8),
                **{key: sizes[key] for key in ("dx", "de", "dy", "dim_ffX", "dim_ffE", "dim_ffy")},
            ),
            output_dims=Dims(sizes["out_X"], sizes["out_E"], sizes["out_y"]),
            n_nodes=tuple(_share(stats["n_nodes"], where)),
            atoms=tuple(stats.get("atoms", ())),
            valencies=tuple(int(v) for v in stats.get("valencies", ())),
            atom_weights=tuple(float(v) for v in stats.get("atom_weights", ())),
            max_weight=float(stats.get("max_weight", 1.0)),
            bonds=tuple(stats.get("bonds", BONDS)),
            **marginals,
        )
    except (TypeError, ValueError) as error:
        raise ModelMismatch(
            where, [f"its config or statistics hold a value of the wrong kind ({error})"]
        ) from error


def known_stats(hydra: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The statistics of the data set that a Hydra config names. Raises: ModelMismatch if it isn't known."""
    dataset = _section(hydra, "dataset", where)
    name = str(dataset.get("name") or "").lower()
    if name == "qm9":
        name = "qm9-no-h" if dataset.get("remove_h", True) else "qm9-h"
    if name not in known_datasets():
        found = (
            f"the data set {name!r} is unknown" if name else "nothing says which data set it was trained on"
        )
        raise ModelMismatch(
            where, [f"{found} (known: {', '.join(known_datasets())}); others need --stats STATS.json"]
        )
    return known_datasets()[name]


@cache
def known_datasets() -> dict[str, dict[str, Any]]:
    """Published statistics by data set. Source: the *_dataset.py files of github.com/cvignac/DiGress."""
    qm9 = {key: getattr(QM9_NO_H, key) for key in (*STATS, *STATS_OF_MOLECULES)}
    return {QM9_NO_H.dataset: qm9, **json.loads(_DATASETS.read_text(encoding="utf-8"))}


def _section(mapping: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    section = mapping.get(key) or {}
    if not isinstance(section, Mapping):
        raise ModelMismatch(where, [f"its config has {key}={section!r} where keys and values belong"])
    return section


def _checked(stats: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    wanted = STATS + (STATS_OF_MOLECULES if "atoms" in stats else ())
    known = {*STATS, *STATS_OF_MOLECULES, "bonds"}
    problems = [f"its statistics lack {key}" for key in wanted if key not in stats]
    problems += [f"its statistics have an unknown key {key}" for key in stats if key not in known]
    if problems:
        raise ModelMismatch(where, problems)
    return stats


def _share(values: Any, where: str) -> list[float]:
    try:
        numbers = [float(v) for v in values]
        total = sum(numbers)
        return numbers if abs(total - 1) < 1e-9 else [v / total for v in numbers]  # published ones sum to 1.3
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ModelMismatch(where, [f"{values!r:.60} is no distribution"]) from error


def _sizes(weights: Mapping[str, Tensor], where: str) -> dict[str, int]:
    """Every dim that shapes a tensor. Raises: ModelMismatch if these aren't a graph transformer's tensors."""
    layers = {int(m[1]) for name in weights if (m := re.match(r"tf_layers\.(\d{1,3})\.", name))}
    places: dict[str, tuple[str, int]] = {
        "dim_ffX": ("tf_layers.0.linX1.weight", 0),
        "dim_ffE": ("tf_layers.0.linE1.weight", 0),
        "dx": ("mlp_in_X.2.weight", 0),
        "de": ("mlp_in_E.2.weight", 0),
        "dy": ("mlp_in_y.2.weight", 0),
    }
    for kind in "XEy":
        places[f"in_{kind}"] = (f"mlp_in_{kind}.0.weight", 1)
        places[f"mlp_{kind}"] = (f"mlp_in_{kind}.0.weight", 0)
    for kind in "XE":
        places[f"out_{kind}"] = (f"mlp_out_{kind}.2.weight", 0)
    missing = sorted({name for name, _ in places.values() if name not in weights or weights[name].dim() != 2})
    if missing or not layers:
        raise ModelMismatch(where, [f"missing {name}" for name in missing] or ["it has no tf_layers"])
    sizes = {key: weights[name].shape[dim] for key, (name, dim) in places.items()}
    optional = {"dim_ffy": ("tf_layers.0.lin_y1.weight", 2048), "out_y": ("mlp_out_y.2.weight", 0)}
    for key, (name, default) in optional.items():
        sizes[key] = weights[name].shape[0] if name in weights and weights[name].dim() == 2 else default
    return {**sizes, "n_layers": max(layers) + 1}
