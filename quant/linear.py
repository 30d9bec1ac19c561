"""QuantLinear: a Linear run from its parts with plain torch operations on any device.

Guarantees: y = s_w s_x (Q(x_D) codes^T) + x_S D^T + x (L R^T + S)^T + b, where the integer product in the
first term is exact, so every unit that computes it gets the same integers. All shapes depend on the input's
shape only: no host synchronisation, CUDA-graph safe. NaN and infinity in the input make their own token's
output NaN (or infinite) and no other's. Inference only.
Knows nothing of: where the parts came from; kernels that compute the same formula faster.

Activation codes, in float32 with one rounding per operation, t the token without its outliers:
    symmetric    s = max|t| * (1/top),                          q = clamp(rint(t * (1/s)), -top, top)
    asymmetric   s = (max(t, 0) - min(t, 0)) * (1/levels),      z = rint(min(t, 0) * (1/s)),
                 q = min(rint(t * (1/s)), z + levels)
    with top = 2^(bits-1) - 1, levels = 2^bits - 1, s at least the smallest normal number.
The constants 1/top and 1/levels are factors because a GPU divides by a constant in another way than a CPU.
q is already centred: the unsigned code is u = q - z in [0, levels], and u codes^T + z rowsum(codes) is the
same integer.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitdgdm.quant.decompose import LinearParts, codes, merged, side
from bitdgdm.quant.recipe import Recipe

EXACT = 2**24
"""float32 holds every integer up to here: a product with partial sums below it is exact in any order."""

SHORTEST_INT8 = 8
"""Inner length from which the library's int8 product is used; PyTorch 2.13 gets it wrong for length 1."""

_TINY = float(torch.finfo(torch.float32).tiny)


def quantize_tokens(t: Tensor, bits: int, asymmetric: bool) -> tuple[Tensor, Tensor]:
    """One scale per row. t: float32[M, K] -> centred codes (integers as float32[M, K]), scale [M, 1]."""
    if asymmetric:
        levels = 2**bits - 1
        low, high = t.amin(dim=-1, keepdim=True).clamp_max_(0.0), t.amax(dim=-1, keepdim=True).clamp_min_(0.0)
        scale = ((high - low) * (1 / levels)).clamp_min(_TINY)
        inverse = scale.reciprocal()
        zero = (low * inverse).round_()
        q = t.mul(inverse).round_()  # never below zero: multiplication and rounding are monotone
        return torch.minimum(q, zero + levels), scale
    top = 2 ** (bits - 1) - 1
    scale = (t.abs().amax(dim=-1, keepdim=True) * (1 / top)).clamp_min(_TINY)
    return t.mul(scale.reciprocal()).round_().clamp_(-top, top), scale


def row_threshold(x: Tensor, sigma: float) -> Tensor:
    """sigma times the root mean square of each row, float32[M, 1]; fewer than K / sigma^2 of K exceed it."""
    # float64: 1e30 squared must not overflow
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float64)
    return norm.mul_(sigma / math.sqrt(x.shape[-1])).to(torch.float32)


def exact_product(q: Tensor, weight_codes: Tensor, largest: int) -> Tensor:
    """q codes^T, integers as float32[M, N], rounded once if a sum exceeds 2^24.

    q: integers as float32[M, K]; weight_codes: integers as float32[N, K]; largest: bound of |q| * |codes|.
    """
    if q.device.type == "cpu" and q.shape[1] >= SHORTEST_INT8 and largest <= 127 * 128 and _int8_is_exact():
        return torch._int_mm(q.to(torch.int8), weight_codes.to(torch.int8).T).to(torch.float32)
    chunk = (EXACT - 1) // largest
    if q.shape[1] <= chunk:
        return F.linear(q, weight_codes)
    pieces = zip(q.split(chunk, dim=1), weight_codes.split(chunk, dim=1), strict=True)
    total = torch.zeros(q.shape[0], weight_codes.shape[0], dtype=torch.float64, device=q.device)
    for q_piece, w_piece in pieces:
        total += F.linear(q_piece, w_piece)
    return total.to(torch.float32)


@functools.cache
def _int8_is_exact() -> bool:
    """Whether this CPU multiplies int8 into int32 in one instruction (VNNI): a third of the time of float32.

    Without it the library's product may saturate or loop. Its interface is private, so it is tried out first.
    """
    supported = getattr(torch.cpu, "_is_vnni_supported", None)
    if supported is None or not supported() or not torch.backends.mkldnn.is_available():
        return False
    for m, k, n in ((1, SHORTEST_INT8, 2), (33, 64, 17), (3, 257, 1), (2, 2048, 5)):
        q = (torch.arange(m * k) * 37 % 255 - 127).view(m, k)
        w = (torch.arange(n * k) * 101 % 256 - 128).view(n, k)
        q[-1], w[-1] = 127, -128
        if not torch.equal(torch._int_mm(q.to(torch.int8), w.to(torch.int8).T).long(), q @ w.T):
            return False
    return True


class QuantLinear(nn.Module):
    """A drop-in for nn.Linear. x: float[..., in] -> [..., out] in the dtype of x; inside everything is
    float32.

    Buffers: `codes` (integers as float32[out, in]) and `scale` float32[out], or `weight` where nothing is
    rounded at run time; `side` = L R^T + S float32[out, in]; `bias` float32[out]; `tau` float32[in]; unused
    ones are None.
    """

    codes: Tensor | None
    scale: Tensor | None
    weight: Tensor | None
    side: Tensor | None
    bias: Tensor | None
    tau: Tensor | None

    def __init__(
        self, parts: LinearParts, bias: Tensor | None, recipe: Recipe, tau: Tensor | None = None
    ) -> None:
        """tau: thresholds of |x| per input channel; None takes `outlier_sigma` times each token's root mean
        square.

        Raises: ValueError if bias or tau don't fit the weight's shape.
        """
        super().__init__()
        self.out_features, self.in_features = parts.shape
        self.recipe = recipe
        for name, tensor, length in (("bias", bias, self.out_features), ("tau", tau, self.in_features)):
            if tensor is not None and tuple(tensor.shape) != (length,):
                raise ValueError(f"{name} has shape {list(tensor.shape)}, the weight needs [{length}]")
        rounds = recipe.act_quantized
        outliers = rounds and recipe.outlier_sigma is not None
        self.register_buffer("codes", codes(parts).float() if rounds else None)
        self.register_buffer("scale", parts.scale.float() if rounds and parts.scale is not None else None)
        self.register_buffer("weight", None if rounds else merged(parts))
        self.register_buffer("side", side(parts) if rounds else None)
        self.register_buffer("bias", None if bias is None else bias.detach().float().clone())
        self.register_buffer("tau", tau.detach().float().clone() if outliers and tau is not None else None)

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
        assert self.codes is not None and self.scale is not None
        bits, recipe = self.recipe.act_bits, self.recipe
        inliers, outliers = x, None
        if recipe.outlier_sigma is not None:
            tau = row_threshold(x, recipe.outlier_sigma) if self.tau is None else self.tau
            inliers = x.abs().le_(tau).mul_(x)  # a 0/1 factor: a boolean mask costs three times as much
            outliers = x - inliers
        q, s = quantize_tokens(inliers, bits, recipe.act_asymmetric)
        act_top = 2**bits - 1 if recipe.act_asymmetric else 2 ** (bits - 1) - 1
        y = exact_product(q, self.codes, act_top * 2 ** (recipe.weight_bits - 1)).mul_(s)
        if outliers is not None:
            y.addmm_(outliers, self.codes.T)
        y.mul_(self.scale)
        if self.side is not None:
            y.addmm_(x, self.side.T)
        return y if self.bias is None else y.add_(self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, recipe={self.recipe.name}"
