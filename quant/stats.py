"""What a calibration pass tells about the input of one Linear.

Guarantees: a value; all tensors are on the CPU, finite and of one input width.
Knows nothing of: which network was run, how rows were drawn (the models' floor does that), what reads it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerStats:
    """Inputs of one Linear, seen along the sampler's own trajectories of the full-precision network.

    sample: float32[m, in], rows drawn uniformly over real (unpadded) rows and steps. time: int64[m], the diffusion
    time of each row, 1..diffusion_steps. second_moment: float32[in, in], mean of x x^T over all rows seen.
    absmax: float32[in], largest |x| per input channel over all rows seen. rows: how many were seen.
    """

    sample: Tensor
    time: Tensor
    second_moment: Tensor
    absmax: Tensor
    rows: int
    diffusion_steps: int

    def __post_init__(self) -> None:
        """Raises: ValueError if shapes contradict each other or the diffusion times."""
        width = self.absmax.shape[0] if self.absmax.ndim == 1 else -1
        fits = (
            self.sample.ndim == 2
            and self.sample.shape[1] == width
            and tuple(self.second_moment.shape) == (width, width)
            and tuple(self.time.shape) == (len(self.sample),)
        )
        if not fits:
            shapes = [list(t.shape) for t in (self.sample, self.time, self.second_moment, self.absmax)]
            raise ValueError(f"sample, time, second_moment and absmax don't fit each other: {shapes}")
        if len(self.time) and not 1 <= int(self.time.min()) <= int(self.time.max()) <= self.diffusion_steps:
            raise ValueError(f"diffusion times are in 1..{self.diffusion_steps}")

    @property
    def width(self) -> int:
        return self.absmax.shape[0]


def stats_of_rows(sample: Tensor, time: Tensor, diffusion_steps: int) -> LayerStats:
    """Statistics of exactly these rows. sample: float[m, in], m > 0; time: int[m]."""
    wide = sample.double()
    return LayerStats(
        sample.float().cpu(), time.to(torch.int64).cpu(), (wide.T @ wide / len(wide)).float().cpu(),
        sample.abs().amax(dim=0).float().cpu(), len(sample), diffusion_steps,
    )  # fmt: skip
