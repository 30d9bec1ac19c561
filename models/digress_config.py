"""What a DiGress network is: its dims, its diffusion, and the data set it was trained on.

Guarantees: a config that exists is consistent (dims fit the features, probabilities sum to 1); `to_dict` and
`from_dict` are inverse and hold JSON values only, so the same config has the same fingerprint everywhere.
Knows nothing of: tensors, checkpoints' formats, where a model is stored.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from bitdgdm.infra.errors import ModelMismatch

BONDS = ("none", "single", "double", "triple", "aromatic")

GRAPH_FEATURES_X = 6  # cycles through the node (3, 4, 5), not in the largest component, 2 eigenvectors
GRAPH_FEATURES_Y = 11  # n / n_pad, cycles (3..6), components, 5 eigenvalues
MOLECULE_FEATURES_X = 2  # charge, valency
MOLECULE_FEATURES_Y = 1  # weight


@dataclass(frozen=True)
class Dims:
    """Channels a node (X), an edge (E) and a graph (y)."""

    X: int
    E: int
    y: int


@dataclass(frozen=True)
class HiddenDims:
    """Widths inside the layers. dim_ffy is 2048 in the published code whatever its config file says."""

    dx: int
    de: int
    dy: int
    n_head: int
    dim_ffX: int
    dim_ffE: int
    dim_ffy: int = 2048


@dataclass(frozen=True)
class DigressConfig:
    """One trained DiGress model; two models with equal configs and equal weights are the same model.

    input_dims: classes + extra features; output_dims: classes (y is 0: a model that predicts graph
    properties is no generator).
    n_pad: nodes a graph is padded to, a constant of the model: the network pools over padded rows too.
    atoms, valencies, atom_weights: one entry a node class; empty for models of plain graphs (planar, SBM).
    node_marginals[classes], edge_marginals[classes]: the limit distribution of the noise.
    n_nodes: probability of each node count 0..n_pad.
    """

    dataset: str
    n_layers: int
    diffusion_steps: int
    n_pad: int
    input_dims: Dims
    hidden_mlp_dims: Dims
    hidden_dims: HiddenDims
    output_dims: Dims
    node_marginals: tuple[float, ...]
    edge_marginals: tuple[float, ...]
    n_nodes: tuple[float, ...]
    atoms: tuple[str, ...] = ()
    valencies: tuple[int, ...] = ()
    atom_weights: tuple[float, ...] = ()
    max_weight: float = 1.0
    bonds: tuple[str, ...] = BONDS

    def __post_init__(self) -> None:
        problems = list(_problems(self))
        if problems:
            raise ModelMismatch(f"config of {self.dataset}", problems)

    @property
    def molecular(self) -> bool:
        """Whether node classes are atoms, so that charge, valency and weight are features."""
        return bool(self.atoms)

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON values (tuples become lists)."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "DigressConfig":
        """The inverse of `to_dict`. Raises: ModelMismatch for unknown, missing or inconsistent entries."""
        where = f"config of {data.get('dataset', 'a DiGress model')}"
        try:
            values = {
                **data,
                "input_dims": Dims(**data["input_dims"]),
                "hidden_mlp_dims": Dims(**data["hidden_mlp_dims"]),
                "hidden_dims": HiddenDims(**data["hidden_dims"]),
                "output_dims": Dims(**data["output_dims"]),
            }
            plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
            return cls(**plain)
        except KeyError as missing:
            raise ModelMismatch(where, [f"{missing.args[0]} is missing"]) from missing
        except (TypeError, ValueError) as wrong:
            raise ModelMismatch(where, [str(wrong)]) from wrong


def _problems(c: DigressConfig) -> Iterator[str]:
    for group in (c.input_dims, c.hidden_mlp_dims, c.hidden_dims, c.output_dims):
        for field in fields(group):
            value = getattr(group, field.name)
            if not isinstance(value, int) or value < (group is not c.output_dims or field.name != "y"):
                yield f"{field.name} of {type(group).__name__} is {value!r}"
                return
    if c.output_dims.y:
        yield f"it predicts {c.output_dims.y} graph properties, so it is a regressor and no generator"
    if c.n_layers < 1 or c.diffusion_steps < 2 or c.n_pad < 2:
        yield f"n_layers {c.n_layers}, diffusion_steps {c.diffusion_steps}, n_pad {c.n_pad} (at least 1, 2, 2)"
    if c.hidden_dims.dx % c.hidden_dims.n_head:
        yield f"dx {c.hidden_dims.dx} is not a multiple of n_head {c.hidden_dims.n_head}"
    want_x = c.output_dims.X + GRAPH_FEATURES_X + (MOLECULE_FEATURES_X if c.molecular else 0)
    want_y = GRAPH_FEATURES_Y + (MOLECULE_FEATURES_Y if c.molecular else 0) + 1
    if (c.input_dims.X, c.input_dims.E, c.input_dims.y) != (want_x, c.output_dims.E, want_y):
        yield (
            f"input dims X/E/y {c.input_dims.X}/{c.input_dims.E}/{c.input_dims.y}, the features 'all' need "
            f"{want_x}/{c.output_dims.E}/{want_y}"
        )
    for name, values, size in (
        ("node_marginals", c.node_marginals, c.output_dims.X),
        ("edge_marginals", c.edge_marginals, c.output_dims.E),
        ("n_nodes", c.n_nodes, c.n_pad + 1),
    ):
        if len(values) != size:
            yield f"{name} has {len(values)} entries, not {size}"
        elif not all(math.isfinite(v) and v >= 0 for v in values) or abs(sum(values) - 1) > 1e-6:
            yield f"{name} is not a distribution (sum {sum(values)})"
    if c.n_nodes and c.n_nodes[0] != 0:
        yield "n_nodes gives graphs without nodes a probability"
    if c.molecular:
        for name, per_atom in (
            ("atoms", c.atoms),
            ("valencies", c.valencies),
            ("atom_weights", c.atom_weights),
        ):
            if len(per_atom) != c.output_dims.X:
                yield f"{name} has {len(per_atom)} entries, not {c.output_dims.X}"
        if len(c.bonds) != c.output_dims.E:
            yield f"bonds has {len(c.bonds)} entries, not {c.output_dims.E}"
        if not c.max_weight > 0:
            yield f"max_weight is {c.max_weight}"


def _normalised(values: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(v / sum(values) for v in values)


QM9_NO_H = DigressConfig(
    dataset="qm9-no-h",
    n_layers=9,
    diffusion_steps=500,
    n_pad=9,
    input_dims=Dims(X=12, E=5, y=13),
    hidden_mlp_dims=Dims(X=256, E=128, y=128),
    hidden_dims=HiddenDims(dx=256, de=64, dy=64, n_head=8, dim_ffX=256, dim_ffE=128, dim_ffy=2048),
    output_dims=Dims(X=4, E=5, y=0),
    # four decimals, as published and as the shipped network was trained with
    node_marginals=_normalised((0.7230, 0.1151, 0.1593, 0.0026)),
    edge_marginals=_normalised((0.7261, 0.2384, 0.0274, 0.0081, 0.0)),
    # molecules of each size among the 130,831 of QM9
    n_nodes=_normalised((0, 3, 5, 9, 31, 127, 608, 3138, 17879, 109031)),
    atoms=("C", "N", "O", "F"),
    valencies=(4, 3, 2, 1),
    atom_weights=(12.0, 14.0, 16.0, 19.0),
    max_weight=150.0,
)
"""DiGress for QM9 without hydrogens, kekulized (the aromatic class has probability 0)."""
