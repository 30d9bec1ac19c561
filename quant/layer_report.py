"""What a decomposition of one Linear cost and kept, part by part.

Guarantees: plain JSON values, the same for every run on one kind of processor (rounded to six digits: the rest
depends on how a sum was split over threads).
Knows nothing of: how parts are found.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bitdgdm.quant.linear import QuantLinear, set_time
from bitdgdm.quant.parts import LinearParts, merged, stored_bits
from bitdgdm.quant.recipe import Recipe
from bitdgdm.quant.stats import LayerStats


@dataclass(frozen=True)
class LayerReport:
    """Errors of the weight are ||W - W^||_F / ||W||_F; 0 for a weight of zeros.

    stored_bits: all parts of the weight, scales and indices included, without bias and tau; `bits_per_weight`
    is its mean. sqnr_db: of the weight, None if nothing was lost. nnz: of S. columns: channels of the column block.
    error_dense: the same rounding without L R^T, S and C; error_without_low_rank, error_without_sparse: with one part
    left out and the others found anew; None where the recipe has no such part, or it wasn't measured.
    output_error: ||X W^T - Y|| / ||X W^T|| on calibration inputs X, Y the layer's output with everything rounded;
    output_error_without_low_rank, _sparse, _outliers: with one part left out, the last one with the outliers of the
    input rounded like the rest. None without calibration inputs.
    seconds: wall time; not part of equality nor of `to_dict`.
    """

    shape: tuple[int, int]
    rank: int
    nnz: int
    relative_error: float
    sqnr_db: float | None
    stored_bits: int
    bits_per_weight: float
    error_dense: float | None = None
    error_without_low_rank: float | None = None
    error_without_sparse: float | None = None
    steps: int = 0
    columns: int = 0
    output_error: float | None = None
    output_error_without_low_rank: float | None = None
    output_error_without_sparse: float | None = None
    output_error_without_outliers: float | None = None
    seconds: float = field(default=0.0, compare=False)

    @property
    def of(self) -> str:
        """What a layer is judged by: its "output" where inputs were seen, else its "weight".

        A weight rounded for the sake of its inputs is far from the source's where no input reaches.
        """
        return "weight" if self.output_error is None else "output"

    @property
    def error(self) -> float:
        """The relative error of that."""
        return self.relative_error if self.output_error is None else self.output_error

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, the same for every run."""
        values = dataclasses.asdict(self) | {"shape": list(self.shape)}
        del values["seconds"]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "LayerReport":
        """Raises: TypeError for unknown keys, and for missing ones that every report has."""
        return cls(**values | {"shape": tuple(values["shape"])})


def report(weight: Tensor, parts: LinearParts, *, seconds: float = 0.0, **extra: Any) -> LayerReport:
    """What `parts` keep of `weight`, float[out, in]; extra: the fields that need another decomposition."""
    error = weight_error(weight, parts)
    bits = stored_bits(parts)
    factor = parts.proj_up if parts.proj_up_scale is None else parts.proj_up_scale
    return LayerReport(
        shape=parts.shape,
        rank=0 if factor is None else factor.shape[-1],
        nnz=0 if parts.sparse_index is None else parts.sparse_index.numel(),
        relative_error=error,
        sqnr_db=float(f"{-20 * math.log10(error):.4g}") if error > 0 else None,
        stored_bits=bits,
        bits_per_weight=float(f"{bits / weight.numel():.6g}"),
        columns=0 if parts.column_index is None else parts.column_index.numel(),
        seconds=seconds,
        **extra,
    )


def weight_error(weight: Tensor, parts: LinearParts) -> float:
    """||W - W^||_F / ||W||_F."""
    return _relative(weight.cpu(), merged(parts).cpu())


def output_error(weight: Tensor, parts: LinearParts, recipe: Recipe, stats: LayerStats) -> float:
    """||X W^T - Y|| / ||X W^T|| over the calibration rows X, each at its own diffusion time."""
    layer = QuantLinear.from_parts(parts, None, recipe)
    wanted = stats.sample @ weight.float().cpu().T
    if layer.bin_of_t is None:
        return _relative(wanted, layer(stats.sample))
    found = torch.empty_like(wanted)
    bins = layer.bin_of_t[stats.time]
    for one in bins.unique():
        rows = bins == one
        set_time(layer, stats.time[rows][:1])
        found[rows] = layer(stats.sample[rows])
    return _relative(wanted, found)


def _relative(true: Tensor, approximation: Tensor) -> float:
    norm = float(true.double().square().sum(dim=1).sum().sqrt())
    lost = float((true.double() - approximation.double()).square().sum(dim=1).sum().sqrt())
    return float(f"{lost / norm:.6g}") if norm > 0 else 0.0
