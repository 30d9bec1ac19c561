"""Philox4x32-10 draws keyed by (seed, sample, step, slot): every random number of a sample (law L1).

Guarantees: a draw is a pure function of its four keys, bit for bit the same on CPU and CUDA and in any batch;
the slots of nodes, edges and the node count never meet.
Knows nothing of: what is drawn; the sampler turns u into classes. A kernel that draws for itself uses the
first output word and the slots written here.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK32 = 0xFFFFFFFF
_ROUNDS = 10


def philox4x32(counter: Sequence[Tensor], key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the four 32-bit output words of Philox4x32-10 as int64.

    counter: four int64 tensors that broadcast together, each in [0, 2^32). key: two ints in [0, 2^32).
    Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK32, (k1 + _WEYL[1]) & _MASK32
    return c0, c1, c2, c3


def _multiply(factor: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """Return (high, low) 32-bit halves of factor * word; in two halves, so that int64 never overflows."""
    upper = word * (factor >> 16)
    lower = word * (factor & 0xFFFF)
    high = (upper + (lower >> 16)) >> 16
    low = (lower + ((upper & 0xFFFF) << 16)) & _MASK32
    return high, low


def philox(seed: int, sample_id: Tensor, step: int | Tensor, slot: Tensor) -> Tensor:
    """Return u: float32 in (0, 1], one draw for each (sample_id, step, slot), broadcast together.

    seed: 0 <= seed < 2^64, the key. sample_id: int64 >= 0. step, slot: 0 <= . < 2^32.
    u = (top 24 bits of the first output word + 1) * 2^-24, exact in float32.
    Raises: ValueError for a seed outside 64 bits.
    """
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed {seed} is not in [0, 2^64)")
    sample_id, slot = torch.broadcast_tensors(sample_id, slot)
    # full_like and not tensor(): a copy from the host would make a CUDA stream wait
    steps = step.expand_as(slot) if isinstance(step, Tensor) else torch.full_like(slot, step)
    counter = (sample_id & _MASK32, (sample_id >> 32) & _MASK32, steps, slot)
    word = philox4x32(counter, (seed & _MASK32, seed >> 32))[0]
    return ((word >> 8) + 1).to(torch.float32) * 2.0**-24


def node_slots(n_pad: int, device: torch.device | str = "cpu") -> Tensor:
    """Return int64[n_pad]: the slot of node i is i."""
    return torch.arange(n_pad, device=device)


def edge_slots(n_pad: int, rows: Tensor, cols: Tensor) -> Tensor:
    """Return the slot of each edge (row, col), row < col; edge (j, i) is a copy of (i, j) and has no slot."""
    return n_pad + n_pad * rows + cols


def count_slot(n_pad: int) -> int:
    """Return the slot of the node count, beyond all nodes and edges."""
    return n_pad + n_pad * n_pad
