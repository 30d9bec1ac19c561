"""Move the size of outlier channels from the activations into the weights (SmoothQuant, SVDQuant's first step).

Guarantees: (x / s) (w * s)^T is x w^T for the scales s of every function here; a scale is finite, not zero and exact
in bfloat16, so storing it in 16 bit changes nothing; a channel that is never used keeps scale 1.
Knows nothing of: what is done to the smoothed weight, and of LayerNorms that could take the division for free.

Source: Xiao et al., "SmoothQuant", ICML 2023, equation 4; the search over exponents follows deepcompressor
(SVDQuant's code), which tries powers of both spans and keeps the one with the least output error.
Adaptation: max|x_j| comes from the sampler's own trajectories. For q, k, v, e_add, e_mul, linX1, linE1 and lin_y1
s could be folded into the LayerNorm in front; e_out and x_out have none there, so the division is done at run time
everywhere. Cost: one multiplication per input, 16 bits per input channel.
"""

import torch
from torch import Tensor

SMALLEST = 1e-4
"""Least scale, in parts of the layer's largest: a channel that calibration hardly saw must not be blown up."""

ONE_SIDED = 0.8
"""Share of a channel's entries, and of the channels, that must agree before channels are flipped."""

EXPONENTS = tuple(step / 10 for step in range(11))
"""Strengths that the search tries; 0 moves nothing but the weights' own spread."""


def smooth_scale(w: Tensor, act_absmax: Tensor, strength: float) -> Tensor:
    """s_j = max|x_j|^strength / max|w_j|^(1 - strength) per input channel.

    w: float[..., out, in]; act_absmax: float[..., in]; strength in [0, 1]. Returns float32[..., in], multiplied by
    one constant so that the geometric mean of the scales is about 1.
    """
    act, weight = act_absmax.double(), w.double().abs().amax(dim=-2)
    used = (act > 0) & (weight > 0)
    act, weight = torch.where(used, act, 1.0), torch.where(used, weight, 1.0)
    return _tame(strength * act.log() - (1.0 - strength) * weight.log(), used)


def search_scale(w: Tensor, sample: Tensor, weight_bits: int, act_bits: int) -> Tensor:
    """The scale of `smooth_scale`'s family, or 1, with the least error of the layer's output on a sample.

    w: float[out, in]; sample: float[m, in]. Weights are rounded per row, activations per token, both symmetric
    and to nearest; 16 bits and more means not rounded. Returns float32[in].
    """
    x = sample.double()
    wanted = x @ w.double().T
    candidates = [torch.ones(w.shape[1], device=w.device)]
    candidates += [smooth_scale(w, sample.abs().amax(dim=0), strength) for strength in EXPONENTS]
    errors = []
    for s in candidates:
        found = _rounded(x / s, act_bits) @ _rounded(w.double() * s, weight_bits).T
        errors.append(float((found - wanted).square().sum(dim=1).sum()))
    return candidates[min(range(len(errors)), key=errors.__getitem__)]


def _tame(log_scale: Tensor, used: Tensor) -> Tensor:
    count = used.sum(dim=-1, keepdim=True).clamp_min(1)
    mean = torch.where(used, log_scale, 0.0).sum(dim=-1, keepdim=True) / count
    centred = torch.where(used, log_scale - mean, 0.0).clamp(-40.0, 40.0)
    scale = centred.exp()
    scale = torch.maximum(scale, SMALLEST * scale.amax(dim=-1, keepdim=True))
    return torch.where(used, scale, 1.0).to(torch.bfloat16).float()


def _rounded(rows: Tensor, bits: int) -> Tensor:
    if bits >= 16:
        return rows
    top = 2 ** (bits - 1) - 1
    step = (rows.abs().amax(dim=-1, keepdim=True) / top).clamp_min(torch.finfo(torch.float32).tiny)
    return (rows / step).round_().mul_(step)


def merging_signs(sample: Tensor) -> Tensor:
    """-1 where an input channel is negative nearly always, else 1: float32[in], to be used as a smoothing scale.

    Channels of two kinds, always positive and always negative, make a distribution with two humps; flipping one kind
    leaves one hump on one side, which asymmetric codes cover with half the step. Nothing is flipped unless at least a
    share ONE_SIDED of the channels is one-sided. sample: float[m, in].
    Source: Lv et al., "PTQ4SAM", CVPR 2024, section 3.2; chengtao-lv/PTQ4SAM at 4ec50bd.
    """
    balance = (sample > 0).double().mean(dim=0) - (sample < 0).double().mean(dim=0)
    if float((balance.abs() >= ONE_SIDED).double().mean()) < ONE_SIDED:
        return torch.ones(sample.shape[1])
    return torch.where(balance < 0, -1.0, 1.0).float().cpu()


def integrating_scale(sample: Tensor, scattered: float = 2.0) -> Tensor:
    """Scales that give channels of unusual range the usual one: float32[in], exact in bfloat16.

    A channel whose largest |x| is more than `scattered` times the median channel's is divided by its surplus; the
    others keep scale 1. sample: float[m, in].
    Source: Tian et al., "QVD", ACM MM 2024, scattered channel range integration; the offset of a channel is left out,
    because the codes' zero point is shared.
    """
    size = sample.abs().amax(dim=0).double()
    usual = size[size > 0].median() if bool((size > 0).any()) else size.new_ones(())
    scale = torch.where(size > scattered * usual, size / (scattered * usual), 1.0)
    return scale.to(torch.bfloat16).float().cpu()
