"""Packed codes: the stored form of integers of 1 to 7 bits.

Guarantees: `unpack(pack(c, bits), bits, width)` returns c for every width, odd ones included.
Layout: uint8[rows, ceil(width * bits / 8)], row-major; a row is a stream of bits in which code i takes the bits
i * bits up to (i + 1) * bits, the lowest first, bit k of the stream being bit k mod 8 of byte k // 8. Of 4-bit codes
column 2j is thus in the low half of byte j, column 2j + 1 in the high one. Codes are in two's complement, those of
one bit are -1 (0) and +1 (1); the bits after the last code are zero.
Knows nothing of: scales and of the layout a kernel wants.
"""

import torch
from torch import Tensor

WIDEST = 7
"""More bits than these are not packed: a code of 8 bits is a byte."""


def pack(codes: Tensor, bits: int) -> Tensor:
    """codes: int8[rows, width], of `bits` bits each (see `limits`) -> uint8[rows, ceil(width * bits / 8)]."""
    if codes.dtype != torch.int8 or codes.ndim != 2:
        raise ValueError(f"codes are int8[rows, width], not {codes.dtype}{list(codes.shape)}")
    low, high = limits(bits)
    if codes.numel() and not low <= int(codes.min()) <= int(codes.max()) <= high:
        raise ValueError(f"codes are in [{low}, {high}], not in [{int(codes.min())}, {int(codes.max())}]")
    if bits == 1 and bool((codes == 0).any()):
        raise ValueError("codes of one bit are -1 and +1, not 0")
    unsigned = (codes > 0).view(torch.uint8) if bits == 1 else codes.view(torch.uint8)
    shifts = torch.arange(bits, dtype=torch.uint8, device=codes.device)
    stream = ((unsigned.unsqueeze(-1) >> shifts) & 1).flatten(1)
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[1] % 8))
    octets = stream.view(len(codes), stream.shape[1] // 8, 8)
    return (octets << torch.arange(8, dtype=torch.uint8, device=codes.device)).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, bits: int, width: int) -> Tensor:
    """packed: uint8[rows, ceil(width * bits / 8)] -> int8[rows, width]."""
    expected = packed_width(width, bits)
    if packed.dtype != torch.uint8 or packed.ndim != 2 or packed.shape[1] != expected:
        raise ValueError(f"packed codes are uint8[rows, {expected}], not {packed.dtype}{list(packed.shape)}")
    octet = torch.arange(8, dtype=torch.uint8, device=packed.device)
    stream = ((packed.unsqueeze(-1) >> octet) & 1).flatten(1)[:, : width * bits]
    bit = stream.reshape(len(packed), width, bits)
    if bits == 1:
        return bit.squeeze(-1).to(torch.int8) * 2 - 1
    shifts = torch.arange(bits, dtype=torch.uint8, device=packed.device)
    unsigned = (bit << shifts).sum(-1, dtype=torch.uint8).to(torch.int8)
    half = 2 ** (bits - 1)
    return (unsigned ^ half) - half  # extends the sign


def packed_width(width: int, bits: int) -> int:
    """Bytes of one row."""
    return (width * bits + 7) // 8


def limits(bits: int) -> tuple[int, int]:
    """Smallest and largest code."""
    return (-1, 1) if bits == 1 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
