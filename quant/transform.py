"""The invertible transform T of a layer's input: x' = T x, W' = W T^-1.

Guarantees: `into` and `back` undo each other up to float32 rounding, and x' W'^T = x W^T; what T needs is stored
(smooth scales, a permutation with a few rotations) or follows from the width (Hadamard).
Knows nothing of: how the scales and rotations are found (smooth.py, rotate.py), quantization.

Kinds: "none"; "smooth" x' = x / s; "hadamard" x' = H D x, D fixed signs; "duquant": stages of a permutation and a
rotation of each block.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bitdgdm.quant import rotate


@dataclass(frozen=True)
class Transform:
    """What T is made of at run time; what a kind doesn't use is None.

    factor: float32[in], 1/s or the signs D. permutation: int64[stages, in]. blocks: float32[stages, in / b, b, b].
    """

    kind: str = "none"
    factor: Tensor | None = None
    permutation: Tensor | None = None
    blocks: Tensor | None = None

    def to(self, device: torch.device) -> "Transform":
        moved = (None if v is None else v.to(device) for v in (self.factor, self.permutation, self.blocks))
        return Transform(self.kind, *moved)


def transform_of(
    kind: str, width: int, smooth: Tensor | None, permutation: Tensor | None, swaps: Tensor | None
) -> Transform:
    """From what is stored. smooth: float[in]; permutation: int16[stages, in]; swaps: uint8[stages, in / b, steps]."""
    if kind == "smooth":
        assert smooth is not None
        return Transform(kind, factor=smooth.float().reciprocal())
    if kind == "hadamard":
        return Transform(kind, factor=rotate.signs(width))
    if kind == "duquant":
        assert permutation is not None and swaps is not None
        rotation = rotate.BlockRotation(width // swaps.shape[1], permutation, swaps)
        return Transform(
            kind, permutation=permutation.to(torch.int64), blocks=rotate.rotation_blocks(rotation)
        )
    return Transform()


def forward(x: Tensor, t: Transform) -> Tensor:
    """T x per row. x: float32[M, in]."""
    if t.kind == "smooth":
        assert t.factor is not None
        return x * t.factor
    if t.kind == "hadamard":
        assert t.factor is not None
        return rotate.walsh(x * t.factor)
    if t.kind == "duquant":
        assert t.permutation is not None and t.blocks is not None
        return rotate.apply(x, t.permutation, t.blocks)
    return x


def into(w: Tensor, t: Transform) -> Tensor:
    """W T^-1. w: float32[out, in]."""
    if t.kind == "smooth":
        assert t.factor is not None
        return w / t.factor
    return forward(w, t)  # orthogonal: T^-1 is its transpose


def back(w: Tensor, t: Transform) -> Tensor:
    """W' T. w: float32[out, in]."""
    if t.kind == "smooth":
        assert t.factor is not None
        return w * t.factor
    if t.kind == "hadamard":
        assert t.factor is not None
        return rotate.walsh(w) * t.factor
    if t.kind == "duquant":
        assert t.permutation is not None and t.blocks is not None
        for order, matrices in zip(t.permutation.flip(0), t.blocks.flip(0), strict=True):
            same = torch.arange(w.shape[1], device=w.device)[None]
            w = rotate.apply(w, same, matrices.mT[None])[:, order.argsort()]
    return w
