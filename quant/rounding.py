"""Round weights to integer codes with one scale per output channel.

Guarantees: scales are bfloat16 and codes are rounded against the rounded scale, so storing scales in 16 bit
costs nothing; with "absmax" no weight is clipped; a row of zeros gets codes and a scale that reproduce zeros
exactly.
Knows nothing of: activations (linear.py rounds those at run time) and of the low-rank and sparse parts.
"""

import torch
from torch import Tensor

CLIP_GRID = 40
"""Candidate scales of the "mse" search: fractions of the absmax scale from 0.4 to 1 in equal steps."""


def round_weights(w: Tensor, bits: int, clip: str) -> tuple[Tensor, Tensor]:
    """Quantize each row of `w` symmetrically.

    w: float32[out, in], finite. Returns codes int8[out, in] and scale bfloat16[out]; w ~ codes * scale[:,
    None]. "absmax" uses codes in +-(2^(bits-1) - 1); "mse" also the code -2^(bits-1), which is free in two's
    complement.
    """
    top = 2 ** (bits - 1) - 1
    full = absmax_scale(w.abs().amax(dim=1, keepdim=True), top)
    if clip == "absmax":
        return _codes(w, full, -top, top).to(torch.int8), full.squeeze(1).to(torch.bfloat16)
    best_scale, best_error = full, _squared_error(w, full, -top - 1, top)
    for step in range(CLIP_GRID - 1, -1, -1):
        scale = (full * (0.4 + 0.6 * step / CLIP_GRID)).to(torch.bfloat16).float().clamp_min(_TINY)
        error = _squared_error(w, scale, -top - 1, top)
        better = error < best_error
        best_scale, best_error = (
            torch.where(better, scale, best_scale),
            torch.where(better, error, best_error),
        )
    return _codes(w, best_scale, -top - 1, top).to(torch.int8), best_scale.squeeze(1).to(torch.bfloat16)


_TINY = float(torch.finfo(torch.float32).tiny)


def absmax_scale(largest: Tensor, top: float) -> Tensor:
    """Smallest bfloat16 value >= largest / top, as float32; never below the smallest normal number.

    Equal on a CPU and a GPU: there a division by a Python number is a product with its reciprocal, which is too large
    for 10 of the 128 mantissas of a bfloat16 weight and top 7, so that the scale would be a step of bfloat16 too large.
    """
    bits = (largest / torch.full_like(largest, top)).clamp_min(_TINY).view(torch.int32)
    return ((bits + 0xFFFF) & ~0xFFFF).view(torch.float32)


def _codes(w: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    return (w / scale).round_().clamp_(low, high)


def _squared_error(w: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """float32[out, 1], summed row by row so that the result doesn't depend on the number of threads."""
    return _codes(w, scale, low, high).mul_(scale).sub_(w).square_().sum(dim=1, keepdim=True)
