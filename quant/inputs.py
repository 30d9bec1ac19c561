"""What calibration saw of the inputs of a group of Linears, in the space in which their weights are split.

Guarantees: a value; following a transform or hiding channels gives the statistics of the changed inputs.
Knows nothing of: weights and recipes.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bitdgdm.quant.stats import LayerStats
from bitdgdm.quant.transform import Transform, forward


@dataclass(frozen=True)
class Inputs:
    """Of B layers of one width. moment: float64[B, in, in]; samples: float32[m, in], times: int64[m] and absmax:
    float32[in] of each layer, on the device of the weights."""

    moment: Tensor
    samples: tuple[Tensor, ...]
    times: tuple[Tensor, ...]
    absmax: tuple[Tensor, ...]
    diffusion_steps: int

    def transformed(self, transforms: Sequence[Transform]) -> "Inputs":
        """Of x' = T x: the moment becomes T C T^T, the largest entries those of the sample."""
        moments = []
        for c, t in zip(self.moment.float(), transforms, strict=True):
            rows = forward(c, t)  # each row of C times T^T
            moments.append(forward(rows.T.contiguous(), t).double())
        samples = tuple(forward(x, t) for x, t in zip(self.samples, transforms, strict=True))
        absmax = tuple(x.abs().amax(dim=0) for x in samples)
        return dataclasses.replace(self, moment=torch.stack(moments), samples=samples, absmax=absmax)

    def deflated(self, bases: Sequence[Tensor]) -> "Inputs":
        """Of x'' = x' - R R^T x'. bases: R, float32[in, R] of each layer."""
        moments = []
        for c, r in zip(self.moment, bases, strict=True):
            wide = r.double()
            c = c - wide @ (wide.mT @ c)
            moments.append(c - (c @ wide) @ wide.mT)
        samples = tuple(x - (x @ r) @ r.mT for x, r in zip(self.samples, bases, strict=True))
        absmax = tuple(x.abs().amax(dim=0) for x in samples)
        return dataclasses.replace(self, moment=torch.stack(moments), samples=samples, absmax=absmax)

    def hiding(self, keep: Tensor) -> "Inputs":
        """With some channels zero. keep: 0 or 1 per channel, float32[B, 1, in]."""
        wide = keep.double()
        samples = tuple(x * k for x, k in zip(self.samples, keep, strict=True))
        return dataclasses.replace(self, moment=self.moment * wide * wide.mT, samples=samples)


def inputs_of(stats: Sequence[LayerStats], device: torch.device) -> Inputs:
    """The inputs as they were seen."""
    return Inputs(
        torch.stack([s.second_moment for s in stats]).to(device).double(),
        tuple(s.sample.to(device) for s in stats),
        tuple(s.time.to(device) for s in stats),
        tuple(s.absmax.to(device) for s in stats),
        stats[0].diffusion_steps,
    )
