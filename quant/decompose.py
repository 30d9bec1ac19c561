"""Decompose one Linear: the unit of work of `bitdgdm quantize`.

Guarantees: the parts depend on (weight, recipe) only; a retry returns the same bytes on the same kind of
processor, with any number of threads. Each part is rounded to its stored form before the next one is fitted
to what it leaves, so a coarse factor costs a slightly larger remainder and no error of its own.
Knows nothing of: which model the weight is from, where the result is stored, activations.
"""

import dataclasses
import math
import time
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from bitdgdm.infra.errors import NotFinite
from bitdgdm.quant.packing import pack_nibbles, unpack_nibbles
from bitdgdm.quant.recipe import Recipe
from bitdgdm.quant.robust_pca import keep_largest, scaled_gd
from bitdgdm.quant.rounding import round_weights


@dataclass(frozen=True)
class LinearParts:
    """The stored form of one weight W[out, in] ~ D + L R^T + S; parts a recipe doesn't use are None.

    qweight: D. 4 bit: packed uint8[out, ceil(in/2)] (packing.py); 8 bit: int8[out, in]; 16 and 32 bit:
    float[out, in].
    scale: bfloat16[out], D = codes * scale[:, None]; None for a float qweight.
    proj_up, proj_down: L [out, R] and R [in, R], bfloat16, or int8 with bfloat16[R] scales, one per
    component.
    sparse_index: flat row-major positions of S, ascending; uint16[nnz] if out * in <= 65536, else int32[nnz].
    sparse_value: bfloat16[nnz].
    """

    shape: tuple[int, int]
    qweight: Tensor
    scale: Tensor | None = None
    proj_up: Tensor | None = None
    proj_down: Tensor | None = None
    proj_up_scale: Tensor | None = None
    proj_down_scale: Tensor | None = None
    sparse_index: Tensor | None = None
    sparse_value: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The parts that are there, by name."""
        named = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "shape"}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        """Travel between processes as safetensors bytes: torch can't read back its own pickle of uint16."""
        return _unpacked, (self.shape, safetensors.torch.save(self.tensors()))


def _unpacked(shape: tuple[int, int], data: bytes) -> LinearParts:
    return LinearParts(shape, **safetensors.torch.load(data))


@dataclass(frozen=True)
class LayerReport:
    """What a decomposition cost and what it kept. Errors are ||W - W^||_F / ||W||_F; 0 for a weight of zeros.

    stored_bits: all parts of the weight, scales and indices included, without bias and tau; `bits_per_weight`
    is its mean. sqnr_db: None if nothing was lost. error_dense: the same 4- or 8-bit rounding without L R^T
    and S;
    error_without_low_rank, error_without_sparse: with one part left out; None where the recipe has no such
    part.
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
    seconds: float = field(default=0.0, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, the same for every run."""
        values = dataclasses.asdict(self) | {"shape": list(self.shape)}
        del values["seconds"]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "LayerReport":
        """Raises: TypeError for unknown or missing keys."""
        return cls(**values | {"shape": tuple(values["shape"])})


def decompose(
    weight: Tensor, recipe: Recipe, *, contributions: bool = True
) -> tuple[LinearParts, LayerReport]:
    """Split and round one weight as `recipe` says.

    weight: float[out, in] on any device; the parts are on the CPU. contributions: also measure what each part
    buys (up to three more roundings, about a third of the time); it doesn't change the parts.
    Raises: NotFinite if the weight holds NaN or infinity; ValueError if it isn't a matrix or is empty.
    """
    begin = time.perf_counter()
    if weight.ndim != 2 or weight.numel() == 0:
        raise ValueError(f"a weight is a non-empty matrix, not {list(weight.shape)}")
    w = weight.detach().to(torch.float32).contiguous()
    if not bool(torch.isfinite(w).all()):
        raise NotFinite(f"a weight of shape {list(weight.shape)}")
    if not recipe.weight_quantized:
        parts = LinearParts(_shape(w), narrow(w).cpu() if recipe.weight_bits == 16 else w.cpu().clone())
        return parts, _report(w, parts, time.perf_counter() - begin)
    parts, steps = _split(w, recipe)
    extra: dict[str, Any] = {"steps": steps}
    if contributions and (recipe.rank or recipe.alpha):
        extra["error_dense"] = _error_with(w, recipe, rank=0, alpha=0.0)
        if recipe.rank and recipe.alpha:
            extra["error_without_low_rank"] = _error_with(w, recipe, rank=0)
            extra["error_without_sparse"] = _error_with(w, recipe, alpha=0.0)
    return parts, _report(w, parts, time.perf_counter() - begin, **extra)


def codes(parts: LinearParts) -> Tensor:
    """The integer codes of D, int8[out, in]."""
    if parts.qweight.dtype == torch.uint8:
        return unpack_nibbles(parts.qweight, parts.shape[1])
    if parts.qweight.dtype == torch.int8:
        return parts.qweight
    raise ValueError("a full-precision weight has no integer codes")


def dense(parts: LinearParts) -> Tensor:
    """D as float32[out, in]."""
    if parts.scale is None:
        return parts.qweight.float()
    return codes(parts).float() * parts.scale.float()[:, None]


def side(parts: LinearParts) -> Tensor | None:
    """L R^T + S as float32[out, in]; None if there are neither factors nor a sparse part."""
    if parts.proj_up is None and parts.sparse_index is None:
        return None
    b = torch.zeros(parts.shape, device=parts.qweight.device)
    if parts.proj_up is not None:
        b += _low_rank(parts.tensors())
    if parts.sparse_index is not None and parts.sparse_value is not None:
        b.view(-1)[parts.sparse_index.to(torch.int64)] += parts.sparse_value.float()
    return b


def merged(parts: LinearParts) -> Tensor:
    """The weight that the parts stand for, D + L R^T + S, as float32[out, in]."""
    b = side(parts)
    return dense(parts) if b is None else dense(parts) + b


def narrow(t: Tensor) -> Tensor:
    """float16 if that keeps 11 bits of every value but the smallest (2^-14 of the largest), else float32."""
    half = t.to(torch.float16)
    close = bool(((half.float() - t).abs() <= 2.0**-11 * t.abs() + 2.0**-24).all())
    all_tiny = t.numel() > 0 and 0 < float(t.abs().max()) < 2.0**-10
    return half if close and not all_tiny else t.to(torch.float32)


def _split(w: Tensor, recipe: Recipe) -> tuple[LinearParts, int]:
    low_rank: dict[str, Tensor] = {}
    sparse: dict[str, Tensor] = {}
    rest, taken = w, 0
    if recipe.rank:
        found = scaled_gd(w[None], recipe.rank, recipe.alpha)
        taken = int(found.steps)
        low_rank = _store_factors(found.left[0], found.right[0], recipe.factor_bits)
        rest = w - _low_rank(low_rank)
    if recipe.alpha:
        s = keep_largest(rest, recipe.alpha).to(torch.bfloat16)
        rest = rest - s.float()
        index = s.view(-1).nonzero().view(-1)
        sparse = {"sparse_index": index, "sparse_value": s.view(-1)[index]}
    integers, scale = round_weights(rest, recipe.weight_bits, recipe.weight_clip)
    stored = {"qweight": pack_nibbles(integers) if recipe.weight_bits == 4 else integers, "scale": scale}
    everything = {name: tensor.cpu().contiguous() for name, tensor in (stored | low_rank | sparse).items()}
    if recipe.alpha:
        everything["sparse_index"] = everything["sparse_index"].to(index_dtype(*_shape(w)))
    return LinearParts(_shape(w), **everything), taken


def _low_rank(factors: dict[str, Tensor]) -> Tensor:
    """L R^T as float32[out, in] from the stored form of the factors."""
    up, down = factors["proj_up"].float(), factors["proj_down"].float()
    if "proj_up_scale" in factors:
        up, down = up * factors["proj_up_scale"].float(), down * factors["proj_down_scale"].float()
    return up @ down.T


def _store_factors(left: Tensor, right: Tensor, bits: int) -> dict[str, Tensor]:
    if bits == 16:
        return {"proj_up": left.to(torch.bfloat16), "proj_down": right.to(torch.bfloat16)}
    up, up_scale = round_weights(left.T.contiguous(), bits, "absmax")
    down, down_scale = round_weights(right.T.contiguous(), bits, "absmax")
    return {
        "proj_up": up.T.contiguous(),
        "proj_down": down.T.contiguous(),
        "proj_up_scale": up_scale,
        "proj_down_scale": down_scale,
    }


def index_dtype(out_features: int, in_features: int) -> torch.dtype:
    """The narrowest stored type that can name every position of a weight."""
    return torch.uint16 if out_features * in_features <= 2**16 else torch.int32


def _error_with(w: Tensor, recipe: Recipe, **changes: Any) -> float:
    parts, _ = _split(w, dataclasses.replace(recipe, **changes))
    return _relative_error(w.cpu(), merged(parts))


def _relative_error(w: Tensor, approximation: Tensor) -> float:
    """Six digits: the rest depends on how a sum was split over threads."""
    norm = float(w.double().square().sum(dim=1).sum().sqrt())
    lost = float((w.double() - approximation.double()).square().sum(dim=1).sum().sqrt())
    return float(f"{lost / norm:.6g}") if norm > 0 else 0.0


def _report(w: Tensor, parts: LinearParts, seconds: float, **extra: Any) -> LayerReport:
    error = _relative_error(w.cpu(), merged(parts))
    bits = sum(8 * t.numel() * t.element_size() for t in parts.tensors().values())
    return LayerReport(
        shape=parts.shape,
        rank=0 if parts.proj_up is None else parts.proj_up.shape[1],
        nnz=0 if parts.sparse_index is None else parts.sparse_index.numel(),
        relative_error=error,
        sqnr_db=float(f"{-20 * math.log10(error):.4g}") if error > 0 else None,
        stored_bits=bits,
        bits_per_weight=float(f"{bits / w.numel():.6g}"),
        seconds=seconds,
        **extra,
    )


def _shape(w: Tensor) -> tuple[int, int]:
    return w.shape[0], w.shape[1]
