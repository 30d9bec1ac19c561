"""Move the size of outlier channels from the activations into the weights (SmoothQuant, SVDQuant's first step).

Guarantees: (x / s) (w * s)^T is x w^T for the scales s found here; a scale is positive, finite and exact in
bfloat16, so storing it in 16 bit changes nothing; a channel that is never used keeps scale 1.
Knows nothing of: what is done to the smoothed weight, and of LayerNorms that could take the division for free.

Source: Xiao et al., "SmoothQuant", ICML 2023, equation 4; deepcompressor (SVDQuant's code) searches the strength of each
layer by its output error, which gains little over strength 1/2 on the shipped network, so there is no search.
Adaptation: max|x_j| comes from the sampler's own trajectories. For q, k, v, e_add, e_mul, linX1, linE1 and lin_y1
s could be folded into the LayerNorm in front; e_out and x_out have none there, so the division is done at run time
everywhere. Cost: one multiplication per input, 16 bits per input channel.
"""

import torch
from torch import Tensor

SMALLEST = 1e-4
"""Least scale, in parts of the layer's largest: a channel that calibration hardly saw must not be blown up."""


def smooth_scale(w: Tensor, act_absmax: Tensor, strength: float) -> Tensor:
    """s_j = max|x_j|^strength / max|w_j|^(1 - strength) per input channel.

    w: float[..., out, in]; act_absmax: float[..., in]; strength in [0, 1]. Returns float32[..., in], multiplied by
    one constant so that the geometric mean of the scales is about 1.
    """
    act, weight = act_absmax.double(), w.double().abs().amax(dim=-2)
    used = (act > 0) & (weight > 0)
    act, weight = torch.where(used, act, 1.0), torch.where(used, weight, 1.0)
    return _tame(strength * act.log() - (1.0 - strength) * weight.log(), used)


def _tame(log_scale: Tensor, used: Tensor) -> Tensor:
    count = used.sum(dim=-1, keepdim=True).clamp_min(1)
    mean = torch.where(used, log_scale, 0.0).sum(dim=-1, keepdim=True) / count
    centred = torch.where(used, log_scale - mean, 0.0).clamp(-40.0, 40.0)
    scale = centred.exp()
    scale = torch.maximum(scale, SMALLEST * scale.amax(dim=-1, keepdim=True))
    return torch.where(used, scale, 1.0).to(torch.bfloat16).float()
