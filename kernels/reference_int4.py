"""What int4.cu computes, in plain PyTorch: the twin that tests compare with (law L7).

Guarantees: codes and sums are exact integers; every float operation of the main path is rounded once, in the order of
the kernel; the branches are computed in the dtype that is asked for (float64 for a reference).
Knows nothing of: packing, launches.
"""

import math

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


def round_tokens(x: Tensor, asymmetric: bool) -> tuple[Tensor, Tensor]:
    """4-bit codes of rows, int64[M, K] centred on their zero, and scales float32[M, 1]. x: float32[M, K]."""
    if asymmetric:
        low, high = x.amin(1, keepdim=True).clamp(max=0), x.amax(1, keepdim=True).clamp(min=0)
        scale = ((high - low) * (1 / 15)).clamp(min=TINY)
        inverse = 1 / scale
        zero = (low * inverse).round()
        return torch.minimum((x * inverse).round(), zero + 15).long(), scale
    scale = (x.abs().amax(1, keepdim=True) * (1 / 7)).clamp(min=TINY)
    return (x * (1 / scale)).round().clamp(-7, 7).long(), scale


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
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """y = s_w (s_x (Q(x_D) codes^T) + x_S codes^T) + x side^T + b.

    x: float32[M, K], finite; codes: int8[N, K]; scale, bias: float32[N]; side: float[N, K]. Without branches the result
    is float32, each operation rounded once; with them it is of `dtype`.
    """
    apart = outliers(x, sigma, tau)
    q, row_scale = round_tokens(x.masked_fill(apart, 0), asymmetric)
    exact = q @ codes.long().T
    y = (exact.float() * row_scale).to(dtype)
    if sigma is not None or tau is not None:
        y = y + (x * apart).to(dtype) @ codes.to(dtype).T
    y = y * scale.to(dtype)
    if side is not None:
        y = y + x.to(dtype) @ side.to(dtype).T
    return y if bias is None else y + bias.to(dtype)
