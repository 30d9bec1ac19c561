"""Which weights and channels of a layer leave the low-bit part.

Guarantees: a mask of sparse entries has at most `budget(alpha, length)` of them in each row and column; ties are
decided by position.
Knows nothing of: how what is chosen is stored.

Sources: magnitude, the ablation of Bit-DGDM with thresholded outliers; sensitivity, Kim et al., "SqueezeLLM", ICML 2024
(squared weight times the Fisher information of its input, of which a layer knows its mean square); salient, Shang et
al., "PB-LLM", ICLR 2024 (binary.py); columns by activation, Dettmers et al., "LLM.int8()", NeurIPS 2022, with a fixed
number of channels in the place of a threshold, so that shapes are static.
"""

import torch
from torch import Tensor

from bitdgdm.quant.binary import salient_mask
from bitdgdm.quant.inputs import Inputs
from bitdgdm.quant.recipe import Recipe
from bitdgdm.quant.robust_pca import keep_largest


def sparse_mask(w: Tensor, recipe: Recipe, seen: Inputs | None) -> Tensor:
    """bool[B, out, in]: the entries of W' that S takes by `recipe.sparse_choice`."""
    if recipe.sparse_choice == "salient":
        assert seen is not None
        pairs = zip(w, seen.moment, strict=True)
        return torch.stack([salient_mask(m, recipe.alpha, c) for m, c in pairs])
    if recipe.sparse_choice == "sensitivity":
        assert seen is not None
        size = seen.moment.diagonal(dim1=-2, dim2=-1).clamp_min(0.0).sqrt()
        return keep_largest(w.double() * size.unsqueeze(-2), recipe.alpha) != 0
    return keep_largest(w, recipe.alpha) != 0


def kept_channels(w: Tensor, recipe: Recipe, seen: Inputs | None) -> Tensor:
    """0 for the `recipe.columns` channels of the column block, 1 for the others: float32[B, 1, in]."""
    keep = torch.ones(len(w), 1, w.shape[-1], device=w.device)
    count = min(recipe.columns, w.shape[-1])
    for i, m in enumerate(w if count else ()):
        if recipe.column_choice == "activation":
            assert seen is not None
            size = seen.absmax[i]
        else:
            size = m.abs().amax(dim=0)
        keep[i, 0, size.argsort(descending=True, stable=True)[:count]] = 0.0
    return keep
