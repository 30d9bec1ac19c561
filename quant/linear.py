"""QuantLinear: a Linear run from its parts with plain torch operations on any device.

Guarantees: y = s_w s_x (Q(x_D) codes^T) + x_S D^T + x' (L R^T + S)^T + x_C C^T + b with x' = T x, where the product
of integer codes in the first term is exact, so every unit that computes it gets the same integers. All shapes depend
on the input's shape only: no host synchronisation, CUDA-graph safe. NaN and infinity in the input make their own
token's output NaN (or infinite) and no other's. Inference only.
Knows nothing of: where the parts came from; kernels that compute the same formula faster.

With the metric "input" a layer has y = s_w s_x (Q(x''_D) codes^T) + x''_S D^T + z L^T + b, z = R^T x', x'' = x' - R z.
x_C are the channels of the column block, x_D + x_S the others, x_S their outliers; Q and its scale s_x are written in
activations.py. Without a remainder D the first two terms are (s_x Q(x_D) R + x_S R) L^T, R in its stored form; a
recipe without the cross product takes x_D in place of x' in the product with S.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitdgdm.quant.activations import code_top, quantize, split_outliers
from bitdgdm.quant.parts import LinearParts, codes, factor_codes, factors, low_rank, merged, side, sparse
from bitdgdm.quant.product import exact_product
from bitdgdm.quant.recipe import Recipe
from bitdgdm.quant.transform import Transform, forward, transform_of


class QuantLinear(nn.Module):
    """A drop-in for nn.Linear. x: float[..., in] -> [..., out] in the dtype of x; inside everything is float32.

    Buffers; those that a recipe doesn't use are None:
    `weight` float32[out, in]: all of W, where inputs aren't rounded; else
    `codes` float32[out, in]: integers or e4m3 values; of R, [R, in], without a remainder;
    `scale` float32[out], [out, groups], or [R];
    `side` float32[out, in]: what all of x' meets, L R^T + S or one of them; `sparse`: S, where only inliers meet it;
    `up` float32[out, R]: L, without a remainder;
    `basis` float32[in, R] and `basis_up` float32[out, R]: R and L of the metric "input";
    `columns` int64[c], `column_value` float32[out, c], and `inner_channels` float32[in], 0 in the columns, else 1;
    `low`, `high` float32[bins], `bin_of_t` int64[T + 1] and `time_bin` int64[1]: of a static table;
    `factor`, `permutation`, `blocks`: of the transform; `bias` float32[out]; `tau` float32[in].
    """

    codes: Tensor | None
    scale: Tensor | None
    weight: Tensor | None
    up: Tensor | None
    basis: Tensor | None
    basis_up: Tensor | None
    side: Tensor | None
    sparse: Tensor | None
    columns: Tensor | None
    inner_channels: Tensor | None
    column_value: Tensor | None
    bias: Tensor | None
    tau: Tensor | None
    low: Tensor | None
    high: Tensor | None
    bin_of_t: Tensor | None
    time_bin: Tensor | None
    factor: Tensor | None
    permutation: Tensor | None
    blocks: Tensor | None

    def __init__(
        self, parts: LinearParts, bias: Tensor | None, recipe: Recipe, tau: Tensor | None = None
    ) -> None:
        """recipe: of this layer (`Recipe.for_layer`). tau: thresholds of |x| per input channel, for outliers by sigma;
        None, and a transform that mixes channels, take `outlier_sigma` times each token's root mean square.

        Raises: ValueError if bias or tau don't fit the weight's shape, or the recipe is not of one layer.
        """
        super().__init__()
        if recipe.overrides:
            raise ValueError(f"{recipe.name} says something else per layer; resolve it by for_layer")
        self.out_features, self.in_features = parts.shape
        self.recipe = recipe
        for name, tensor, length in (("bias", bias, self.out_features), ("tau", tau, self.in_features)):
            if tensor is not None and tuple(tensor.shape) != (length,):
                raise ValueError(f"{name} has shape {list(tensor.shape)}, the weight needs [{length}]")
        tables = _run_time(parts, recipe) if recipe.act_quantized else _whole(parts)
        if recipe.act_quantized and recipe.outlier_sigma is not None and tau is not None:
            tables["tau"] = inner_tau(tau.detach().float().clone(), recipe, tables.get("factor"))
        tables["bias"] = None if bias is None else bias.detach().float().clone()
        for name in QuantLinear.__annotations__:
            self.register_buffer(name, tables.get(name))
        self._exact = self.codes is not None and _integer_codes(parts, recipe)
        self._told_time = self.bin_of_t is None or int(self.bin_of_t.max()) == 0

    @classmethod
    def from_parts(
        cls, parts: LinearParts, bias: Tensor | None, recipe: Recipe, tau: Tensor | None = None
    ) -> "QuantLinear":
        return cls(parts, bias, recipe, tau)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            flat = x.reshape(-1, self.in_features).to(torch.float32)
            y = self._rounded(flat) if self.weight is None else F.linear(flat, self.weight, self.bias)
            return y.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def _rounded(self, x: Tensor) -> Tensor:
        x = forward(x, Transform(self.recipe.premul, self.factor, self.permutation, self.blocks))
        z = None if self.basis is None else x @ self.basis
        if z is not None and self.basis is not None:
            x = torch.addmm(x, z, self.basis.T, alpha=-1)
        inner = x if self.inner_channels is None else x * self.inner_channels
        inliers, outliers = split_outliers(inner, self.recipe, self.tau)
        y = self._main(inliers, outliers)
        if self.up is not None:
            y = F.linear(y, self.up)
        if z is not None and self.basis_up is not None:
            y.addmm_(z, self.basis_up.T)
        if self.side is not None:
            y.addmm_(x, self.side.T)
        if self.sparse is not None:
            y.addmm_(inliers, self.sparse.T)
        if self.columns is not None and self.column_value is not None:
            y.addmm_(x.index_select(1, self.columns), self.column_value.T)
        return y if self.bias is None else y.add_(self.bias)

    def _main(self, x: Tensor, outliers: Tensor | None) -> Tensor:
        """(s Q(x) + x_S) (scale codes)^T, float32[M, N]. x: the inliers."""
        assert self.codes is not None and self.scale is not None
        low, high = self._range()
        if self.scale.ndim == 1:
            q, s = quantize(x, self.recipe, low, high)
            return self._term(q, s, outliers, self.codes).mul_(self.scale)
        y = torch.zeros(x.shape[0], self.codes.shape[0], device=x.device)
        if self.recipe.act_scale != "group":
            x, s = quantize(x, self.recipe, low, high)
        for i, scale in enumerate(self.scale.unbind(1)):
            piece = slice(i * self.recipe.weight_group, (i + 1) * self.recipe.weight_group)
            q = x[:, piece]
            if self.recipe.act_scale == "group":
                q, s = quantize(q, self.recipe, None, None)
            out_piece = None if outliers is None else outliers[:, piece]
            y.addcmul_(self._term(q, s, out_piece, self.codes[:, piece]), scale)
        return y

    def _term(self, q: Tensor, s: Tensor, outliers: Tensor | None, w: Tensor) -> Tensor:
        if self._exact:
            y = exact_product(q, w, code_top(self.recipe), _weight_top(self.recipe)).mul_(s)
        else:
            y = F.linear(q, w).mul_(s)
        return y if outliers is None else y.addmm_(outliers, w.T)

    def _range(self) -> tuple[Tensor | None, Tensor | None]:
        """low and high of the current time, float32[1]."""
        if self.low is None or self.high is None or self.time_bin is None:
            return None, None
        if not self._told_time:
            raise RuntimeError("a static table needs the time: call set_time(network, t) before the forward")
        return self.low.index_select(0, self.time_bin), self.high.index_select(0, self.time_bin)

    def set_time(self, t: Tensor) -> None:
        """Take the table's entry of diffusion time t, int64[1] on the layer's device."""
        if self.bin_of_t is not None and self.time_bin is not None:
            self.time_bin.copy_(self.bin_of_t.index_select(0, t))
            self._told_time = True

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, recipe={self.recipe.name}"


def timed_layers(network: nn.Module) -> Iterator[QuantLinear]:
    """The layers whose activation scales depend on the diffusion time."""
    return (m for m in network.modules() if isinstance(m, QuantLinear) and m.bin_of_t is not None)


def set_time(network: nn.Module, t: Tensor) -> None:
    """Tell every layer with a static table the diffusion time of the next forward.

    t: int64[B], all equal. Raises: ValueError if they differ (on a CPU; on a GPU nothing waits to see).
    """
    layers = tuple(timed_layers(network))
    if not layers or not t.numel():
        return
    if t.device.type == "cpu" and bool((t != t.reshape(-1)[0]).any()):
        raise ValueError("static activation tables take one diffusion time a batch")
    first = t.reshape(-1)[:1].to(torch.int64)
    for layer in layers:
        layer.set_time(first)


def _whole(parts: LinearParts) -> dict[str, Tensor | None]:
    """The one buffer of a layer that doesn't round its input."""
    return {"weight": merged(parts)}


def _run_time(parts: LinearParts, recipe: Recipe) -> dict[str, Tensor | None]:
    """The buffers of a layer that rounds its input, by name."""
    found: dict[str, Tensor | None] = {"low": parts.act_low, "high": parts.act_high}
    if parts.bin_of_t is not None:
        found["bin_of_t"] = parts.bin_of_t.to(torch.int64)
        found["time_bin"] = parts.bin_of_t[-1:].to(torch.int64)
    t = transform_of(parts.premul, parts.shape[1], parts.smooth, parts.permutation, parts.swaps)
    found |= {"factor": t.factor, "permutation": t.permutation, "blocks": t.blocks}
    if recipe.remainder:
        found["codes"] = codes(parts).float()
        found["scale"] = None if parts.scale is None else parts.scale.float()
        found["side"] = side(parts) if recipe.cross_product else low_rank(parts)
        if parts.deflated:
            both = factors(parts)
            assert both is not None
            found |= {"basis_up": both[0], "basis": both[1], "side": None}
    else:
        both = factors(parts)
        assert both is not None and parts.proj_down is not None
        scale = parts.proj_down_scale
        found["codes"] = factor_codes(parts.proj_down, scale).T.contiguous()
        found["scale"] = torch.ones(both[0].shape[1]) if scale is None else scale.float()
        found["up"] = both[0]
        found["side"] = sparse(parts) if recipe.cross_product else None
    found["sparse"] = None if recipe.cross_product else sparse(parts)
    if parts.column_index is not None and parts.column_value is not None:
        found["columns"] = parts.column_index.to(torch.int64)
        found["column_value"] = parts.column_value.float()
        keep = torch.ones(parts.shape[1])
        keep[found["columns"]] = 0.0
        found["inner_channels"] = keep
    return found


def inner_tau(tau: Tensor, recipe: Recipe, factor: Tensor | None) -> Tensor | None:
    """Thresholds of |x'| from those of |x|: float32[in]; None where the transform or the metric "input" mixes channels."""
    if recipe.low_rank_metric == "input":
        return None
    if recipe.premul == "smooth" and factor is not None:
        return tau * factor
    return tau if recipe.premul == "none" else None


def _integer_codes(parts: LinearParts, recipe: Recipe) -> bool:
    """Whether both codes of the main product are integers."""
    of_weight = recipe.weight_format != "fp8" if recipe.remainder else parts.proj_down_scale is not None
    return recipe.act_format == "int" and of_weight


def _weight_top(recipe: Recipe) -> int:
    """The largest size of a weight's code: the negative end of two's complement."""
    return 2 ** ((recipe.weight_bits if recipe.remainder else recipe.factor_bits) - 1)
