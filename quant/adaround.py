"""Learn for each weight whether to round it up or down, against the layer's output (AdaRound, as in Q-Diffusion).

Guarantees: every code is the scaled weight rounded down or up, within the limits of `round_weights`; no row has a
larger output error on the sample than rounding to nearest: a row that would falls back to nearest. Fixed starting
point, no random numbers: the same arguments give the same codes on one kind of processor.
Knows nothing of: neighbouring layers, activations' rounding, low-rank and sparse parts (the caller hands in what those
leave).

Source: Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", ICML 2020, equations 21-25; Li et
al., "Q-Diffusion", ICCV 2023, uses it block by block.
Adaptation: the sample are inputs along the sampler's own trajectories at times drawn evenly, which is Q-Diffusion's
calibration; the reconstruction is layer by layer, because a DiGress block's outputs are products of its Linears and its
edge path is all the cost. Its split of concatenated shortcuts has no counterpart in DiGress. The squared error enters by
the inputs' second moment, so a step costs the same for any number of rows, and its gradient is written out.
Cost: nothing at run time; 300 steps of two products out x in x in.
"""

import torch
from torch import Tensor

from bitdgdm.infra.errors import NotFinite
from bitdgdm.quant.gptq import output_error, row_scales

STEPS = 300

ZETA, GAMMA = 1.1, -0.1
"""How far the sigmoid reaches beyond 0 and 1, so that both are reached."""

WARM_UP = 0.2
"""Share of the steps before the penalty sets in."""

BETAS = (20.0, 2.0)
"""The penalty's exponent, from flat in the middle to steep everywhere."""

STRENGTH, RATE = 10.0, 0.15
"""Weight of the penalty and step of Adam: tuned for hundreds of steps instead of the published 10,000."""


def adaround(w: Tensor, sample: Tensor, bits: int, clip: str, *, steps: int = STEPS) -> tuple[Tensor, Tensor]:
    """Codes int8[out, in] and scale bfloat16[out], w ~ codes * scale[:, None].

    w: float[out, in]; sample: float[m, in], rows of the layer's input; bits, clip: as in `round_weights`.
    Raises: NotFinite if the weight or the sample holds NaN or infinity.
    """
    wide = sample.double()
    return adaround_moment(w, wide.T @ wide / max(1, len(wide)), bits, clip, steps=steps)


def adaround_moment(
    w: Tensor, second_moment: Tensor, bits: int, clip: str, *, steps: int = STEPS
) -> tuple[Tensor, Tensor]:
    """The same from the inputs' second moment. w: float[..., out, in]; second_moment: float[..., in, in]."""
    for name, tensor in (("a weight", w), ("a layer's input", second_moment)):
        if not bool(torch.isfinite(tensor).all()):
            raise NotFinite(f"{name} of shape {list(tensor.shape)}")
    scale = row_scales(w, bits, clip)
    top = 2 ** (bits - 1) - 1
    bottom = -top if clip == "absmax" else -top - 1
    step = scale.float()[..., None]
    scaled = w.float() / step
    floor = scaled.floor()
    nearest = scaled.round().clamp(bottom, top)
    up = _learn(scaled, floor, step, second_moment.float(), (bottom, top), steps)
    codes = (floor + up).clamp(bottom, top)
    lost, limit = (output_error(w, c * step, second_moment) for c in (codes, nearest))
    codes = torch.where((lost > limit)[..., None], nearest, codes)
    return codes.to(torch.int8), scale


def _learn(
    scaled: Tensor, floor: Tensor, step: Tensor, h: Tensor, limits: tuple[int, int], steps: int
) -> Tensor:
    """1 where a weight is better rounded up, else 0, like `scaled`.

    Minimises sum of e H e^T, e the weight's error in units of `step`, over 0 <= up <= 1, up = clamp(sigmoid(v) *
    (ZETA - GAMMA) + GAMMA), plus a penalty that drives every up to 0 or 1. Each row is in units of its error when
    rounded to nearest, so that the strength of the penalty means the same for all.
    """
    rest = (scaled - floor).clamp(0.01, 0.99)
    v = -((ZETA - GAMMA) / (rest - GAMMA) - 1).log()
    off = scaled.round().clamp(*limits) - scaled
    unit = (off * (off @ h)).sum(dim=-1, keepdim=True)
    weight = torch.where(unit > 0, scaled.shape[-1] / unit.clamp_min(1e-30), 0.0)
    mean, square = torch.zeros_like(v), torch.zeros_like(v)
    for k in range(steps):
        soft = torch.sigmoid(v)
        up = (soft * (ZETA - GAMMA) + GAMMA).clamp(0.0, 1.0)
        inside = ((floor + up) >= limits[0]) & ((floor + up) <= limits[1])
        error = (floor + up).clamp(*limits) - scaled
        gradient = 2.0 * weight * (error @ h) * inside
        if k >= WARM_UP * steps:
            share = (k - WARM_UP * steps) / ((1.0 - WARM_UP) * steps)
            beta = BETAS[1] + (BETAS[0] - BETAS[1]) * (1.0 - share)
            away = (2.0 * up - 1.0).abs()
            gradient = gradient - STRENGTH * 2.0 * beta * (2.0 * up - 1.0).sign() * away ** (beta - 1.0)
        gradient = gradient * (ZETA - GAMMA) * soft * (1.0 - soft)
        gradient = torch.where((up > 0.0) & (up < 1.0), gradient, 0.0)
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient * gradient
        v = v - RATE * (mean / (1 - 0.9 ** (k + 1))) / ((square / (1 - 0.999 ** (k + 1))).sqrt() + 1e-8)
    return (v >= 0).to(scaled.dtype)
