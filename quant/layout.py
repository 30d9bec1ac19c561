"""Which tensors a layer of an artifact holds, with their shapes and types, told by its recipe and its report.

Guarantees: tensors that pass `fits` can be built into a QuantLinear without an error from inside of it: positions,
channels and time bins lie within bounds.
Knows nothing of: files.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from bitdgdm.quant.layer_report import LayerReport
from bitdgdm.quant.packing import WIDEST, packed_width
from bitdgdm.quant.parts import index_dtype
from bitdgdm.quant.recipe import Recipe

Kind = tuple[tuple[int | None, ...], tuple[torch.dtype, ...]]
"""A shape, None for any length, and the possible types."""

BF16 = (torch.bfloat16,)


def layout(report: LayerReport, recipe: Recipe) -> dict[str, Kind]:
    """Shape and possible types of each part of a layer; recipe: of that layer."""
    rows, columns = report.shape
    if not recipe.weight_quantized:
        return {"qweight": ((rows, columns), (torch.float16, torch.float32))}
    kinds: dict[str, Kind] = _dense(rows, columns, recipe) if recipe.remainder else {}
    if report.rank:
        kinds |= _factors(rows, columns, report.rank, recipe)
    if recipe.alpha and recipe.solver != "outlier-pursuit":
        kinds["sparse_index"] = ((report.nnz,), (index_dtype(rows, columns),))
        kinds["sparse_value"] = ((report.nnz,), BF16)
    if recipe.columns or recipe.solver == "outlier-pursuit":
        kinds["column_index"] = ((report.columns,), (torch.int32,))
        kinds["column_value"] = ((rows, report.columns), BF16)
    if recipe.premul == "smooth":
        kinds["smooth"] = ((columns,), BF16)
    if recipe.premul == "duquant":
        kinds["permutation"] = ((None, columns), (torch.int16,))
        kinds["swaps"] = ((None, None, None), (torch.uint8,))
    if recipe.act_scale == "static":
        kinds["act_low"] = kinds["act_high"] = ((None,), (torch.float32,))
        kinds["bin_of_t"] = ((None,), (torch.int16,))
    return kinds


def fits(tensors: Mapping[str, Tensor], report: LayerReport, recipe: Recipe) -> bool:
    """Whether these are the parts of a layer with this report and recipe."""
    kinds = layout(report, recipe)
    if tensors.keys() != kinds.keys():
        return False
    for name, tensor in tensors.items():
        shape, types = kinds[name]
        same = len(shape) == tensor.ndim and all(
            n in (None, m) for n, m in zip(shape, tensor.shape, strict=True)
        )
        if not same or tensor.dtype not in types:
            return False
    return _inside(tensors, report)


def _inside(tensors: Mapping[str, Tensor], report: LayerReport) -> bool:
    """Whether everything that names a place names one that is there."""
    rows, columns = report.shape
    bounds = [("sparse_index", rows * columns), ("column_index", columns)]
    if "act_low" in tensors:
        bins = len(tensors["act_low"])
        bounds.append(("bin_of_t", bins))
        if not (bins and len(tensors["act_high"]) == bins and len(tensors["bin_of_t"]) > 1):
            return False
        if bool((tensors["act_low"] > 0).any()) or bool((tensors["act_high"] < 0).any()):
            return False
    for name, end in bounds:
        index = tensors.get(name)
        if index is not None and index.numel():
            wide = index.to(torch.int64)
            if not 0 <= int(wide.min()) <= int(wide.max()) < end:
                return False
    if "permutation" in tensors:
        order, swaps = tensors["permutation"].to(torch.int64), tensors["swaps"]
        everything = torch.arange(columns).expand(order.shape)
        if len(order) != len(swaps) or not swaps.shape[1] or columns % swaps.shape[1]:
            return False
        return torch.equal(order.sort(dim=1).values, everything)
    return True


def _dense(rows: int, columns: int, recipe: Recipe) -> dict[str, Kind]:
    bits, group = recipe.weight_bits, recipe.weight_group
    if recipe.weight_format == "fp8":
        kinds: dict[str, Kind] = {"qweight": ((rows, columns), (torch.float8_e4m3fn,))}
    elif bits <= WIDEST:
        kinds = {"qweight": ((rows, packed_width(columns, bits)), (torch.uint8,))}
    else:
        kinds = {"qweight": ((rows, columns), (torch.int8,))}
    if recipe.weight_format == "codebook":
        kinds["book"] = ((rows, 2**bits), BF16)
    else:
        kinds["scale"] = ((rows, -(-columns // group)) if group else (rows,), BF16)
    return kinds


def _factors(rows: int, columns: int, rank: int, recipe: Recipe) -> dict[str, Kind]:
    bits = recipe.factor_bits
    types = {16: BF16, 8: (torch.int8,), 4: (torch.uint8,)}[bits]
    width = packed_width(rank, bits) if bits <= WIDEST else rank
    kinds: dict[str, Kind] = {"proj_up": ((rows, width), types), "proj_down": ((columns, width), types)}
    if bits != 16:
        kinds["proj_up_scale"] = kinds["proj_down_scale"] = ((rank,), BF16)
    return kinds
