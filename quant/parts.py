"""The stored form of one quantized weight, and what it stands for.

Guarantees: a LinearParts describes itself: what is stored is enough to rebuild the weight, without its recipe.
Knows nothing of: how the parts were found (decompose.py), how a layer is run from them (linear.py), files.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from bitdgdm.quant.packing import unpack
from bitdgdm.quant.recipe import Recipe
from bitdgdm.quant.transform import back, transform_of

PLAIN = ("shape", "bits", "group", "premul", "deflated")
"""The fields of LinearParts that are no tensors."""


@dataclass(frozen=True)
class LinearParts:
    """One weight W[out, in] = W' T with W' ~ D + L R^T + S + C; parts a recipe doesn't use are None.

    bits: of a code in `qweight`; group: inputs that share a scale, 0 for all of a row. premul: the kind of T.
    deflated: D meets x' - R R^T x' instead of x', so that W' ~ D (I - R R^T) + L R^T.
    qweight: D. Codes of 1, 3, 4 or 6 bits: packed uint8 (packing.py); of 8: int8[out, in] or float8_e4m3fn[out, in];
    not quantized: float[out, in]; None if D is left out.
    scale: bfloat16[out] or [out, groups], D = codes * scale; None for a float qweight and for a codebook.
    book: bfloat16[out, 2^bits], D[i, j] = book[i, codes[i, j] + 2^(bits-1)].
    proj_up, proj_down: L [out, R] and R [in, R]: bfloat16, or codes of 8 bits (int8) or 4 bits (packed along R) with
    bfloat16[R] scales, one per component.
    sparse_index: flat row-major positions of S, ascending; uint16[nnz] if out * in <= 65536, else int32[nnz].
    sparse_value: bfloat16[nnz].
    column_index: int32[c], ascending; column_value: bfloat16[out, c]: C, and all of W' but L R^T in those columns.
    act_low, act_high: float32[bins], the range of x' that has codes in each time bin; bin_of_t: int16[T + 1].
    smooth: bfloat16[in]; permutation: int16[stages, in]; swaps: uint8[stages, in / b, steps]: of T (transform.py).
    """

    shape: tuple[int, int]
    qweight: Tensor | None = None
    scale: Tensor | None = None
    proj_up: Tensor | None = None
    proj_down: Tensor | None = None
    proj_up_scale: Tensor | None = None
    proj_down_scale: Tensor | None = None
    sparse_index: Tensor | None = None
    sparse_value: Tensor | None = None
    book: Tensor | None = None
    column_index: Tensor | None = None
    column_value: Tensor | None = None
    act_low: Tensor | None = None
    act_high: Tensor | None = None
    bin_of_t: Tensor | None = None
    smooth: Tensor | None = None
    permutation: Tensor | None = None
    swaps: Tensor | None = None
    bits: int = 4
    group: int = 0
    premul: str = "none"
    deflated: bool = False

    def tensors(self) -> dict[str, Tensor]:
        """The parts that are there, by name."""
        named = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in PLAIN}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def to(self, device: torch.device | str) -> "LinearParts":
        moved: dict[str, Any] = {name: t.to(device) for name, t in self.tensors().items()}
        return dataclasses.replace(self, **moved)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        """Travel between processes as safetensors bytes: torch can't read back its own pickle of uint16."""
        return _unpickled, (
            {name: getattr(self, name) for name in PLAIN},
            safetensors.torch.save(self.tensors()),
        )


def _unpickled(plain: dict[str, Any], data: bytes) -> LinearParts:
    tensors: dict[str, Any] = safetensors.torch.load(data)
    return LinearParts(**plain, **tensors)


def parts_of(shape: tuple[int, int], tensors: dict[str, Any], recipe: Recipe) -> LinearParts:
    """Tensors by name as a recipe (of one layer) stores them."""
    deflated = recipe.low_rank_metric == "input"
    return LinearParts(
        shape, **tensors, bits=recipe.weight_bits, group=recipe.weight_group, premul=recipe.premul, deflated=deflated
    )  # fmt: skip


def codes(parts: LinearParts) -> Tensor:
    """The codes of D: int8[out, in], or float8_e4m3fn[out, in]; a codebook's count from -2^(bits-1).

    Raises: ValueError if D is stored in floats or left out.
    """
    q = parts.qweight
    if q is not None and q.dtype == torch.uint8:
        return unpack(q, parts.bits, parts.shape[1])
    if q is not None and q.dtype in (torch.int8, torch.float8_e4m3fn):
        return q
    raise ValueError("a full-precision weight has no integer codes")


def dense(parts: LinearParts) -> Tensor:
    """D as float32[out, in]; zeros if it is left out."""
    if parts.qweight is None:
        return torch.zeros(parts.shape, device=_device(parts))
    if parts.book is not None:
        return parts.book.float().gather(1, codes(parts).to(torch.int64) + 2 ** (parts.bits - 1))
    if parts.scale is None:
        return parts.qweight.float()
    return codes(parts).float() * spread(parts.scale, parts.shape[1], parts.group)


def spread(scale: Tensor, width: int, group: int) -> Tensor:
    """Scales [out] or [out, groups] as float32[out, 1 or width], each repeated over the inputs that share it."""
    if not group:
        return scale.float().unsqueeze(-1)
    return scale.float().repeat_interleave(group, dim=-1)[..., :width]


def factors(parts: LinearParts) -> tuple[Tensor, Tensor] | None:
    """L and R as float32[out, R] and [in, R]; None if there are none."""
    if parts.proj_up is None or parts.proj_down is None:
        return None
    return (
        factor_codes(parts.proj_up, parts.proj_up_scale) * _of_component(parts.proj_up_scale),
        factor_codes(parts.proj_down, parts.proj_down_scale) * _of_component(parts.proj_down_scale),
    )


def factor_codes(factor: Tensor, scale: Tensor | None) -> Tensor:
    """A stored factor without its scales, float32[n, R]."""
    if factor.dtype == torch.uint8:
        assert scale is not None
        return unpack(factor, 4, scale.shape[0]).float()
    return factor.float()


def _of_component(scale: Tensor | None) -> Tensor | float:
    return 1.0 if scale is None else scale.float()


def low_rank(parts: LinearParts) -> Tensor | None:
    """L R^T as float32[out, in]; None if there are no factors."""
    found = factors(parts)
    return None if found is None else found[0] @ found[1].mT


def sparse(parts: LinearParts) -> Tensor | None:
    """S as float32[out, in]; None if there is none."""
    if parts.sparse_index is None or parts.sparse_value is None:
        return None
    s = torch.zeros(parts.shape, device=parts.sparse_value.device)
    s.view(-1)[parts.sparse_index.to(torch.int64)] = parts.sparse_value.float()
    return s


def side(parts: LinearParts) -> Tensor | None:
    """L R^T + S as float32[out, in]; None if there are neither factors nor a sparse part."""
    b, s = low_rank(parts), sparse(parts)
    if b is None or s is None:
        return s if b is None else b
    return b.add_(s)


def transformed(parts: LinearParts) -> Tensor:
    """W' = D + L R^T + S + C (D (I - R R^T) for D if deflated) as float32[out, in]."""
    w, b = dense(parts), side(parts)
    found = factors(parts) if parts.deflated else None
    if found is not None:
        w = w - (w @ found[1]) @ found[1].mT
    w = w if b is None else w + b
    if parts.column_index is not None and parts.column_value is not None:
        w = w.index_add(1, parts.column_index.to(torch.int64), parts.column_value.float())
    return w


def merged(parts: LinearParts) -> Tensor:
    """The weight that the parts stand for, W' T, as float32[out, in]."""
    t = transform_of(parts.premul, parts.shape[1], parts.smooth, parts.permutation, parts.swaps)
    return back(transformed(parts), t.to(_device(parts)))


def stored_bits(parts: LinearParts) -> int:
    """All parts of the weight, scales and indices included, without bias and thresholds."""
    return sum(8 * t.numel() * t.element_size() for t in parts.tensors().values())


def index_dtype(out_features: int, in_features: int) -> torch.dtype:
    """The narrowest stored type that can name every position of a weight."""
    return torch.uint16 if out_features * in_features <= 2**16 else torch.int32


def narrow(t: Tensor) -> Tensor:
    """float16 if that keeps 11 bits of every value but the smallest (2^-14 of the largest), else float32."""
    half = t.to(torch.float16)
    close = bool(((half.float() - t).abs() <= 2.0**-11 * t.abs() + 2.0**-24).all())
    all_tiny = t.numel() > 0 and 0 < float(t.abs().max()) < 2.0**-10
    return half if close and not all_tiny else t.to(torch.float32)


def _device(parts: LinearParts) -> torch.device:
    return next(iter(parts.tensors().values())).device
