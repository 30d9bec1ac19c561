"""What int4.cu, int4_narrow.cu and int4_edge.cu compute, in plain PyTorch: the twin that tests compare with (law L7).

Guarantees: codes and sums are exact integers; every float operation of the main path is rounded once, in the order of
the kernel; the branches are computed in the dtype that is asked for (float64 for a reference).
Knows nothing of: packing, launches.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

TINY = torch.finfo(torch.float32).tiny


def outliers(x: Tensor, sigma: float | None, tau: Tensor | None) -> Tensor:
    """bool[M, K]: what stays out of the codes. x: float32[M, K]; tau: float32[K]."""
    if tau is None and sigma is None:
        return torch.zeros_like(x, dtype=torch.bool)
    if tau is None:
        norm = x.double().square().sum(1, keepdim=True).sqrt()
        assert sigma is not None
        tau = (norm * (sigma / math.sqrt(x.shape[1]))).float()
    return ~(x.abs() <= tau)


def round_tokens(x: Tensor, asymmetric: bool, bits: int = 4) -> tuple[Tensor, Tensor]:
    """Codes of rows, int64[M, K] centred on their zero, and scales float32[M, 1]. x: float32[M, K]."""
    top = 2 ** (bits if asymmetric else bits - 1) - 1
    if asymmetric:
        low, high = x.amin(1, keepdim=True).clamp(max=0), x.amax(1, keepdim=True).clamp(min=0)
        scale = ((high - low) * (1 / top)).clamp(min=TINY)
        inverse = 1 / scale
        zero = (low * inverse).round()
        return torch.minimum((x * inverse).round(), zero + top).long(), scale
    scale = (x.abs().amax(1, keepdim=True) * (1 / top)).clamp(min=TINY)
    return (x * (1 / scale)).round().clamp(-top, top).long(), scale


def int4_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    asymmetric: bool = False,
    sigma: float | None = None,
    tau: Tensor | None = None,
    side: Tensor | None = None,
    act_bits: int = 4,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """y = s_w (s_x (Q(x_D) codes^T) + x_S codes^T) + x side^T + b.

    x: float32[M, K], finite; codes: int8[N, K]; scale, bias: float32[N]; side: float[N, K]. Without branches the result
    is float32, each operation rounded once; with them it is of `dtype`.
    """
    apart = outliers(x, sigma, tau)
    q, row_scale = round_tokens(x.masked_fill(apart, 0), asymmetric, act_bits)
    exact = q @ codes.long().T
    y = (exact.float() * row_scale).to(dtype)
    if sigma is not None or tau is not None:
        y = y + (x * apart).to(dtype) @ codes.to(dtype).T
    y = y * scale.to(dtype)
    if side is not None:
        y = y + x.to(dtype) @ side.to(dtype).T
    return y if bias is None else y + bias.to(dtype)


def edge(
    e: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    film: tuple[Tensor, Tensor],
    counts: Tensor,
    linears: Sequence[Mapping[str, Any]],
    norms: Sequence[Tensor],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """What int4_edge.cu computes, as the network in PyTorch does it; all but integers and rounding in `dtype`.

    Shapes as in kernels/int4_edge.py; linears: what `int4_linear` takes of e_mul, e_add, e_out, linE1, linE2.
    """

    def linear(x: Tensor, i: int) -> Tensor:
        rows = int4_linear(x.reshape(-1, x.shape[-1]).float(), **linears[i], dtype=dtype)
        return rows.to(dtype).view(*x.shape[:-1], -1)

    def norm(x: Tensor, i: int) -> Tensor:
        return torch.nn.functional.layer_norm(x, (64,), norms[2 * i].to(dtype), norms[2 * i + 1].to(dtype))

    e, q, k, v, mul, add = (t.to(dtype) for t in (e, q, k, v, *film))
    there = torch.arange(e.shape[1]) < counts[:, None]
    score = q[:, :, None] * k[:, None] * (linear(e, 0) + 1) + linear(e, 1)
    z = score * (mul + 1)[:, None, None] + add[:, None, None]
    weight = score.masked_fill(~there[:, None, :, None], -math.inf).softmax(2).nan_to_num(0)
    gathered = (weight * v[:, None]).sum(2)
    e = norm(e + linear(z, 2) * (there[:, :, None, None] & there[:, None, :, None]), 0)
    return norm(e + linear(linear(e, 3).relu(), 4), 1), gathered
