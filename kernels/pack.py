"""Weights and vectors in the order in which the kernels read them.

Guarantees: pure functions; a packed matrix holds the bf16 rounding of the given one and nothing else.
Knows nothing of: which layer a matrix belongs to, launches.
"""

import torch
from torch import Tensor


def pack_weight(
    w: Tensor, rows: int | None = None, cols: int | None = None, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """B fragments of mma.m16n8k16: dtype[K / 16, N / 16, 32 lanes, 8] of w: float[N, K]; zero-padded to rows, cols.

    Lane 4 g + l of block (k, n) holds, for h in 0, 1 and s in 0, 1: w[16 n + 8 h + g, 16 k + 8 s + 2 l + (0, 1)].
    """
    full = _padded(w, rows, cols)
    n, k = full.shape
    parts = full.reshape(n // 16, 2, 8, k // 16, 2, 4, 2)  # n, h, g, k, s, l, e
    return parts.permute(3, 0, 2, 5, 1, 4, 6).reshape(k // 16, n // 16, 32, 8).to(dtype).contiguous()


def pack_pairs(blocks: Tensor) -> Tensor:
    """[A, B / 2, 32 lanes, 2 blocks, 8] of packed blocks [A, B, 32, 8]: two blocks of one byte a weight, 16 bytes a lane."""
    a, b = blocks.shape[:2]
    return blocks.reshape(a, b // 2, 2, 32, 8).transpose(2, 3).contiguous()


def pack_slabs(w: Tensor, rows: int | None = None, cols: int | None = None) -> Tensor:
    """B slabs of wgmma without swizzle: bf16[K / 16, 2, N, 8] of w: float[N, K]; zero-padded to rows, cols.

    Part (k, h) holds w[:, 16 k + 8 h :][:8], 16 bytes a row, so that 8 rows are a core matrix of 128 bytes.
    """
    full = _padded(w, rows, cols)
    n, k = full.shape
    return full.reshape(n, k // 16, 2, 8).permute(1, 2, 0, 3).to(torch.bfloat16).contiguous()


def pack_code_slabs(codes: Tensor) -> Tensor:
    """The same of codes of one byte (int8, e4m3), 32 channels a slab: [K / 32, 2, N, 16] of codes: [N, K].

    Byte 4 l + 2 u + v of part (k, h) is channel 32 k + 16 h + 8 u + 2 l + v: what a lane holds of a product's result are
    neighbours, so that it packs its own next operand.
    """
    n, k = codes.shape
    return codes.reshape(n, k // 32, 2, 2, 4, 2).permute(1, 2, 0, 4, 3, 5).reshape(k // 32, 2, n, 16).contiguous()


def to_tiles(x: Tensor) -> Tensor:
    """Fragment order of rows: bf16[R / 16, C / 16, 32, 8] of x: float[R, C]; R and C multiples of 16."""
    rows, channels = x.shape
    parts = x.reshape(rows // 16, 2, 8, channels // 16, 2, 4, 2)  # tile, high row, g, k, half, l, e
    return parts.permute(0, 3, 2, 5, 4, 1, 6).reshape(rows // 16, channels // 16, 32, 8).to(torch.bfloat16).contiguous()


def from_tiles(x: Tensor) -> Tensor:
    """The inverse of `to_tiles`: [R, C] of [R / 16, C / 16, 32, 8]."""
    tiles, k = x.shape[:2]
    parts = x.reshape(tiles, k, 8, 4, 2, 2, 2)  # tile, k, g, l, half, high row, e
    return parts.permute(0, 5, 2, 1, 4, 3, 6).reshape(tiles * 16, k * 16)


def _padded(w: Tensor, rows: int | None, cols: int | None) -> Tensor:
    n, k = w.shape
    full = w.new_zeros((rows or -(-n // 16) * 16, cols or -(-k // 16) * 16))
    full[:n, :k] = w
    return full
