"""Packed nibbles: the stored form of 4-bit codes.

Guarantees: `unpack_nibbles(pack_nibbles(c), width)` returns c for every width, odd ones included.
Layout: uint8[rows, ceil(width / 2)], row-major; column 2j is in the low four bits of byte j, column 2j + 1 in
the high four, both in two's complement; the last high nibble of an odd width is zero.
Knows nothing of: scales and of the layout a kernel wants.
"""

import torch
from torch import Tensor


def pack_nibbles(codes: Tensor) -> Tensor:
    """codes: int8[rows, width] in [-8, 7] -> uint8[rows, ceil(width / 2)]."""
    if codes.dtype != torch.int8 or codes.ndim != 2:
        raise ValueError(f"codes are int8[rows, width], not {codes.dtype}{list(codes.shape)}")
    if codes.numel() and not -8 <= int(codes.min()) <= int(codes.max()) <= 7:
        raise ValueError(f"codes are in [-8, 7], not in [{int(codes.min())}, {int(codes.max())}]")
    even = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2))
    nibbles = even.view(torch.uint8) & 0x0F
    return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)


def unpack_nibbles(packed: Tensor, width: int) -> Tensor:
    """packed: uint8[rows, ceil(width / 2)] -> int8[rows, width]."""
    if packed.dtype != torch.uint8 or packed.ndim != 2 or packed.shape[1] != (width + 1) // 2:
        raise ValueError(
            f"packed codes are uint8[rows, {(width + 1) // 2}], not {packed.dtype}{list(packed.shape)}"
        )
    low, high = packed & 0x0F, packed >> 4
    both = torch.stack((low, high), dim=-1).flatten(1)[:, :width].to(torch.int8)
    return both - 16 * (both > 7).to(torch.int8)
