"""Rotate a layer's input so that no channel stands out: Hadamard (QuaRot) and permuted blocks (DuQuant).

Guarantees: every transform T here is orthogonal to 1e-6, so x w^T = (x T^T) (w T^T)^T: the same function is applied
to the input's rows and to the weight's rows. Elementwise Hadamard sums: a row's result doesn't depend on its batch,
nor on the device. Nothing is stored for a Hadamard transform; DuQuant stores a permutation and one small number
per greedy step, from which the rotation matrices are rebuilt.
Knows nothing of: quantization.

Sources: Ashkboos et al., "QuaRot", NeurIPS 2024; Lin et al., "DuQuant", NeurIPS 2024, equations 3-8, and
Hsu1023/DuQuant at 1b425e8 (quantize/quantizer.py, get_rot.py) for the order of the steps.
Adaptations. QuaRot folds its rotations into neighbouring weights, which DiGress's LayerNorm gains and elementwise
products forbid: here the transform runs online before each Linear; fixed signs in front of it keep the mean of
post-ReLU inputs from becoming an outlier of its own. Cost: width log2(width) additions a row, nothing stored.
DuQuant: block rotation, zigzag permutation, block rotation, found on self-sampled inputs; each block gets its own
rotation (as in the paper; the public code shares one), and the number of greedy steps kept is that with the smallest
mean squared peak of a token instead of the smallest range over all tokens, because our scales are per token. Its
smoothing in front is left out. Cost: 2 block width multiply-adds a row; 0.25 stored bits a weight of a square layer of 256.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 16
STEPS = 32
"""Greedy rotations tried per block and stage."""


@dataclass(frozen=True)
class BlockRotation:
    """Stages of: permute the channels, then rotate each block of neighbours.

    permutation: int16[stages, in], channel permutation[s, j] comes to place j. swaps: uint8[stages, in / block, steps],
    the channel that each greedy step spread over its block; 255 stands for no step.
    """

    block: int
    permutation: Tensor
    swaps: Tensor


def hadamard(x: Tensor) -> Tensor:
    """x D H per row, H the orthonormal Walsh-Hadamard matrix, D fixed signs that depend on the width only.

    x: float[..., d] in its own dtype. A width that isn't a power of two is transformed in equal blocks of the largest
    power of two that divides it: an odd width only gets its signs.
    """
    return walsh(x * signs(x.shape[-1]).to(x.device, x.dtype))


@functools.cache
def signs(width: int) -> Tensor:
    """+1 or -1 per channel, float32[width]: one bit of an integer hash of the channel's number."""
    h = torch.arange(1, width + 1, dtype=torch.int64) * 2654435761 % 2**32
    h = (h ^ (h >> 15)) * 2246822519 % 2**32
    return 1.0 - 2.0 * ((h >> 13) & 1).to(torch.float32)


def duquant(sample: Tensor, *, block: int = BLOCK, steps: int = STEPS) -> BlockRotation:
    """Two stages of permutation and block rotation that flatten the channels of `sample`.

    sample: float[m, in], m > 0. block: a power of two up to 128, halved until it divides the width. The first stage
    has the identity as its permutation.
    """
    if block & (block - 1) or not 0 < block <= 128:
        raise ValueError(f"a block is a power of two up to 128, not {block}")
    width = sample.shape[1]
    while width % block:
        block //= 2
    x = sample.double()
    permutations, swaps = [], []
    for stage in range(2):
        order = zigzag(x.abs().amax(dim=0), block) if stage else torch.arange(width, device=x.device)
        x = x[:, order]
        chosen = _greedy_swaps(x.unflatten(1, (-1, block)).transpose(0, 1), steps)
        x = _rotate(x, _rotations(chosen, block))
        permutations.append(order)
        swaps.append(chosen)
    return BlockRotation(
        block, torch.stack(permutations).to(torch.int16).cpu(), torch.stack(swaps).to(torch.uint8).cpu()
    )


def rotation_blocks(rotation: BlockRotation) -> Tensor:
    """float32[stages, in / block, block, block]: the orthogonal matrix of each block, from the stored swaps."""
    return torch.stack([_rotations(s.to(torch.int64), rotation.block) for s in rotation.swaps]).float()


def apply(x: Tensor, permutation: Tensor, blocks: Tensor) -> Tensor:
    """x T^T per row. x: float[..., in]; permutation: int[stages, in]; blocks: of `rotation_blocks`, in x's dtype."""
    flat = x.reshape(-1, x.shape[-1])
    for order, matrices in zip(permutation, blocks, strict=True):
        flat = _rotate(flat[:, order.to(torch.int64)], matrices)
    return flat.view(x.shape)


def zigzag(size: Tensor, block: int) -> Tensor:
    """Order of the channels that deals them out, largest first, over the blocks and back: int64[in].

    Every block gets about the same sum of sizes; within a block the largest comes first, ties by channel number.
    """
    ranked = size.argsort(descending=True, stable=True)
    rows = ranked.view(block, -1).clone()  # row r: the channels dealt in round r
    rows[1::2] = rows[1::2].flip(1)
    return rows.T.reshape(-1)


def walsh(x: Tensor) -> Tensor:
    """x H per row, without signs."""
    width = x.shape[-1]
    block = width & -width
    flat = x.reshape(-1, width // block, block) if width else x
    half = 1
    while half < block:
        pairs = flat.reshape(-1, block // (2 * half), 2, half)
        low, high = pairs[:, :, 0], pairs[:, :, 1]
        flat = torch.stack((low + high, low - high), dim=2)
        half *= 2
    return flat.reshape(x.shape) * block**-0.5 if width else x


@functools.cache
def _spreading(block: int) -> Tensor:
    """Orthogonal float64[block, block] whose first row is constant: x @ it spreads channel 0 evenly (Helmert)."""
    rows = torch.tril(torch.ones(block, block, dtype=torch.float64), diagonal=-1)
    index = torch.arange(block, dtype=torch.float64)
    rows -= torch.diag(index)
    rows[0] = 1.0
    return rows / rows.norm(dim=1, keepdim=True)


def _rotations(swaps: Tensor, block: int) -> Tensor:
    """float64[..., block, block]: the product of E_i R E_i over the steps, E_i exchanging channel 0 and i."""
    total = torch.eye(block, dtype=torch.float64, device=swaps.device).expand(*swaps.shape[:-1], block, block)
    for step in range(swaps.shape[-1]):
        index = swaps[..., step]
        total = torch.where(
            (index < block)[..., None, None], total @ _exchanged(index.clamp_max(block - 1), block), total
        )
    return total


def _exchanged(index: Tensor, block: int) -> Tensor:
    places = torch.arange(block, device=index.device).expand(*index.shape, block)
    first = index[..., None]
    order = torch.where(places == 0, first, torch.where(places == first, 0, places))
    spreading = _spreading(block).to(index.device)
    return spreading[order[..., :, None], order[..., None, :]]


def _greedy_swaps(x: Tensor, steps: int) -> Tensor:
    """x: float64[blocks, m, block] -> int64[blocks, steps]; steps after the best prefix are 255."""
    block = x.shape[-1]
    chosen, peaks = [], [x.abs().amax(dim=-1).square().mean(dim=-1)]
    for _ in range(steps if block > 1 else 0):
        worst = x.abs().amax(dim=1).argmax(dim=-1)
        x = x @ _exchanged(worst, block)
        chosen.append(worst)
        peaks.append(x.abs().amax(dim=-1).square().mean(dim=-1))
    if not chosen:
        return torch.full((x.shape[0], steps), 255, dtype=torch.int64, device=x.device)
    kept = torch.stack(peaks, dim=-1).argmin(dim=-1, keepdim=True)
    places = torch.arange(steps, device=x.device)
    return torch.where(places < kept, torch.stack(chosen, dim=-1), 255)


def _rotate(x: Tensor, matrices: Tensor) -> Tensor:
    """Each block of x [m, in] times its matrix of [in / block, block, block]."""
    parts = x.unflatten(1, (matrices.shape[0], -1)).transpose(0, 1)
    return (parts @ matrices).transpose(0, 1).flatten(1)
