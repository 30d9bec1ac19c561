"""Weights as plus or minus one scale a row, the salient ones kept apart (PB-LLM).

Guarantees: the scale is the least-squares one of its row over the entries that aren't salient, rounded to bfloat16;
a row of zeros comes back as zeros; with salient entries the sum of both parts equals the weight there to bfloat16.
Knows nothing of: how the sparse part is stored and multiplied.

Source: Shang et al., "PB-LLM", ICLR 2024, sections 3.1 and 3.3; hahnyuan/PB-LLM at 5520ca0 (gptq_pb/gptq.py) keeps
the largest |w|, or the largest w^2 / [H^-1]_jj^2 with the damped second moment H, in higher precision.
Adaptation: at most a fraction alpha of each row and each column is salient instead of a fraction of the matrix, so
that kernels get fixed shapes; salient entries are stored in 16 bit instead of 8; no column-wise error compensation.
Cost: 1 bit a weight, and 32 bits for each salient one; weight only. Fails at width 256: half of the weight is lost.
"""

import torch
from torch import Tensor

from bitdgdm.quant.robust_pca import keep_largest


def binarize(w: Tensor, salient: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes int8[..., out, in] of -1 and 1 and scale bfloat16[..., out]: w ~ codes * scale[..., None].

    w: float[..., out, in]; salient: bool like w, entries that take no part in the scale.
    """
    codes = torch.where(w < 0, -1, 1).to(torch.int8)
    if salient is None:
        return codes, w.abs().double().mean(dim=-1).to(torch.bfloat16)
    total = torch.where(salient, 0.0, w.abs().double()).sum(dim=-1)
    return codes, (total / (~salient).sum(dim=-1).clamp_min(1)).to(torch.bfloat16)


def salient_mask(w: Tensor, alpha: float, second_moment: Tensor | None = None) -> Tensor:
    """bool[out, in]: at most `budget(alpha, length)` entries of each row and each column, the most salient ones.

    second_moment: float[in, in] of the layer's inputs; None takes the magnitude of the weight alone.
    """
    score = w.double().abs()
    if second_moment is not None:
        h = second_moment.double()
        h = h + torch.eye(len(h), device=h.device) * (
            0.01 * h.diagonal().mean() + torch.finfo(torch.float64).tiny
        )
        inverse, failed = torch.linalg.inv_ex(h)
        if not int(failed):
            score = score / inverse.diagonal()
    return keep_largest(score / score.max().clamp_min(1e-300), alpha) != 0


def partly_binary(
    w: Tensor, alpha: float, second_moment: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes and scale of `binarize` and the sparse rest S float32[out, in], w ~ codes * scale + S.

    S holds, at the salient entries, what the binary value leaves: a binary code can't be zero.
    """
    mask = salient_mask(w, alpha, second_moment)
    codes, scale = binarize(w, mask)
    rest = w.float() - codes.float() * scale.float()[:, None]
    return codes, scale, torch.where(mask, rest, 0.0)
